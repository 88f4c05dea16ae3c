"""The DTensor around a local tensor that is not as usual, and its second gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.layouts import R, S, dtensor, in_another_order, part


@pytest.mark.judges("tensor.parallel._data_parallel_utils._unflatten_tensor")
class TestUnflattenTensorOddUses:
    @pytest.mark.law("values")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w1"])
    def test_dtypes_that_are_not_the_specs(self, judged: Any, mesh: Any, world: Any) -> None:
        """A local tensor that was cast must be a DTensor of its dtype, whatever was cast before."""
        line, full = mesh(world.size), numbers(4, 2)
        for placement in R, S(0):
            like = dtensor(full, line, [placement])
            for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.int32):
                local = part(full, line, [placement]).to(dtype)
                for trains in {False, dtype.is_floating_point}:
                    got = judged(local.clone().requires_grad_(trains), like._spec)
                    what = f"{dtype} in {like.dtype}, {placement}, {trains=}"
                    for value in (got, got * 2, got.redistribute(line, [R])):
                        assert value.dtype == dtype, f"{what}: a DTensor of {value.dtype}"
                        meta = value._spec.tensor_meta
                        assert meta is not None, f"{what}: a spec of no tensor"
                        held = meta.dtype
                        assert held == dtype, f"{what}: a spec of {held}"
                    assert_same(got._local_tensor.detach(), local, what)
            meta = like._spec.tensor_meta
            assert meta is not None, "the caller's spec was changed"
            assert meta.dtype == full.dtype, "the caller's spec was changed"

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_shards_in_another_order(self, judged: Any, mesh: Any) -> None:
        """A spec that cuts by the last mesh dimension first must be kept, also with a cast."""
        like = in_another_order(numbers(8, 3), mesh(2, 2))
        if like is None:
            return
        for dtype in (torch.float32, torch.bfloat16):
            for trains in (False, True):
                local = like._local_tensor.clone().to(dtype)
                got = judged(local.requires_grad_(trains), like._spec)
                order = got._spec.shard_order
                assert order == like._spec.shard_order, f"{dtype}, {trains=}: {order}"

    # The compiler looks at the gradient of whatever it meets.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_compiled_in_another_order(self, judged: Any, mesh: Any) -> None:
        """In compiled code a spec that cuts by the last mesh dimension first must be kept."""
        like = in_another_order(numbers(8, 3), mesh(1, 1))
        if like is None:
            return
        spec = like._spec

        def code(local: torch.Tensor) -> Any:
            return judged(local, spec)

        compiled: Any = torch.compile(code, backend="eager")
        for trains in (False, True):
            got = compiled(numbers(8, 3).requires_grad_(trains))
            order = got._spec.shard_order
            assert order == spec.shard_order, f"{trains=}: {order}"
            assert got.requires_grad is trains

    @pytest.mark.law("autograd")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w1"])
    def test_second_gradients(self, judged: Any, mesh: Any, world: Any) -> None:
        """A penalty on a gradient must reach the local tensor through it."""
        line, full = mesh(world.size), numbers(4, 2)
        for placement in R, S(0):
            like = dtensor(full, line, [placement])
            local = part(full, line, [placement]).clone().requires_grad_()
            got = judged(local, like._spec)
            assert isinstance(got, DTensor), f"a {type(got).__name__}"
            cubes: Any = got * got * got
            (slope,) = torch.autograd.grad(cubes.to_local().sum(), local, create_graph=True)
            slope.sum().backward()
            assert_same(slope.detach(), 3 * local.detach() ** 2, f"{placement}: first")
            assert_same(local.grad, 6 * local.detach(), f"{placement}: second")
