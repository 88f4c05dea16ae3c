"""Which ranks get a result: `ranks_only` in all the ways in which it can be given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from conformance.kit.agree import assert_raises_everywhere
from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.groups import UNSORTED, group
from conformance.kit.layouts import R, S, dtensor
from conformance.kit.refusals import refused


def _value(mesh: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    fulls = {name: numbers(5, 3, salt=n) for n, name in enumerate(("rows", "whole", "plain"))}
    value = {
        "rows": dtensor(fulls["rows"], mesh, [S(0)]),
        "whole": dtensor(fulls["whole"], mesh, [R]),
        "plain": fulls["plain"].clone(),
    }
    return value, fulls


def _assert_given(got: Any, fulls: dict[str, torch.Tensor], wanted: bool, rank: int) -> None:
    if not wanted:
        assert got == {}, f"rank {rank} was not asked for and got {list(got)}"
        return
    assert list(got) == list(fulls), f"rank {rank}: keys {list(got)}, expected {list(fulls)}"
    for name, full in fulls.items():
        assert_same(got[name], full, f"rank {rank}: {name}")


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherRanksOnly:
    @pytest.mark.law("group")
    @pytest.mark.world(3, collective=8, limit=25)
    @pytest.mark.parametrize("wanted", [(1, 1), (2, 0, 2), (2, 1, 0), (0, 7)], ids=str)
    @pytest.mark.thorough(but=["(2, 0, 2)", "(0, 7)"])
    def test_repeated_unordered_or_of_others(
        self, judged: Any, mesh: Any, rank: int, wanted: tuple[int, ...]
    ) -> None:
        """A rank named twice, in any order, or beside a stranger must get the result once."""
        value, fulls = _value(mesh(3))
        for options in {}, {"pg": dist.group.WORLD}:
            got = judged(value, ranks_only=wanted, **options)
            _assert_given(got, fulls, rank in wanted, rank)

    @pytest.mark.law("compatibility")
    @pytest.mark.world(3, collective=8, limit=25)
    @pytest.mark.parametrize("kind", ["list", "set", "range", "torch.Size"])
    @pytest.mark.thorough(but=["set", "torch.Size"])
    def test_any_collection(self, judged: Any, mesh: Any, rank: int, kind: str) -> None:
        """Any collection of ranks must do, as it does for upstream's function."""
        collection: Any = {
            "list": [0, 2],
            "set": {0, 2},
            "range": range(0, 3, 2),
            "torch.Size": torch.Size([0, 2]),
        }[kind]
        value, fulls = _value(mesh(3))
        _assert_given(judged(value, ranks_only=collection), fulls, rank in (0, 2), rank)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=25)
    @pytest.mark.parametrize("wanted", [(2,), (-1,), (5, 7)], ids=str)
    @pytest.mark.parametrize("given", ["with-pg", "without"])
    @pytest.mark.thorough(but=["with-pg-(2,)", "with-pg-(-1,)", "without-(5, 7)"])
    def test_a_rank_that_is_none(
        self, judged: Any, mesh: Any, world: Any, wanted: tuple[int, ...], given: str
    ) -> None:
        """A number that is no rank of the group must be refused everywhere, naming it."""
        value, _ = _value(mesh(2))
        options = {"pg": dist.group.WORLD} if given == "with-pg" else {}
        assert_raises_everywhere(
            world, lambda: judged(value, ranks_only=wanted, **options), "ranks_only"
        )

    @pytest.mark.law("group")
    @pytest.mark.world(4, collective=8, limit=25)
    @pytest.mark.parametrize("members", [(1, 3), pytest.param((3, 1), marks=UNSORTED)], ids=str)
    @pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)], ids=str)
    @pytest.mark.parametrize("kind", ["rows", "plain"])
    @pytest.mark.thorough(
        but=["rows-(0,)-(3, 1)", "rows-(0, 1)-(1, 3)", "plain-(1,)-(3, 1)", "plain-(0, 1)-(3, 1)"]
    )
    def test_numbers_of_the_group(
        self,
        judged: Any,
        mesh: Any,
        rank: int,
        members: tuple[int, int],
        wanted: tuple[int, ...],
        kind: str,
    ) -> None:
        """With `pg` its numbers count, of distributed leaves and where there are none."""
        some, line = group(*members), mesh(2, ranks=[1, 3])
        if rank not in members:
            return
        value, fulls = _value(line)
        for numbered in wanted, (*wanted, 3):  # the group has no rank 3, though the world has
            got = judged({kind: value[kind]}, pg=some, ranks_only=numbered)
            _assert_given(got, {kind: fulls[kind]}, members.index(rank) in wanted, rank)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(4, collective=8, limit=25)
    def test_a_rank_of_the_world_that_is_none_of_the_group(
        self, judged: Any, mesh: Any, rank: int
    ) -> None:
        """A number that only the world has must be refused by each rank of the group."""
        some, line = group(1, 3), mesh(2, ranks=[1, 3])
        if rank in (1, 3):
            value, _ = _value(line)
            refused(lambda: judged(value, pg=some, ranks_only=(3,)), "ranks_only")


@pytest.mark.judges("_state_dict_utils._offload_state_dict_to_cpu")
class TestOffloadRanksOnly:
    @pytest.mark.law("group")
    @pytest.mark.world(3)
    @pytest.mark.parametrize("wanted", [(), (0,), (2, 2), (1, 0)], ids=str)
    @pytest.mark.thorough(but=["()", "(1, 0)"])
    def test_only_those_ranks(self, judged: Any, rank: int, wanted: tuple[int, ...]) -> None:
        """The ranks of `ranks_only` must get the snapshot, the others `{}`; empty means all."""
        full = numbers(3)
        value = {"w": full, "n": 1}
        got = judged(value, ranks_only=wanted)
        if wanted and rank not in wanted:
            assert got == {}, f"rank {rank} is not in {wanted} and got {list(got)}"
        else:
            assert_same(got["w"], full)
            assert got["n"] == 1, f"n is {got['n']}"


@pytest.mark.judges("_state_dict_utils._iterate_state_dict")
class TestIterateRanksOnly:
    @pytest.mark.law("group")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("members", [(1, 3), pytest.param((3, 1), marks=UNSORTED)], ids=str)
    def test_numbers_of_the_group(self, judged: Any, rank: int, members: tuple[int, int]) -> None:
        """With `pg` the ranks of `ranks_only` must be that group's own numbers."""
        some = group(*members)
        if rank not in members:
            return
        functions = [lambda tensor, *_: tensor] * 3
        for wanted in (1,), (1, 3), (1, 7):  # 3 and 7 are no ranks of the group
            got = judged({"w": numbers(3)}, *functions, pg=some, ranks_only=wanted)
            if rank == members[1]:
                assert_same(got["w"], numbers(3))
            else:
                assert got == {}, f"{wanted}: global rank {rank} got {got}"

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_what_the_others_get(self, judged: Any, rank: int) -> None:
        """The others must get `{}` in the place of a dict, and None in that of anything else."""
        functions = [lambda tensor, *_: tensor] * 3
        for value in ([numbers(3)], (numbers(3), 1), numbers(3), 3, "text", {"w": numbers(3)}, {}):
            got = judged(value, *functions, ranks_only=(0,))
            if rank == 1:
                expected: Any = {} if isinstance(value, dict) else None
                assert got == expected, f"{got} in the place of a {type(value).__name__}"
            else:
                assert type(got) is type(value), f"rank 0 got {got}"

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2)
    def test_the_functions_run_everywhere(self, judged: Any, rank: int) -> None:
        """A function may communicate: it must be called on every rank, whoever gets the result."""
        seen: list[Any] = []

        def note(tensor: Any, *_: Any) -> Any:
            seen.append(tensor)
            return tensor

        judged({"w": numbers(3)}, note, note, note, ranks_only=(0,))
        assert len(seen) == 1, f"rank {rank}: called {len(seen)} times"
