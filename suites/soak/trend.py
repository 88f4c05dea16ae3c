"""Whether a process grows with the checks that it runs: the rule, and the figures it is held to.

The first tenth of the samples is left out, for a parent fills its caches in it; of the rest, the
last quarter is held against the first. Memory: the median may rise by 4 MB, or by a kilobyte a
check where that is more. Descriptors: the fewest seen may not rise, for the most depend on the size
of the world that starts meanwhile.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

FEWEST = 200
"""Samples from which on a trend is told."""
_KILOBYTES = 4096
_KILOBYTES_A_CHECK = 1.0


@dataclass(frozen=True)
class Sample:
    """The parent after a check."""

    checks: int
    kilobytes: int
    descriptors: int


def quarters(samples: Sequence[Sample]) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """The first and the last quarter of the samples, the first tenth left out."""
    kept = samples[len(samples) // 10 :]
    share = len(kept) // 4
    return kept[:share], kept[len(kept) - share :]


def grown(samples: Sequence[Sample]) -> list[str]:
    """What grew, a line each; nothing where there are too few samples to tell."""
    if len(samples) < FEWEST:
        return []
    first, last = quarters(samples)
    found = []
    before, after = (statistics.median(s.kilobytes for s in part) for part in (first, last))
    allowed = max(_KILOBYTES, _KILOBYTES_A_CHECK * (last[-1].checks - first[0].checks))
    if after - before > allowed:
        found.append(
            f"the parent's memory grew from {before / 1024:.1f} to {after / 1024:.1f} MB, "
            f"{allowed / 1024:.1f} MB are allowed"
        )
    fewest, now = (min(s.descriptors for s in part) for part in (first, last))
    if now > fewest:
        found.append(f"the parent's descriptors grew from {fewest} to {now}")
    return found
