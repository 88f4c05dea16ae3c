"""Where a call spends its time on a rank: what a missed goal is explained by."""

from __future__ import annotations

import cProfile
import gc
import math
import pstats
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

CALLS, MOST_CALLS = 3, 50
"""Calls that a profile covers."""
LASTS = 0.5
"""Seconds that it lasts, so that the scheduler's slices, of some ms where ranks outnumber the
cores, do not all fall on one function."""
SHOWN = 8
"""Functions that it names."""


def profile(
    call: Callable[[], Any], reset: Callable[[], object], seconds: float
) -> list[tuple[float, int, str]]:
    """(seconds of its own in one call, entries in one call, function), the costliest first.

    All ranks of a world call it with the same `seconds`, about those of one call, because the call
    communicates. A function's entry costs more
    under the profiler, so Python looks dearer than it is beside one long call into C++. The last
    line is what is left.
    """
    watch = cProfile.Profile()
    calls = max(CALLS, min(MOST_CALLS, math.ceil(LASTS / seconds)))
    for _ in range(calls):
        reset()
        gc.collect()
        watch.enable()
        try:
            call()
        finally:
            watch.disable()
    stats: dict[Any, Any] = pstats.Stats(watch).stats  # type: ignore[attr-defined]
    found = sorted(
        ((own, entries, _name(*where)) for where, (_, entries, own, _, _) in stats.items()),
        reverse=True,
    )
    rest = found[SHOWN:]
    shown = [(own / calls, entries // calls, name) for own, entries, name in found[:SHOWN]]
    left = sum(own for own, _, _ in rest) / calls
    return [*shown, (left, sum(n for _, n, _ in rest) // calls, f"{len(rest)} more functions")]


def _name(file: str, line: int, function: str) -> str:
    if file == "~":
        return function.strip("<>{}").removeprefix("built-in method ")
    path = PurePath(file)
    return f"{path.parent.name}/{path.name}:{line} {function}"
