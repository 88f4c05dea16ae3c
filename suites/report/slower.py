"""What costs more now, of two runs that both lie beside benchmarks: benchmarks.jsonl."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks import journal
from benchmarks.results.reproducibility import FACTOR, Pair, pairs

NAME = "benchmarks.jsonl"
"""In the folder of a run, as `ci/bench --journal` leaves it."""
_COUNTS = ("collectives", "received", "peak")


@dataclass(frozen=True)
class Slower:
    """A measurement that rose."""

    what: str
    """Benchmark, regime, ranks, arm: and what was measured."""
    before: float
    now: float


def slower(before: Path, now: Path) -> list[Slower]:
    """Times over the floor's that both runs know and that rose, and counts; none without both.

    Raises ValueError where a file is no journal.
    """
    files = [(path if path.is_dir() else path.parent) / NAME for path in (before, now)]
    if not all(file.exists() for file in files):
        return []
    first, second = (journal.read(file)[1] for file in files)
    return [
        Slower(pair.what, pair.values[0], pair.values[1])
        for pair in pairs(first, second)
        if pair.values[0] is not None and pair.values[1] is not None and _rose(pair)
    ]


def _rose(pair: Pair) -> bool:
    first, second = pair.values
    assert first is not None
    assert second is not None
    track = pair.what.rpartition(" ")[2]
    if track == "ratio_to_floor":
        return pair.sure and second > FACTOR * first
    return track in _COUNTS and ", floor:" not in pair.what and second > first
