"""The hook that finishes a gradient which is still on its way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import _functional_collectives as functional
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from conformance.kit.compare import assert_same, assert_unchanged, fingerprint
from conformance.kit.data import numbers
from conformance.kit.layouts import S, dtensor
from conformance.kit.streams import STREAM, Handle, Waits


def _either(*names: str) -> Any:
    """The first of the names that this torch has; it has begun to rename them."""
    return next(getattr(functional, name) for name in names if hasattr(functional, name))


all_reduce: Any = functional.all_reduce
all_gather = _either("all_gather_single", "all_gather_tensor")
reduce_scatter = _either("reduce_scatter_single", "reduce_scatter_tensor")


@pytest.mark.judges("tensor.parallel._data_parallel_utils.sync_grad_hook")
class TestSyncGradHook:
    @pytest.mark.law("values")
    @pytest.mark.world(1, 2, 4)
    def test_a_pending_gradient_comes_back_finished(
        self, judged: Any, world: Any, rank: int
    ) -> None:
        """A pending AsyncCollectiveTensor comes back as the plain tensor with the final values."""
        full, group = numbers(4 * world.size, 3), dist.group.WORLD
        mine = full.chunk(world.size)[rank]
        total = full * sum(range(1, world.size + 1))
        for name, pending, expected in (
            ("all_reduce", all_reduce(full * (rank + 1), "sum", group), total),
            ("all_gather", all_gather(mine, 0, group), full),
            (
                "reduce_scatter",
                reduce_scatter(full * (rank + 1), "sum", 0, group),
                total.chunk(world.size)[rank],
            ),
        ):
            assert isinstance(pending, AsyncCollectiveTensor), f"{name} is not pending"
            got = judged(pending)
            assert type(got) is torch.Tensor, f"{name}: a {type(got).__name__}"
            assert_same(got, expected, name)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_a_gradient_that_was_waited_for(self, judged: Any) -> None:
        """One that somebody has waited for already comes back as the plain tensor, too."""
        full = numbers(4, 3)
        for wait in (lambda tensor: tensor + 0, functional.wait_tensor, judged):
            pending = all_reduce(full, "sum", dist.group.WORLD)
            wait(pending)
            got = judged(pending)
            assert type(got) is torch.Tensor, f"a {type(got).__name__}"
            assert_same(got, full * 2)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_every_dtype_that_a_gradient_has(self, judged: Any, rank: int) -> None:
        """Gradients of every floating and complex dtype that the backend moves come back exact."""
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            got = judged(all_reduce(numbers(5, dtype=dtype) * (rank + 1), "sum", dist.group.WORLD))
            assert_same(got, numbers(5, dtype=dtype) * 3, str(dtype))

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_twice_is_once(self, judged: Any) -> None:
        """A gradient that was waited for already comes back with the same values."""
        pending = all_reduce(numbers(4), "sum", dist.group.WORLD)
        first = judged(pending)
        assert_same(judged(pending), numbers(4) * 2, "second call")
        assert judged(first) is first

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_anything_else_is_the_same_object(self, judged: Any, mesh: Any) -> None:
        """Anything else comes back as the same object, untouched."""
        things = {
            "tensor": numbers(3),
            "0-dim": numbers(),
            "parameter": nn.Parameter(numbers(3)),
            "dtensor": dtensor(numbers(3), mesh(1), [S(0)]),
            "None": None,
            "tuple": (numbers(3), None),
        }
        before = fingerprint(things)
        for name, thing in things.items():
            assert judged(thing) is thing, f"{name}: another object"
            got = judged(thing, device_handle=None, compute_stream=None)
            assert got is thing, f"{name}: another {type(got).__name__}, expected the same object"
            with_stream = judged(thing, device_handle=Handle(), compute_stream=STREAM)
            assert with_stream is thing, f"{name}: another object with a stream"
        assert_unchanged(things, before)

    @pytest.mark.law("autograd")
    @pytest.mark.world(1, 2)
    def test_waits_on_the_compute_stream(self, judged: Any, world: Any) -> None:
        """With a compute stream the wait happens on it, and it is current no longer afterwards."""
        handle = Handle()
        pending = all_reduce(numbers(4), "sum", dist.group.WORLD)
        with Waits(handle) as waits:
            got = judged(pending, device_handle=handle, compute_stream=STREAM)
        assert waits.streams, "nothing was waited for"
        assert set(waits.streams) == {STREAM}, "the wait ran outside the compute stream"
        assert handle.current is None, "the compute stream is still current"
        assert type(got) is torch.Tensor
        assert_same(got, numbers(4) * world.size)

    @pytest.mark.law("autograd")
    @pytest.mark.world(2)
    def test_what_a_dtensor_holds(self, judged: Any, mesh: Any) -> None:
        """A pending local tensor is finished on the compute stream as well."""
        for name, options in {
            "without a stream": {},
            "with one": {"device_handle": (handle := Handle()), "compute_stream": STREAM},
        }.items():
            pending = all_reduce(numbers(4), "sum", dist.group.WORLD)
            grad = dtensor(numbers(8), mesh(2), [S(0)], local=pending)
            with Waits(handle) as waits:
                got = judged(grad, **options)
            assert type(got._local_tensor) is torch.Tensor, f"{name}: it is pending still"
            assert_same(got._local_tensor, numbers(4) * 2, name)
            assert set(waits.streams) == {options.get("compute_stream")}, f"{name}: elsewhere"

    @pytest.mark.law("autograd")
    @pytest.mark.world(2)
    def test_waits_without_a_stream(self, judged: Any) -> None:
        """Without a compute stream the wait happens on the current one, before the return."""
        handle = Handle()
        pending = all_reduce(numbers(4), "sum", dist.group.WORLD)
        with Waits(handle) as waits:
            judged(pending, device_handle=handle)
        assert waits.streams, "nothing was waited for"
        assert handle.entered == 0, "a stream was entered that nobody gave"

    @pytest.mark.law("autograd")
    @pytest.mark.world(2)
    def test_as_a_hook(self, judged: Any) -> None:
        """As a tensor hook it gives the parameter a plain gradient, exact after two backwards."""
        weight = nn.Parameter(numbers(3))
        weight.register_hook(judged)
        for _ in range(2):
            (weight * numbers(3, salt=1)).sum().backward()
        assert weight.grad is not None
        assert type(weight.grad) is torch.Tensor
        assert_same(weight.grad, numbers(3, salt=1) * 2)
