"""Collectives that a call starts: each is over when the call returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from conformance.kit.data import numbers
from conformance.kit.functions import Function, Place, each

STARTING = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_reduce",
    "all_to_all_single",
    "broadcast",
    "gather",
    "irecv",
    "isend",
    "reduce",
    "scatter",
)
SIZE = (514, 4096)
"""Eight MiB: more than is packed with others."""


class Started:
    """The work of a collective, which notes that it was waited for."""

    def __init__(self, work: Any, name: str, still: dict[int, str]) -> None:
        self._work, self._still = work, still
        still[id(self)] = name

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """As the work's own."""
        self._still.pop(id(self), None)
        return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@pytest.mark.law("values")
@pytest.mark.world(2, collective=15, limit=40)
@each(lambda function: function.talks)
def test_what_is_started_is_waited_for(
    function: Function,
    mesh: Any,
    world: Any,
    subject: Any,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever collective a call starts, it must wait for it before it returns."""
    still: dict[int, str] = {}
    kept: list[Started] = []  # so that no two have the same id

    def noting(name: str, start: Any) -> Any:
        def started(*args: Any, **kwargs: Any) -> Any:
            work = start(*args, **kwargs)
            if work is None or isinstance(work, torch.Tensor):
                return work
            kept.append(Started(work, name, still))
            return kept[-1]

        return started

    for name in STARTING:
        if hasattr(dist, name):
            monkeypatch.setattr(dist, name, noting(name, getattr(dist, name)))
    place = Place(world, mesh(2), subject, device)
    calls = [function.each_kind(place, numbers(9, 4), usual=True)]
    for kind in ("shards",) if function.only else ("rows", "plain"):
        calls.append(function.call(place, {"w": (kind, numbers(*SIZE))}))
    for call in calls:
        got = call.run()
        assert not still, f"not waited for: {sorted(still.values())}"
        call.check(got)
