"""Who gets the tensors of a model that lies on none of the ranks that `ranks_only` names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conformance.kit.agree import exchange
from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.groups import group
from conformance.kit.layouts import R, S, dtensor, rows, sharded_tensor
from conformance.kit.refusals import attempt

# Shape of the mesh, its ranks, and placements.
_LINES: list[tuple[tuple[int, ...], list[int], list[Any]]] = [
    ((4,), [2, 0, 3, 1], [S(0)]),
    ((2, 2), [0, 1, 2, 3], [S(0), S(1)]),
    ((2, 2), [3, 1, 2, 0], [S(1), S(0)]),
    ((2, 2), [0, 1, 3, 2], [S(0), S(1)]),
    ((2, 2), [0, 3, 2, 1], [R, S(0)]),
    ((2, 2), [1, 0, 3, 2], [R, S(0)]),
    ((2, 2), [2, 3, 0, 1], [S(0), R]),
]
_TAKERS = [(0,), (1,), (2,), (3,), (1, 2), (3, 0)]


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherOtherTakers:
    @pytest.mark.law("group")
    @pytest.mark.world(4, collective=8, limit=25)
    def test_each_rank_of_each_mesh(self, judged: Any, mesh: Any, world: Any) -> None:
        """Whoever takes, and however the mesh orders its ranks, each taker must get all."""
        value, fulls = {}, {}
        for number, (shape, ranks, placements) in enumerate(_LINES):
            for name, size in (("w", (8, 4)), ("uneven", (5, 3))):
                key = f"{name} {number}"
                fulls[key] = numbers(*size, salt=number)
                value[key] = dtensor(fulls[key], mesh(*shape, ranks=ranks), placements)
        for takers in _TAKERS:
            for key, leaf in [*value.items(), ("all", None)]:
                got = judged(value if leaf is None else {key: leaf}, ranks_only=takers)
                wanted = fulls if leaf is None else {key: fulls[key]}
                assert list(got) == (list(wanted) if world.rank in takers else []), f"{takers}"
                for name in got:
                    assert_same(got[name], wanted[name], f"{name} for {takers}")

    @pytest.mark.law("group")
    @pytest.mark.world(4, collective=8, limit=25)
    def test_each_rank_of_each_group(self, judged: Any, mesh: Any, world: Any) -> None:
        """Takers count in the numbering of the group, whichever ranks it has."""
        for ranks in ([0, 2], [1, 3], [0, 1], [0, 2, 3]):
            group = torch.distributed.new_group(ranks)
            line = mesh(len(ranks), ranks=ranks)
            if world.rank not in ranks:
                continue
            for number, taker in enumerate(ranks):
                full = numbers(5, 3, salt=number)
                value = {"w": dtensor(full, line, [S(0)]), "v": numbers(3)}
                got = judged(value, pg=group, ranks_only=(number,))
                wanted = ["w", "v"] if world.rank == taker else []
                assert list(got) == wanted, f"{number} of {ranks}: {list(got)}"
                if got:
                    assert_same(got["w"], full, f"{number} of {ranks}")

    @pytest.mark.law("cost")
    @pytest.mark.world(4, collective=8, limit=25)
    def test_no_more_than_one_rank_has_them(self, judged: Any, mesh: Any, world: Any) -> None:
        """A model on ranks 2 and 3 that is gathered for one rank must be whole on no more."""
        half, some = mesh(2, ranks=[2, 3]), group(2, 3)
        full = numbers(4, 4)
        placements: list[Any] = [S(0), R, "shards"]
        for placement in placements:
            value: dict[str, Any] = {}
            if world.rank >= 2 and placement == "shards":
                value = {"w": sharded_tensor(full, rows(full.shape, [2, 2]), some)}
            elif world.rank >= 2:
                value = {"w": dtensor(full, half, [placement])}
            got: list[Any] = []
            attempt(lambda: got.append(judged(value, ranks_only=(0,))))  # noqa: B023
            told = exchange(world, got not in ([], [{}]), f"outcome of {placement}")
            takers = [rank for rank, has in enumerate(told) if has]
            assert takers in ([], [2]), (
                f"{placement}: on ranks {takers}, expected the first at most"
            )
