"""The local tensor of a DTensor, as data parallelism takes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Partial

from conformance.kit.agree import exchange
from conformance.kit.collectives import Collectives
from conformance.kit.compare import assert_same, fingerprint, local
from conformance.kit.data import EACH_DTYPE, numbers
from conformance.kit.generated import drawn, layouts
from conformance.kit.layouts import (
    ONE_D,
    THREE_D,
    TWO_D,
    R,
    S,
    dtensor,
    part,
    placement_id,
    rows,
    sharded_tensor,
)


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two plain tensors are the same view of the same memory."""
    return (
        a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and a.storage_offset() == b.storage_offset()
        and a.stride() == b.stride()
    )


@pytest.mark.judges("tensor.parallel._data_parallel_utils._flatten_tensor")
class TestFlattenTensor:
    @pytest.mark.law("values")
    @pytest.mark.world(1, 2, 4)
    @pytest.mark.parametrize("placements", ONE_D, ids=placement_id)
    @pytest.mark.thorough(but=["w2-S1"])
    def test_the_local_tensor_and_the_spec(
        self, judged: Any, mesh: Any, world: Any, placements: Any
    ) -> None:
        """A DTensor gives its local tensor, sharing storage, and its spec; nothing communicates."""
        line = mesh(world.size)
        for shape in [(4, 6), (5, 3), (1, 1), (0, 3), (3, 0), (2, 3, 5)]:
            full = numbers(*shape)
            tensor = dtensor(full, line, placements)
            with Collectives() as seen:
                got, spec = judged(tensor)
            assert seen.count == 0, f"{shape}: {seen.names}"
            assert_same(got.detach(), part(full, line, placements), str(shape))
            assert same_memory(got, tensor._local_tensor), f"{shape}: storage of its own"
            assert spec == tensor._spec, f"{shape}: {spec}, expected {tensor._spec}"
            assert spec.shape == full.shape, f"{shape}: {spec.shape}"
            assert spec.mesh == line, f"{shape}: {spec.mesh}"

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_two_dimensions(self, judged: Any, mesh: Any) -> None:
        """Over a 2-D mesh each combination of placements must give local tensor and spec."""
        square = mesh(2, 2)
        for placements in TWO_D:
            full = numbers(7, 5)
            tensor = dtensor(full, square, placements)
            got, spec = judged(tensor)
            name = placement_id(placements)
            assert_same(got.detach(), part(full, square, placements), name)
            assert tuple(spec.placements) == tuple(placements), f"{name}: {spec.placements}"
            assert same_memory(got, tensor._local_tensor), f"{name}: storage of its own"

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_three_dimensions(self, judged: Any, mesh: Any) -> None:
        """Over a 3-D mesh a DTensor must give its local tensor and its spec."""
        cube = mesh(1, 2, 2)
        for placements in THREE_D:
            full = numbers(7, 5)
            got, spec = judged(dtensor(full, cube, placements))
            name = placement_id(placements)
            assert_same(got.detach(), part(full, cube, placements), name)
            assert tuple(spec.placements) == tuple(placements), f"{name}: {spec.placements}"

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_generated_layouts(self, judged: Any, mesh: Any, world: Any) -> None:
        """Generated shapes and placements must give the local tensor and the spec."""
        square = mesh(2, 2)
        cases = drawn(layouts(2, 2), 30, world.seed)
        told = exchange(world, str(cases), "cases")
        assert len(set(told)) == 1, "the ranks drew different cases"
        for shape, placements in cases:
            full, what = numbers(*shape), f"{shape} {placement_id(placements)}"
            tensor = dtensor(full, square, placements)
            got, spec = judged(tensor)
            assert_same(got.detach(), part(full, square, placements), what)
            assert spec == tensor._spec, f"{what}: {spec}"

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_a_partial_tensor(self, judged: Any, mesh: Any, rank: int) -> None:
        """A Partial DTensor gives this rank's addend, and says so in its spec."""
        tensor = DTensor.from_local(numbers(4, salt=rank), mesh(2), [Partial()], run_check=False)
        got, spec = judged(tensor)
        assert_same(got.detach(), numbers(4, salt=rank))
        assert spec.placements == (Partial(),)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_a_mesh_without_this_rank(self, judged: Any, mesh: Any, rank: int) -> None:
        """On a mesh of some ranks the members get their part; nobody waits for the others."""
        line, full = mesh(1, ranks=[1]), numbers(4)
        if rank == 1:
            got, spec = judged(dtensor(full, line, [S(0)]))
            assert_same(got.detach(), full)
            assert spec.mesh == line

    @pytest.mark.law("values")
    @pytest.mark.needs("functional gathers")
    @pytest.mark.world(2)
    def test_a_pending_collective_is_finished(self, judged: Any, mesh: Any) -> None:
        """The local tensor of a DTensor that is still being gathered arrives with final values."""
        full = numbers(4, 2)
        gathered = dtensor(full, mesh(2), [S(0)]).redistribute(placements=[R], async_op=True)
        got, _ = judged(gathered)
        plain = got.wait() if isinstance(got, AsyncCollectiveTensor) else got
        assert_same(plain.detach(), full)

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    @EACH_DTYPE
    @pytest.mark.thorough(but=["float32"])
    def test_every_dtype(self, judged: Any, mesh: Any, dtype: torch.dtype) -> None:
        """Every dtype passes bit for bit: integer and bool weights, too."""
        for shape in [(4,), (), (0, 3)]:
            full = numbers(*shape, dtype=dtype)
            tensor = dtensor(full, mesh(1), [S(0) if shape else R])
            got, spec = judged(tensor)
            assert_same(got.detach(), full, f"{dtype} {shape}")
            assert spec == tensor._spec

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_strides_and_offset_are_shared(self, judged: Any, mesh: Any) -> None:
        """A local tensor that is a view comes back as that view."""
        room = numbers(40)
        for name, view in {
            "transposed": room[:24].view(6, 4).t(),
            "offset": room[5:29].view(4, 6),
            "sliced": room[:40:2][:12].view(4, 3),
        }.items():
            tensor = dtensor(view, mesh(1), [S(0)], local=view)
            got, _ = judged(tensor)
            assert same_memory(got, view), f"{name}: {got.stride()} at {got.storage_offset()}"
            assert_same(got.detach(), view, name)

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
    @pytest.mark.thorough(but=["w2-trained"])
    def test_requires_grad_is_the_parameters(
        self, judged: Any, mesh: Any, world: Any, trains: bool
    ) -> None:
        """The local tensor requires grad exactly where the parameter does: frozen stays frozen."""
        for placements in ONE_D:
            tensor = dtensor(numbers(4, 6), mesh(world.size), placements)
            weight = nn.Parameter(tensor, requires_grad=trains)
            for kind, value in (("parameter", weight), ("tensor", tensor.requires_grad_(trains))):
                got, _ = judged(value)
                what = f"{kind} {placement_id(placements)}"
                assert got.requires_grad is trains, f"{what}: requires_grad {got.requires_grad}"
                assert value.requires_grad is trains, f"{what}: the DTensor's own flag changed"
                assert got.grad_fn is None, f"{what}: part of a graph"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_integers_require_no_grad(self, judged: Any, mesh: Any) -> None:
        """An integer or bool parameter is flattened without asking for a gradient."""
        for dtype in (torch.int64, torch.int8, torch.uint8, torch.bool):
            tensor = dtensor(numbers(4, dtype=dtype), mesh(1), [S(0)])
            got, _ = judged(nn.Parameter(tensor, requires_grad=False))
            assert not got.requires_grad, f"{dtype}: requires grad, expected that it does not"
            assert_same(got, numbers(4, dtype=dtype), str(dtype))

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_any_other_tensor_is_itself(self, judged: Any) -> None:
        """A tensor that is no DTensor comes back as the same object, with None."""
        weight, full = nn.Parameter(numbers(3)), numbers(4, 2)
        things = {
            "tensor": numbers(3),
            "0-dim": numbers(),
            "integer": numbers(3, dtype=torch.int64),
            "parameter": weight,
            "frozen": nn.Parameter(numbers(3), requires_grad=False),
            "result": weight * 2,
            "sharded": sharded_tensor(full, rows(full.shape, [4])),
        }
        before = fingerprint(things)
        for name, tensor in things.items():
            got, spec = judged(tensor)
            assert got is tensor, f"{name}: another object"
            assert spec is None, f"{name}: spec {spec}"
        assert fingerprint(things) == before, "changed by the call"

    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
    @pytest.mark.thorough(but=["w1-frozen", "w2-trained"])
    def test_the_dtensor_stays_as_it_was(
        self, judged: Any, mesh: Any, world: Any, trains: bool
    ) -> None:
        """The DTensor and its local tensor are not changed; a second call gives the same."""
        tensor = dtensor(numbers(5, 3), mesh(world.size), [S(0)])
        weight = nn.Parameter(tensor, requires_grad=trains)
        before, hooks = fingerprint(weight), weight._backward_hooks
        first, spec = judged(weight)
        assert fingerprint(weight) == before, "changed by the call"
        second, again = judged(weight)
        assert same_memory(first, second)
        assert spec == again
        assert weight._backward_hooks == hooks, "a hook stays"

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_writes_reach_the_dtensor(self, judged: Any, mesh: Any) -> None:
        """What an optimizer writes into the local tensor is what the DTensor holds."""
        weight = nn.Parameter(dtensor(numbers(4), mesh(1), [S(0)]))
        got, _ = judged(weight)
        got.detach().add_(1)
        assert_same(local(weight).detach(), numbers(4) + 1)
