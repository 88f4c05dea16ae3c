"""Where a call spends its time on a rank: what a missed goal is explained by."""

from __future__ import annotations

import cProfile
import gc
import pstats
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

CALLS = 3
"""Calls that a profile covers."""
SHOWN = 8
"""Functions that it names."""


def profile(call: Callable[[], Any], reset: Callable[[], None]) -> list[tuple[float, int, str]]:
    """(seconds of its own in one call, entries in one call, function), the costliest first.

    All ranks of a world call it, because the call communicates. A function's entry costs more
    under the profiler, so Python looks dearer than it is beside one long call into C++. The last
    line is what is left.
    """
    watch = cProfile.Profile()
    for _ in range(CALLS):
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
    shown = [(own / CALLS, entries // CALLS, name) for own, entries, name in found[:SHOWN]]
    left = sum(own for own, _, _ in rest) / CALLS
    return [*shown, (left, sum(n for _, n, _ in rest) // CALLS, f"{len(rest)} more functions")]


def _name(file: str, line: int, function: str) -> str:
    if file == "~":
        return function.strip("<>{}").removeprefix("built-in method ")
    path = PurePath(file)
    return f"{path.parent.name}/{path.name}:{line} {function}"
