"""Leaves of several meshes and kinds in one dict, in another order on each rank.

Ranks that enter collectives in the order of their own dict wait for each other in a circle, or
take each other's bytes. So order must come from what all of them know.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Partial

from conformance.kit.compare import assert_same
from conformance.kit.data import SOME_DTYPES, numbers
from conformance.kit.landing import assert_landed, target
from conformance.kit.layouts import R, S, dtensor, rows, sharded_tensor


def _turned(value: dict[str, Any], rank: int) -> dict[str, Any]:
    """The same entries in an order of this rank's own."""
    keys = sorted(value, reverse=rank % 2 == 1)
    return {key: value[key] for key in (*keys[rank:], *keys[:rank])}


def _pending(mesh: Any, op: str, salt: int) -> DTensor:
    return DTensor.from_local(numbers(4, 3, salt=salt), mesh, [Partial(op)], run_check=False)


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherInOneOrder:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(4, collective=8, limit=25)
    @pytest.mark.parametrize("ranks_only", [(), (1,)], ids=["all", "one"])
    @pytest.mark.thorough(but=["all"])
    def test_kinds_of_leaves(
        self, judged: Any, mesh: Any, rank: int, ranks_only: tuple[int, ...]
    ) -> None:
        """Leaves of every kind must be right, though each rank's dict has an order of its own."""
        line, grid = mesh(4), mesh(2, 2)
        fulls = {name: numbers(5, 4, salt=n) for n, name in enumerate("abcdefghijk")}
        made: dict[str, Any] = {
            "a": dtensor(fulls["a"], line, [S(0)]),
            "b": dtensor(fulls["b"], grid, [S(0), S(1)]),
            "c": dtensor(fulls["c"], grid, [R, S(1)]),
            "d": dtensor(fulls["d"], grid, [S(0), R]),
            "e": sharded_tensor(fulls["e"], rows((5, 4), [2, 0, 1, 2])),
            "f": dtensor(fulls["f"], grid["tp"], [S(0)]),
            "g": dtensor(fulls["g"], grid["dp"], [S(1)]),
            "h": dtensor(fulls["h"], line, [S(1)]),
            "i": dtensor(fulls["i"], line, [S(0)]),
            "j": dtensor(fulls["j"], line, [S(0)]),
            "k": dtensor(fulls["k"], grid["tp"], [S(0)]),
            "sum": _pending(line, "sum", 1),
            "max": _pending(line, "max", 2),
        }
        got = judged(_turned(made, rank), ranks_only=ranks_only)
        if ranks_only and rank not in ranks_only:
            assert got == {}, f"rank {rank} is not in {ranks_only} and got {list(got)}"
            return
        fulls["sum"] = numbers(4, 3, salt=1) * 4
        fulls["max"] = numbers(4, 3, salt=2)
        for name, full in fulls.items():
            assert_same(got[name], full, name)

    @pytest.mark.law("group")
    @pytest.mark.world(3, collective=8, limit=25)
    @pytest.mark.parametrize("kind", ["sharded", "pending"])
    @pytest.mark.thorough(but=["pending"])
    def test_meshes_in_a_circle(self, judged: Any, mesh: Any, rank: int, kind: str) -> None:
        """Of three meshes of two ranks each, no rank must wait for one that waits for it."""
        pairs = [(0, 1), (1, 2), (0, 2)]
        meshes = {pair: mesh(2, ranks=list(pair)) for pair in pairs}
        # Each rank comes first to a mesh whose other rank comes first to another one.
        first = {0: (0, 2), 1: (0, 1), 2: (1, 2)}[rank]
        mine = sorted((pair for pair in pairs if rank in pair), key=lambda pair: pair != first)
        value: dict[str, Any] = {}
        fulls: dict[str, torch.Tensor] = {}
        for pair in mine:
            name, full = f"w{pair}", numbers(5, 3, salt=sum(pair))
            if kind == "sharded":
                value[name] = dtensor(full, meshes[pair], [S(0)])
                fulls[name] = full
            else:
                part = numbers(4, 3, salt=sum(pair))
                value[name] = DTensor.from_local(part, meshes[pair], [Partial()], run_check=False)
                fulls[name] = part * 2
        got = judged(value)
        for name, full in fulls.items():
            assert_same(got[name], full, name)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(3, collective=8, limit=25)
    def test_dtypes(self, judged: Any, mesh: Any, rank: int) -> None:
        """Leaves of several dtypes and shapes must be right in any order of the ranks' dicts."""
        fulls = {
            f"{dtype}.{n}": numbers(3 + n, 2, dtype=dtype, salt=n)
            for dtype in SOME_DTYPES
            for n in range(3)
        }
        made = {name: dtensor(full, mesh(3), [S(0)]) for name, full in fulls.items()}
        got = judged(_turned(made, rank))
        for name, full in fulls.items():
            assert_same(got[name], full, name)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=25)
    def test_containers_in_another_order(self, judged: Any, mesh: Any, rank: int) -> None:
        """Containers whose keys stand in another order on each rank must hold the right leaves."""
        fulls = [numbers(4, 3, salt=n) for n in range(4)]
        leaves = [dtensor(full, mesh(2), [S(0)]) for full in fulls]
        value: dict[Any, Any] = {"x": {"a": leaves[0], 1: leaves[1]}, 2: [leaves[2], leaves[3]]}
        if rank == 1:
            value = {2: value[2], "x": {1: leaves[1], "a": leaves[0]}}
        got = judged(value)
        found = [got["x"]["a"], got["x"][1], *got[2]]
        for n, (one, full) in enumerate(zip(found, fulls, strict=True)):
            assert_same(one, full, f"leaf {n}")

    @pytest.mark.law("group")
    @pytest.mark.world(2, collective=8, limit=25)
    @pytest.mark.parametrize("empty", [0, 1])
    def test_nothing_on_one_rank(self, judged: Any, rank: int, empty: int) -> None:
        """A rank with an empty dict, and one with plain leaves, must both come back, with `pg`."""
        value = {} if rank == empty else {"w": numbers(3)}
        got = judged(value, pg=torch.distributed.group.WORLD)
        assert list(got) == list(value), f"keys {list(got)}, expected {list(value)}"


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastInOneOrder:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(4, collective=8, limit=25)
    def test_kinds_of_targets(
        self, judged: Any, mesh: Any, rank: int, device: torch.device
    ) -> None:
        """Targets of every kind must be right, though each rank's dict has an order of its own."""
        line, grid = mesh(4), mesh(2, 2)
        places: dict[str, tuple[Any, list[Any]]] = {
            "a": (line, [S(0)]),
            "b": (grid, [S(0), S(1)]),
            "c": (grid, [R, S(1)]),
            "d": (grid["tp"], [S(0)]),
            "e": (grid["dp"], [S(1)]),
            "f": (line, [R]),
        }
        fulls = {name: numbers(5, 4, salt=n) for n, name in enumerate([*places, "g", "step"])}
        fulls["step"] = numbers(salt=3)
        local: dict[str, Any] = {n: target(fulls[n], *place) for n, place in places.items()}
        local.update(g=numbers(5, 4, salt=9), step=numbers(), lr=0.0)
        local = _turned(local, rank)
        keys = list(local)
        source = {**dict(reversed(fulls.items())), "lr": 0.5} if rank == 0 else {}
        judged(source, local, device)
        assert list(local) == keys, f"keys {list(local)}, expected {keys} as before"
        for name, place in places.items():
            assert_landed(local[name], fulls[name], *place, name)
        assert_same(local["g"], fulls["g"], "g")
        assert_same(local["step"].cpu(), fulls["step"].cpu(), "step")
        assert local["lr"] == 0.5, f"lr is {local['lr']}"

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=25)
    @pytest.mark.parametrize("empty", [0, 1])
    @pytest.mark.thorough(but=["1"])
    def test_nothing_on_one_rank(
        self, judged: Any, rank: int, device: torch.device, empty: int
    ) -> None:
        """A rank whose local dict is empty must come back, and the other has its values."""
        full = numbers(4)
        local = {} if rank == empty else {"w": numbers(4, salt=1)}
        judged({"w": full, "x": 1} if rank == 0 else {}, local, device)
        if rank == empty:
            assert local == {}, f"keys {list(local)} were added"
        else:
            assert_same(local["w"], full)
