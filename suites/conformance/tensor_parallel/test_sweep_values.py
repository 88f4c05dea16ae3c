"""Every bit pattern that tells, through every function of `tensor.parallel`, in every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from conformance.kit.compare import assert_same, assert_type
from conformance.kit.data import DTYPES, numbers
from conformance.kit.kinds import spread
from conformance.kit.layouts import SS, R, S
from conformance.kit.patterns import patterns
from conformance.kit.tensor_parallel import bag
from conformance.kit.tp_kinds import Seat, cut, laid, trainable
from conformance.kit.tp_roads import Function, functions


def _moves(function: Function) -> bool:
    return function.moves


def _arrives(function: Function, judged: Any, seat: Seat) -> None:
    for number, dtype in enumerate(DTYPES):
        full = patterns(dtype, columns=2)[: -3 if number % 3 else None]  # uneven shards, too
        for name, road in function.roads(full, seat):
            got = road.call(judged)
            try:
                road.check(got, full)
            except AssertionError as error:
                raise AssertionError(f"{name}, {dtype}, {len(full)} rows: {error}") from None


class TestValues:
    @pytest.mark.law("values")
    @functions(2, _moves)
    def test_every_bit_arrives(self, function: Function, judged: Any, seat: Seat) -> None:
        """Each bit pattern of each dtype must arrive as it left, whatever the kind of tensor."""
        _arrives(function, judged, seat)

    @pytest.mark.law("values")
    @functions(4, _moves)
    def test_every_bit_is_cut_and_gathered(
        self, function: Function, judged: Any, seat: Seat
    ) -> None:
        """Each bit pattern of each dtype must arrive as it left, whatever the kind of tensor."""
        _arrives(function, judged, seat)

    @pytest.mark.law("autograd")
    @functions(2, lambda function: function.trains is not None)
    def test_every_bit_of_a_gradient_arrives(
        self, function: Function, judged: Any, seat: Seat
    ) -> None:
        """A gradient must reach the local tensor with every bit that it had, plain and finished."""
        assert function.trains is not None
        for dtype in filter(trainable, DTYPES):
            grads = patterns(dtype, columns=2)[:-3]
            full = numbers(*grads.shape, dtype=dtype)
            for kind, piece, whole in function.trains(judged, full, seat):
                assert kind.placements is not None
                torch.autograd.backward(whole, laid(grads, kind.mesh, kind.placements))
                what = f"{kind.name}, {dtype}"
                assert_type(piece.grad, torch.Tensor, what)
                assert_same(piece.grad, kind.local(grads), what)


# Name -> the same values, in memory that lies that way.
_LAID: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as anybody expects": torch.clone,
    "down the columns": lambda t: t.t().contiguous().t(),
    "in every second place": spread,
}


class TestScale:
    @pytest.mark.law("values")
    @functions(4, lambda function: function.copies)
    def test_large_ones(self, function: Function, judged: Any, seat: Seat) -> None:
        """A tensor of several MiB must arrive as a small one does, however its memory lies."""
        for dtype in (torch.float32, torch.int32):
            full = (torch.arange(1 << 20) % 251).to(dtype).view(1024, 1024)
            for way, lay in _LAID.items():
                for name, road in function.roads(full, seat):
                    for leaf in road.inputs.values():
                        if isinstance(leaf, DTensor):
                            leaf._local_tensor = lay(leaf._local_tensor.detach())
                    got = road.call(judged)
                    try:
                        road.check(got, full)
                    except AssertionError as error:
                        raise AssertionError(f"{name}, {way}, {dtype}: {error}") from None


@pytest.mark.judges("tensor.parallel.ddp._pre_dp_module_transform")
class TestLoaded:
    @pytest.mark.law("values")
    @pytest.mark.needs("functional gathers")
    @pytest.mark.world(2)
    def test_every_bit_is_loaded(self, judged: Any, seat: Seat) -> None:
        """A checkpoint of any dtype, whole or laid out otherwise, must be loaded bit for bit."""
        line = seat.line()
        for number, dtype in enumerate(DTYPES):
            full = patterns(dtype, columns=2)[: -3 if number % 3 else None]
            weight = nn.Parameter(laid(full.clone(), line, [S(0)]), requires_grad=False)
            module: Any = bag(w=weight)
            judged(module)
            for name, saved in {
                "whole": full,
                "by rows": laid(full, line, [S(0)]),
                "by columns": laid(full, line, [S(1)]),
                "replicated": laid(full, line, [R]),
                "on another mesh": laid(full, seat.mesh(1, 2), [R, S(0)]),
            }.items():
                module.w.data.view(torch.uint8).fill_(0)
                module.load_state_dict({"w": saved})
                assert_same(module.w.detach(), cut(full, line, [S(0)]), f"{name}, {dtype}")


@pytest.mark.judges("tensor.parallel.fsdp._all_gather_dtensor")
class TestScattered:
    @pytest.mark.law("values")
    @pytest.mark.needs("functional gathers")
    @pytest.mark.world(4)
    def test_every_bit_of_a_strided_part(self, judged: Any, seat: Seat) -> None:
        """Where TP holds several stretches of a tensor each dtype must be gathered bit for bit."""
        root = seat.root()
        for dtype in DTYPES:
            full = patterns(dtype, columns=2)[:64]
            got = judged(laid(full, root, [S(1), SS(0, 2)]), root)
            assert_same(got, cut(full, root, [R, SS(0, 2)]), str(dtype))
