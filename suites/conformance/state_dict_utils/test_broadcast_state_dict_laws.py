"""_broadcast_state_dict, how it goes about it: isolation, symmetry, group, autograd, cost."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from conformance.kit.agree import assert_raises_everywhere
from conformance.kit.collectives import Collectives
from conformance.kit.compare import assert_same, fingerprint
from conformance.kit.data import numbers
from conformance.kit.groups import UNSORTED, group
from conformance.kit.landing import assert_landed, blank, target
from conformance.kit.layouts import R, S
from conformance.kit.levels import BYTES, COUNT
from conformance.kit.nested import assert_apart, spoil
from conformance.kit.refusals import MISFIT, MISSING

ROOM = 64 * 1024
"""Bytes that the ranks may spend on agreeing, whatever the size of the tensors."""
PLACES = {"rows": S(0), "columns": S(1), "whole": R}


def _full(device: torch.device, salt: int = 0) -> dict[str, Any]:
    """A tensor for each target that `_targets` makes, and two values that need no collective."""
    names = (*PLACES, "plain")
    full: dict[str, Any] = {k: numbers(5, 3, salt=i + salt) for i, k in enumerate(names)}
    return {k: v.to(device) for k, v in full.items()} | {"step": numbers(salt=7), "n": 3}


def _targets(full: dict[str, Any], line: Any, meta: bool = False) -> dict[str, Any]:
    made: dict[str, Any] = {k: target(full[k], line, [p], meta=meta) for k, p in PLACES.items()}
    return made | {"plain": blank(full["plain"]), "step": blank(full["step"]), "n": 0}


def _assert_all_landed(mine: dict[str, Any], full: dict[str, Any], line: Any, what: str) -> None:
    for key, place in PLACES.items():
        assert_landed(mine[key], full[key], line, [place], f"{what}: {key}")
    for key in ("plain", "step"):
        assert_same(mine[key], full[key], f"{what}: {key}")
    assert mine["n"] == full["n"], f"{what}: n"


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastStateDictIsolation:
    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("offload", [True, False], ids=["offload", "stay"])
    @pytest.mark.thorough(but=["w1-stay", "w2-offload"])
    def test_the_full_dict_is_only_read(
        self, judged: Any, mesh: Any, world: Any, device: torch.device, offload: bool
    ) -> None:
        """The full dict stays as it is, on the source and elsewhere, and a second load is right."""
        line = mesh(world.size)
        full = _full(device)
        given = full if world.rank == 0 else {"rows": numbers(2), "stray": "text"}
        before = fingerprint(given)
        for what in ("first load", "second load"):
            mine = _targets(full, line)
            judged(given, mine, device, cpu_offload=offload)
            assert fingerprint(given) == before, f"{what}: the full dict has changed"
            _assert_all_landed(mine, full, line, what)

    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("meta", [False, True], ids=["real", "meta"])
    @pytest.mark.thorough(but=["w2-meta"])
    def test_the_full_dict_lends_no_memory(
        self, judged: Any, mesh: Any, world: Any, device: torch.device, meta: bool
    ) -> None:
        """What lands is not in memory of the full dict, on the source either."""
        line = mesh(world.size)
        for offload in (False, True):
            full = _full(device)
            mine = _targets(full, line, meta)
            judged(full if world.rank == 0 else {}, mine, device, cpu_offload=offload)
            assert_apart(mine, full, f"{offload=}")
            spoil(full)
            _assert_all_landed(mine, _full(device), line, f"{offload=}, after the source changed")

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_other_values_land_in_what_a_first_call_left(
        self, judged: Any, mesh: Any, rank: int, device: torch.device
    ) -> None:
        """A local dict that a first call has filled takes the values of a second."""
        line = mesh(2)
        mine = _targets(_full(device), line)
        for salt in (0, 4):
            full = _full(device, salt)
            judged(full if rank == 0 else {}, mine, device)
            _assert_all_landed(mine, full, line, f"salt {salt}")


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastStateDictSymmetry:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=25)
    @pytest.mark.parametrize("kind", ["DTensor", "unpicklable"])
    def test_a_source_value_that_cannot_be_sent(
        self, judged: Any, mesh: Any, world: Any, device: torch.device, kind: str
    ) -> None:
        """A sharded or unpicklable value on the source raises the same on every rank, naming it."""
        odd: Any = (lambda: 1) if kind == "unpicklable" else target(numbers(4, 3), mesh(2), [S(0)])
        full = {"fine": numbers(4, 3, device=device), "layer.odd": odd}
        mine: dict[str, Any] = {"fine": blank(full["fine"]), "layer.odd": numbers(4, 3)}
        before = fingerprint(mine)
        assert_raises_everywhere(
            world, lambda: judged(full if world.rank == 0 else {}, mine, device), "layer.odd"
        )
        assert fingerprint(mine) == before, "the local dict has changed"

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=25)
    @pytest.mark.parametrize("where", ["one rank", "every rank"])
    def test_a_target_of_another_shape(
        self, judged: Any, mesh: Any, world: Any, device: torch.device, where: str
    ) -> None:
        """A DTensor target of another shape raises the same everywhere, by name; nothing lands."""
        line = mesh(2)
        full = {k: numbers(4, 3, device=device) for k in ("fine", "rows", "layer.odd")}
        odd = where == "every rank" or world.rank == 1
        mine: dict[str, Any] = {
            "fine": blank(full["fine"]),
            "rows": target(full["rows"], line, [S(0)]),
            "layer.odd": target(numbers(8 if odd else 4, 3, device=device), line, [S(0)]),
        }
        before = fingerprint(mine)
        assert_raises_everywhere(
            world, lambda: judged(full if world.rank == 0 else {}, mine, device), "layer.odd"
        )
        assert fingerprint(mine) == before, "the local dict has changed"

    @pytest.mark.law("all-or-nothing")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
    @pytest.mark.thorough(but=["strict"])
    def test_an_error_leaves_all_as_it_was(
        self, judged: Any, mesh: Any, world: Any, device: torch.device, strict: bool
    ) -> None:
        """After an error every entry of the local dict is the one it was, with its values."""
        line = mesh(2)
        full = _full(device) | {"odd": numbers(7, device=device)}
        mine = _targets(full, line) | {"odd": target(numbers(4), line, [S(0)]), "own": 1}
        before = fingerprint(mine)
        assert_raises_everywhere(
            world,
            lambda: judged(full if world.rank == 0 else {}, mine, device, strict=strict),
            re.compile(r"\bodd\b" if not strict else r"\b(odd|own)\b"),
            kinds=MISSING if strict else MISFIT,
            name="error",
        )
        assert fingerprint(mine) == before, "the local dict has changed"


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastStateDictGroup:
    @pytest.mark.law("group")
    @pytest.mark.world(4)
    @pytest.mark.parametrize(
        "members", [(0, 2), (1, 2), (2, 3), pytest.param((3, 1), marks=UNSORTED)], ids=str
    )
    @pytest.mark.thorough(but=["(3, 1)"])
    def test_the_groups_first_rank_is_the_source(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, members: tuple[int, int]
    ) -> None:
        """The first rank of `pg`, in its own numbers, is the source; no other rank is needed."""
        some, line = group(*members), mesh(2, ranks=sorted(members))
        if rank not in members:
            return
        full = _full(device)
        mine = _targets(full, line)
        judged(full if rank == members[0] else _full(device, 5), mine, device, some)
        _assert_all_landed(mine, full, line, f"group {members}")

    @pytest.mark.law("group")
    @pytest.mark.world(3)
    def test_targets_on_a_part_of_the_group(
        self, judged: Any, mesh: Any, rank: int, device: torch.device
    ) -> None:
        """Targets whose mesh the source is not in still get their parts."""
        line = mesh(2, ranks=[1, 2])
        full = numbers(5, 3, device=device)
        mine = {} if rank == 0 else {"w": target(full, line, [S(0)])}
        judged({"w": full} if rank == 0 else {}, mine, device)
        if rank == 0:
            assert mine == {}, f"keys {list(mine)}"
        else:
            assert_landed(mine["w"], full, line, [S(0)], "w")

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    def test_a_mesh_in_another_rank_order(
        self, judged: Any, mesh: Any, rank: int, device: torch.device
    ) -> None:
        """On a mesh of unsorted ranks each gets the part that full_tensor() reads there."""
        turned = mesh(4, ranks=[3, 1, 0, 2])
        full = numbers(9, 3, device=device)
        mine = {"w": target(full, turned, [S(0)])}
        judged({"w": full} if rank == 0 else {}, mine, device)
        assert_landed(mine["w"], full, turned, [S(0)], "w")


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastStateDictAutograd:
    @pytest.mark.law("autograd")
    @pytest.mark.world(2)
    def test_no_graph_is_kept(
        self, judged: Any, mesh: Any, rank: int, device: torch.device
    ) -> None:
        """Trained tensors on both sides, outside `no_grad`, take the values and leave no graph."""
        line = mesh(2)
        full = {k: numbers(5, 3, device=device).requires_grad_() for k in ("w", "p")}
        mine: dict[str, Any] = {
            "p": nn.Parameter(blank(full["p"].detach())),
            "w": nn.Parameter(target(full["w"], line, [S(0)])),
        }
        judged(full if rank == 0 else {}, mine, device)
        for key, value in mine.items():
            assert value.grad_fn is None, f"{key} keeps {value.grad_fn}"
        assert_landed(mine["w"], full["w"].detach(), line, [S(0)], "w")
        assert_same(mine["p"], full["p"].detach(), "p")


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastStateDictCost:
    @pytest.mark.law("cost")
    @pytest.mark.should(COUNT)
    @pytest.mark.world(4)
    @pytest.mark.parametrize("kind", ["plain", "1-D", "2-D", "dtypes", "0-dim"])
    @pytest.mark.thorough(but=["plain"])
    def test_collectives_do_not_grow_with_the_tensors(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, kind: str
    ) -> None:
        """Forty tensors need as many collectives as four."""
        dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.bool]
        makers: dict[str, Callable[[torch.Tensor], Any]] = {
            "plain": blank,
            "0-dim": blank,
            "1-D": lambda t: target(t, mesh(4), [S(0)]),
            "2-D": lambda t: target(t, mesh(2, 2), [S(0), S(1)]),
            "dtypes": lambda t: target(t, mesh(4), [S(0)]),
        }
        counts = []
        for number in (4, 40):
            shape = () if kind == "0-dim" else (8, 2)
            full = {
                f"k{i}": numbers(*shape, dtype=dtypes[i % 4 if kind == "dtypes" else 0])
                for i in range(number)
            }
            mine = {k: makers[kind](t.to(device)) for k, t in full.items()}
            with Collectives() as seen:
                judged(full if rank == 0 else {}, mine, device)
            counts.append(seen.count)
        assert counts[0] == counts[1] > 0, f"collectives for 4 and for 40 tensors: {counts}"

    @pytest.mark.law("cost")
    @pytest.mark.should(BYTES)
    @pytest.mark.world(4)
    @pytest.mark.parametrize("meta", [False, True], ids=["real", "meta"])
    @pytest.mark.thorough(but=["real"])
    def test_a_rank_does_not_receive_the_parts_of_others(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, meta: bool
    ) -> None:
        """A rank that holds a quarter is handed less than half of the tensor."""
        full = numbers(512, 512, device=device)
        mine = {"w": target(full, mesh(4), [S(0)], meta=meta)}
        with Collectives() as seen:
            judged({"w": full} if rank == 0 else {}, mine, device)
        assert_landed(mine["w"], full, mesh(4), [S(0)], "w")
        # A quarter is its own; another would already be someone else's.
        if rank != 0:
            assert seen.bytes < full.nbytes // 2, f"{seen.bytes} bytes of {full.nbytes} moved"

    @pytest.mark.law("cost")
    @pytest.mark.should(BYTES)
    @pytest.mark.world(2)
    def test_keys_that_nobody_wants_do_not_travel(
        self, judged: Any, rank: int, device: torch.device
    ) -> None:
        """A tensor that is in no rank's local dict is not moved."""
        full = {"w": numbers(4, device=device), "big": numbers(512, 512, device=device)}
        mine = {"w": blank(full["w"])}
        with Collectives() as seen:
            judged(full if rank == 0 else {}, mine, device)
        assert_same(mine["w"], full["w"], "w")
        assert seen.bytes < ROOM, f"{seen.bytes} bytes moved"

    @pytest.mark.law("cost")
    @pytest.mark.should(BYTES)
    @pytest.mark.world(2)
    def test_tied_tensors_travel_once(self, judged: Any, rank: int, device: torch.device) -> None:
        """A tensor that the full dict holds under four names moves as many bytes as under one."""
        tensor = numbers(512, 256, device=device)
        moved = []
        for names in ("a", "abcd"):
            mine: dict[str, Any] = dict.fromkeys(names, torch.empty(512, 256, device="meta"))
            with Collectives() as seen:
                judged(dict.fromkeys(names, tensor) if rank == 0 else {}, mine, device)
            for name in names:
                assert_same(mine[name], tensor, name)
            moved.append(seen.bytes)
        assert moved[1] < moved[0] + ROOM, f"bytes under one name and under four: {moved}"
