"""Every bit pattern that tells, through every function of `tensor.parallel`, in every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conformance.kit.compare import assert_same, assert_type
from conformance.kit.data import DTYPES, numbers
from conformance.kit.tp_kinds import Seat, laid, trainable
from conformance.kit.tp_roads import Function, functions
from conformance.kit.tp_values import patterns


def _moves(function: Function) -> bool:
    return function.moves


def _arrives(function: Function, judged: Any, seat: Seat) -> None:
    for number, dtype in enumerate(DTYPES):
        full = patterns(dtype)[: -3 if number % 3 else None]  # uneven shards, too
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
            grads = patterns(dtype)[:-3]
            full = numbers(*grads.shape, dtype=dtype)
            for kind, piece, whole in function.trains(judged, full, seat):
                assert kind.placements is not None
                torch.autograd.backward(whole, laid(grads, kind.mesh, kind.placements))
                what = f"{kind.name}, {dtype}"
                assert_type(piece.grad, torch.Tensor, what)
                assert_same(piece.grad, kind.local(grads), what)
