"""Whether two runs of one code say the same: `ci/bench --agree FIRST SECOND`.

Ratios that both runs know agree within what a comparison of two revisions takes for no change,
counts exactly, and both runs measured the same. Ratios that a run left before they were known have
no number in asv's tracks either: some of them are apart by chance, and they are told, no more.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.base import COUNTED, RATIOS, TRACKS
from benchmarks.journal import read
from benchmarks.statistics import ERROR, doubt

FACTOR = 1.15
"""Ratio of two times that is taken for a change: two runs of one code agree within this."""

Arms = Mapping[str, Any]


class Pair(NamedTuple):
    """A number of two runs.

    Attributes:
        what: benchmark, regime, size of the world, arm and track.
        values: what each run says; None where it does not.
        known: of a ratio its standard error in each run, relative to it.

    """

    what: str
    values: tuple[float | None, ...]
    known: tuple[float, ...] | None = None

    @property
    def apart(self) -> bool:
        """Whether the runs disagree; of what neither has nobody knows that they agree."""
        first, second = self.values
        if first is None or second is None:
            return True
        if self.known is None:
            return first != second
        return max(first, second) > FACTOR * min(first, second)

    @property
    def sure(self) -> bool:
        """Whether it is a ratio that both runs know."""
        return self.known is not None and None not in self.values and max(self.known) <= ERROR

    def __str__(self) -> str:
        first, second = self.values
        if first is None or second is None:
            has = f"only the {'first' if second is None else 'second'} run"
            return f"{self.what}: {'neither run' if first is second else has} has it"
        known = "" if self.known is None else ", known within {:.1%} and {:.1%}".format(*self.known)
        return f"{self.what}: {first:.4g} and {second:.4g}{known}"


def pairs(first: Mapping[str, Arms], second: Mapping[str, Arms]) -> Iterator[Pair]:
    """All ratios and counts of two runs; of a measurement that only one made a single pair."""
    for name in dict.fromkeys((*first, *second)):
        if name not in first or name not in second:
            yield Pair(name, (1.0, None) if name in first else (None, 1.0))
            continue
        ours, theirs = first[name], second[name]
        for arm in dict.fromkeys((*ours, *theirs)):
            wrong = [run.get(arm, {}).get("wrong") for run in (ours, theirs)]
            if all(wrong):
                yield Pair(f"{name}, {arm} ({wrong[0]})", (None, None))
            for track in (*RATIOS, *COUNTED):
                if arm not in TRACKS[track][1]:
                    continue
                values = tuple(run.get(arm, {}).get(track) for run in (ours, theirs))
                if values != (None, None):
                    yield Pair(f"{name}, {arm}: {track}", values, _known(track, arm, ours, theirs))


def _known(track: str, arm: str, *runs: Arms) -> tuple[float, ...] | None:
    """Of a ratio its standard error in each run; infinite where a run does not have it."""
    if track not in RATIOS:
        return None
    both = arm, RATIOS[track]
    seconds = [[run.get(name, {}).get("seconds") for name in both] for run in runs]
    return tuple(doubt(*pair) if all(pair) else math.inf for pair in seconds)


def main(first: Path, second: Path) -> int:
    """Print what disagrees, and what may by chance.

    Ends with 0: nothing that both runs know; 1: something; 2: no journal; 3: nothing was measured,
    or ratios of which both runs know none.
    """
    try:
        found = list(pairs(read(first)[1], read(second)[1]))
    except (OSError, ValueError) as error:
        print(f"ci/bench: {error}; --journal makes one", file=sys.stderr)
        return 2
    if not found:
        print(f"ci/bench: {first} and {second} measured nothing", file=sys.stderr)
        return 3
    for pair in found:
        if pair.apart:
            print(pair)
    for text, chosen in (
        (f"ratios agree within {FACTOR - 1:.0%}", [p for p in found if p.known is not None]),
        (f"that both runs know within {ERROR:.1%} do so", [p for p in found if p.sure]),
        ("counts are the same", [p for p in found if p.known is None]),
    ):
        print(f"{sum(not p.apart for p in chosen)} of {len(chosen)} {text}")
    counted = [p for p in found if p.known is None or None in p.values]
    sure = [p for p in found if p.sure]
    if any(p.apart for p in (*counted, *sure)):
        return 1
    if not sure and any(p.known is not None for p in found):
        print("ci/bench: no ratio is known to both runs: give them more time", file=sys.stderr)
        return 3
    return 0
