"""Calls one after the other, and other work meanwhile: what was right once must stay right."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from conformance.kit import fsdp1
from conformance.kit.compare import assert_same, local
from conformance.kit.data import numbers
from conformance.kit.layouts import R, S, part
from conformance.kit.nested import storages
from conformance.kit.refusals import attempt
from conformance.kit.tensor_parallel import bag, fill, weight
from conformance.kit.tp_calls_fsdp import innermost
from conformance.kit.tp_calls_modules import Reader
from conformance.kit.tp_claims import REFUSED
from conformance.kit.tp_kinds import Seat, laid
from conformance.kit.tp_modules import Walk, sharded
from conformance.kit.tp_roads import Function, functions


def _moves(function: Function) -> bool:
    return function.moves


def _again_and_again(function: Function, judged: Any, seat: Seat) -> None:
    values = [numbers(8, 4, salt=salt) for salt in range(3)]
    turns = [list(function.roads(full, seat)) for full in values]
    for number, (name, road) in enumerate(turns[0]):
        if not road.inputs:
            continue
        results = []
        for full, turn in zip(values, turns, strict=True):
            with torch.no_grad():
                for key, tensor in road.inputs.items():
                    new = storages(turn[number][1].inputs[key])
                    for old, value in zip(storages(tensor), new, strict=True):
                        old.copy_(value)
            if function.name in REFUSED:
                attempt(lambda: next(iter(REFUSED[function.name](seat))).call(judged))
            results.append(road.call(judged))
            _check(road, results[-1], full, f"{name}, call {len(results)}")
        for call, (got, full) in enumerate(zip(results, values, strict=True), 1):
            if function.module:
                break  # its result is the module, which was looked at after each call
            expected = full if function.copies else values[-1]
            _check(road, got, expected, f"{name}, result {call} after call 3")


def _check(road: Any, got: Any, full: torch.Tensor, what: str) -> None:
    try:
        road.check(got, full)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


class TestSequence:
    @pytest.mark.law("isolation")
    @functions(2, _moves)
    def test_other_values_in_the_same_tensors(
        self, function: Function, judged: Any, seat: Seat
    ) -> None:
        """Each call must see what training has made of its tensors, refused calls in between."""
        _again_and_again(function, judged, seat)

    @pytest.mark.law("isolation")
    @functions(4, _moves)
    def test_chunks_of_other_values(self, function: Function, judged: Any, seat: Seat) -> None:
        """Each call must see what training has made of its tensors, refused calls in between."""
        _again_and_again(function, judged, seat)


def _pending(full: torch.Tensor, mesh: Any, late: bool, placements: Any) -> DTensor:
    """A DTensor that is still being gathered along its first dimension: a rank came late."""
    if late:
        time.sleep(1.0)
    before = laid(full, mesh, [S(0), *placements[1:]])
    return before.redistribute(placements=placements, async_op=True)


class TestPending:
    @pytest.mark.law("values")
    @pytest.mark.needs("functional gathers")
    @pytest.mark.world(2)
    @pytest.mark.judges("tensor.parallel.ddp._localize_dtensor")
    def test_localized(self, judged: Any, mesh: Any, rank: int) -> None:
        """A parameter that is still being gathered, from a late rank, must arrive whole."""
        full = numbers(4, 2)
        module = bag(w=nn.Parameter(_pending(full, mesh(2), rank == 1, [R])))
        judged(module)
        assert_same(module.w.detach(), full)

    @pytest.mark.law("values")
    @pytest.mark.needs("functional gathers")
    @pytest.mark.world(4)
    @pytest.mark.judges("tensor.parallel.fsdp._chunk_dtensor")
    def test_chunked(self, judged: Any, seat: Seat, rank: int) -> None:
        """A weight that is still being gathered, from a late rank, must be chunked whole."""
        root, full = seat.root(), numbers(8, 4)
        pending = _pending(full, fsdp1.tp_mesh(root), rank == 3, [R])
        got = judged(pending, fsdp1.fsdp_rank(root), fsdp1.fsdp_mesh(root))
        assert_same(local(got), part(full, root, [S(0), R]))

    @pytest.mark.law("values")
    @pytest.mark.needs("functional gathers")
    @pytest.mark.world(4)
    @pytest.mark.judges("tensor.parallel.fsdp._chunk_tensor")
    def test_chunked_as_sharded_tensor(self, judged: Any, seat: Seat, rank: int) -> None:
        """A weight that is still being gathered, from a late rank, must be chunked whole."""
        root, full = seat.root(), numbers(8, 4)
        pending = _pending(full, fsdp1.tp_mesh(root), rank == 3, [R])
        column = fsdp1.fsdp_mesh(root).get_group()
        got = judged(pending, column.rank(), 2, 0, column)
        assert_same(innermost(got), part(full, root, [S(0), R]))

    @pytest.mark.law("values")
    @pytest.mark.needs("functional gathers")
    @pytest.mark.world(4)
    @pytest.mark.judges("tensor.parallel.fsdp._all_gather_dtensor")
    def test_gathered(self, judged: Any, seat: Seat, rank: int) -> None:
        """Chunks that are still on their way, from a late rank, must be gathered whole."""
        root, full = seat.root(), numbers(8, 4)
        for placements in ([R, S(1)], [R, R]):
            pending = _pending(full, root, rank == 3, placements)
            assert_same(judged(pending, root), part(full, root, placements))
        if rank == 2:
            time.sleep(1.0)
        got = judged(laid(full, root, [S(0), S(1)]), root)
        assert_same(got, part(full, root, [R, S(1)]))


class Waits(Reader):
    """A forward that reads what it holds, waits until it is told, and reads it again."""

    def __init__(self, **entries: Any) -> None:
        super().__init__()
        fill(self, entries)
        self.entered, self.go_on = threading.Event(), threading.Event()

    def forward(self, waits: bool = False) -> Any:
        if waits:
            self.entered.set()
            assert self.go_on.wait(10), "nobody told it to go on"
        return {name: value for name, value in super().forward().items() if name != "b"}


@pytest.mark.judges("tensor.parallel.ddp._pre_dp_module_transform")
class TestThreads:
    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad], ids=["no grad", "grad"])
    @pytest.mark.thorough(but=["no grad"])
    def test_a_forward_in_another_thread(self, judged: Any, mesh: Any, mode: Any) -> None:
        """While one thread evaluates another must train, and save: each finds DTensors, exact."""
        line, full = mesh(2), numbers(4, 2)
        module = Waits(w=weight(full, line, [S(0)]), child=bag(v=weight(full, line, [R])))
        judged(module)
        mine, seen = module.w, []

        def evaluate() -> None:
            with mode():
                seen.append(module(waits=True))

        for turn in range(2):
            module.entered.clear()
            module.go_on.clear()
            seen.clear()
            thread = threading.Thread(target=evaluate)
            thread.start()
            assert module.entered.wait(10), "the other thread did not begin"
            inside = module()
            _assert_sharded(inside, full, f"turn {turn}, while another thread evaluates")
            saved = module.state_dict()
            _assert_sharded(saved, full, f"turn {turn}, saved while another thread evaluates")
            module.go_on.set()
            thread.join(10)
            assert seen, f"turn {turn}: the other thread failed"
            _assert_sharded(seen[0], full, f"turn {turn}, after the forward of another thread")
            assert sharded(module) == [], f"turn {turn}: {sharded(module)} stay DTensors"
            assert module.w is mine, f"turn {turn}: another Parameter"
            mine.grad = None
            sum(t.to_local().sum() for t in inside.values()).backward()
            assert mine.grad is not None, f"turn {turn}: no gradient"
            assert_same(mine.grad, torch.ones(2, 2), f"turn {turn}, gradient")

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_ties_where_a_rank_holds_nothing(self, judged: Any, mesh: Any) -> None:
        """Ties of every kind must hold on a rank whose part is empty, and gradients add up."""
        line, full = mesh(2), numbers(1, 2)
        tied = weight(full, line, [S(0)])
        twin = nn.Parameter(tied.data)
        module = Walk(bag(a=tied, b=bag(c=tied, twin=twin), d=nn.ParameterList([tied])))
        judged(module)
        names = ("tree.a", "tree.b.c", "tree.d.0")
        for turn in range(2):
            found = {path: module.get_parameter(path) for path in (*names, "tree.b.twin")}
            assert len({id(found[name]) for name in names}) == 1, f"turn {turn}: untied"
            assert found["tree.b.twin"] is not found["tree.a"], f"turn {turn}: tied to its twin"
            inside = dict(module())
            sum(inside[name].to_local().sum() for name in names).backward()
            expected = part(torch.full_like(full, 3.0 * (turn + 1)), line, [S(0)])
            assert_same(found["tree.a"].grad, expected, f"turn {turn}: gradient")
            assert found["tree.b.twin"].grad is None, f"turn {turn}: the twin has a gradient"


def _assert_sharded(held: Any, full: torch.Tensor, what: str) -> None:
    for name, value in held.items():
        assert isinstance(value, DTensor), f"{what}: {name} is a {type(value).__name__}"
        expected = part(full, value.device_mesh, value.placements)
        assert_same(local(value).detach(), expected, f"{what}: {name}")
