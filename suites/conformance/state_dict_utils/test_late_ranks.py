"""Ranks that are late, leave early, or use their tensors again the moment that a call returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from conformance.kit.data import numbers
from conformance.kit.functions import Function, Place, each
from conformance.kit.lateness import Late
from conformance.kit.nested import spoil

_talking = each(lambda function: function.talks)
SIZE = (514, 4096)
"""Eight MiB: more than a connection holds of what was sent and not yet received."""


@contextmanager
def _late(really: bool, seconds: float) -> Iterator[None]:
    if really:
        with Late(seconds):
            yield
    else:
        yield


@pytest.mark.law("symmetry")
@pytest.mark.world(3, collective=15, limit=40)
@_talking
def test_a_rank_that_is_late_at_each_step(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device
) -> None:
    """Whichever rank comes late to each collective, all must get their tensors.

    Those that are through use the group for something else at once.
    """
    place = Place(world, mesh(3), subject, device)
    for late in range(3):
        call = function.each_kind(place, numbers(9, 4) + late, usual=True)
        with _late(world.rank == late, 0.03):
            got = call.run()
        mine = torch.full((3,), float(world.rank), device=device)
        dist.all_reduce(mine)
        assert mine.tolist() == [3.0] * 3, f"what follows the call got {mine.tolist()}"
        call.check(got)


@pytest.mark.law("isolation")
@pytest.mark.world(2, collective=15, limit=40)
@_talking
def test_shards_used_again_at_once(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device
) -> None:
    """What a rank writes when its call returns must reach no rank that is late."""
    kind = "shards" if function.only else "rows"
    _assert_not_seen(function, Place(world, mesh(2), subject, device), kind)


@pytest.mark.law("isolation")
@pytest.mark.world(2, collective=15, limit=40)
@each(lambda function: function.talks and not function.only)
def test_plain_tensors_used_again_at_once(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device
) -> None:
    """The same must hold of tensors that are on each rank as a whole."""
    _assert_not_seen(function, Place(world, mesh(2), subject, device), "plain")


def _assert_not_seen(function: Function, place: Place, kind: str) -> None:
    for late in range(2):
        for size, seconds in (((6, 4), 0.05), (SIZE, 0.2)):
            call = function.call(place, {"w": (kind, numbers(*size, salt=late))})
            with _late(place.world.rank == late, seconds):
                got = call.run()
            spoil(call.inputs)
            call.check(got)
