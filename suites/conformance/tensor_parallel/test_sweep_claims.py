"""What the functions of `tensor.parallel` must refuse: input whose claims its data contradict."""

from __future__ import annotations

import re
from typing import Any

import pytest

from conformance.kit.agree import assert_raises_everywhere, attempt, exchange
from conformance.kit.refusals import flaw
from conformance.kit.tp_claims import REFUSED, other_cut, together
from conformance.kit.tp_kinds import Seat
from conformance.kit.tp_process import changed, process
from conformance.kit.tp_roads import Function, functions


def _refuses(function: Function) -> bool:
    return function.name in REFUSED


def _refused_alone(function: Function, judged: Any, seat: Seat) -> None:
    """On all ranks, then on one while the others do nothing."""
    for turn in (None, 1):
        accepted = []
        for name, call, mentions, kinds in REFUSED[function.name](seat):
            if turn in (None, seat.world.rank):
                before = process()
                found = flaw(attempt(lambda c=call: c(judged)), mentions, kinds)  # type: ignore[misc]
                if found:
                    accepted.append(f"{name}: {found}")
                if left := changed(before, process()):
                    accepted.append(f"{name}: the call changed {left}")
        told = exchange(seat.world, accepted, f"turn-{turn}", patience=20)
        said = [f"rank {rank}: {text}" for rank, texts in enumerate(told) for text in texts]
        assert not said, f"{len(said)} calls: " + "\n".join(said[:20])


class TestClaims:
    @pytest.mark.law("symmetry")
    @functions(2, _refuses)
    def test_refused(self, function: Function, judged: Any, seat: Seat) -> None:
        """Input that contradicts itself must be refused by name, on all ranks and on one."""
        _refused_alone(function, judged, seat)

    @pytest.mark.law("symmetry")
    @functions(4, _refuses)
    def test_refused_to_be_cut(self, function: Function, judged: Any, seat: Seat) -> None:
        """Input that contradicts itself must be refused by name, on all ranks and on one."""
        _refused_alone(function, judged, seat)


@pytest.mark.judges("tensor.parallel.fsdp._all_gather_dtensor")
class TestTogether:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(4, collective=4, limit=30)
    @pytest.mark.parametrize("liars", [(1,), (0, 1, 2, 3)], ids=["one rank", "all"])
    def test_a_lie(self, judged: Any, seat: Seat, liars: Any) -> None:
        """A chunk that its placement contradicts must be refused on each rank that needs it."""
        root, rank = seat.root(), seat.world.rank
        for number, (name, good, lie) in enumerate(together(seat)):
            given = lie(good) if rank in liars else good
            error = attempt(lambda g=given: judged(g, root))  # type: ignore[misc]
            # Those with which the liar shares no gather need none of its values.
            concerned = rank in liars or (good.placements[0].is_shard() and rank % 2 == 1)
            found = flaw(error) if concerned else ""
            told = exchange(seat.world, found, f"case-{number}")
            assert not any(told), f"{name}: {told}"

    @pytest.mark.law("symmetry")
    @pytest.mark.world(4, collective=4, limit=30)
    def test_ranks_that_cut_otherwise(self, judged: Any, seat: Seat) -> None:
        """Ranks whose equally large chunks are cut otherwise must all refuse to mix them."""
        root, rank = seat.root(), seat.world.rank
        for number, (_, ours, theirs) in enumerate(other_cut(seat)):
            given = theirs if rank in (2, 3) else ours
            assert_raises_everywhere(
                seat.world,
                lambda g=given: judged(g, root),  # type: ignore[misc]
                re.compile("rank [23]"),
                name=f"cut-{number}",
            )
