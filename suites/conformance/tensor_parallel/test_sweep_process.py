"""What a call to a function of `tensor.parallel` finds in its process, and what it leaves there."""

from __future__ import annotations

import gc
import random
import weakref
from typing import Any

import pytest
import torch

from conformance.kit import fsdp1
from conformance.kit.compare import assert_same, local
from conformance.kit.data import numbers
from conformance.kit.layouts import R
from conformance.kit.tp_kinds import Seat, laid
from conformance.kit.tp_process import CONTEXTS, changed, flags, process
from conformance.kit.tp_roads import Function, functions


def _state_stays(function: Function, judged: Any, seat: Seat) -> None:
    full = numbers(8, 4)
    for context, enter in CONTEXTS.items():
        for name, road in function.roads(full, seat):
            what = f"{name}, {context}"
            torch.rand(1, device="cpu")  # or a call that seeds would leave the seed's state
            random.random()
            inputs = {key: flags(tensor) for key, tensor in road.inputs.items()}
            with enter():
                before = process()
                got = road.call(judged)
                assert not changed(before, process()), f"{what}: {changed(before, process())}"
            for key, tensor in road.inputs.items():
                found = changed(inputs[key], flags(tensor))
                assert not found, f"{what}: the {found} of the input {key} changed"
            try:
                road.check(got, full)
            except AssertionError as error:
                raise AssertionError(f"{what}: {error}") from None


def _nothing_is_kept(function: Function, judged: Any, seat: Seat) -> None:
    todo = list(function.roads(numbers(8, 4), seat))
    while todo:
        name, road = todo.pop()
        held = [weakref.ref(t) for t in road.inputs.values()]
        held += [weakref.ref(local(t)) for t in road.inputs.values()]
        got = road.call(judged)
        road.check(got, numbers(8, 4))
        held += [weakref.ref(t) for t in _tensors(got)]
        del road, got
        gc.collect()
        kept = [tuple(t.shape) for ref in held if (t := ref()) is not None]
        assert not kept, f"{name}: tensors of the shapes {kept} are held after the call"


def _tensors(got: Any) -> list[torch.Tensor]:
    found = got if isinstance(got, (tuple, list)) else [got]
    return [t for t in found if isinstance(t, torch.Tensor)]


@pytest.mark.judges("tensor.parallel.fsdp._chunk_dtensor")
class TestChunksApart:
    @pytest.mark.law("isolation")
    @pytest.mark.world(4)
    def test_what_is_left_whole(self, judged: Any, seat: Seat) -> None:
        """Training must not change what was chunked, also where nothing could be cut."""
        root = seat.root()
        tp = fsdp1.tp_mesh(root)
        for shape in ((), (1,), (1, 1), (2, 1), (3, 5)):
            full = numbers(*shape)
            for leaf in (full.clone(), laid(full, tp, [R])):
                got = judged(leaf, fsdp1.fsdp_rank(root), fsdp1.fsdp_mesh(root))
                kept = local(got).clone()
                local(leaf).add_(1)
                assert_same(local(got), kept, f"{shape} of a {type(leaf).__name__}")


class TestProcess:
    @pytest.mark.law("isolation")
    @functions(2)
    def test_the_process_and_the_inputs_stay(
        self, function: Function, judged: Any, seat: Seat
    ) -> None:
        """In any of the caller's modes a call must be right, change no state and keep nothing."""
        _state_stays(function, judged, seat)
        _nothing_is_kept(function, judged, seat)

    @pytest.mark.law("isolation")
    @functions(4)
    def test_the_process_and_what_is_cut_stay(
        self, function: Function, judged: Any, seat: Seat
    ) -> None:
        """In any of the caller's modes a call must be right, change no state and keep nothing."""
        _state_stays(function, judged, seat)
        _nothing_is_kept(function, judged, seat)
