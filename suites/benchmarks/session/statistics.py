"""From the samples of ranks to one number, on a machine where others work, too."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence


def quiet(samples: Sequence[float], blocks: int = 4) -> float:
    """The smallest of the medians of up to `blocks` consecutive parts of the samples.

    A median forgives single rounds that something disturbed, the smallest of several a disturbance
    that lasted for some of the run. Parts have three samples or more.
    """
    count = max(1, min(blocks, len(samples) // 3))
    edges = [len(samples) * n // count for n in range(count + 1)]
    return min(statistics.median(samples[a:b]) for a, b in itertools.pairwise(edges))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of our time over theirs in the same round.

    The two stand next to each other in each round, so that what slows the machine slows both.
    """
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The smallest and largest that the true median may be, by the samples' order alone.

    Half of all samples fall below the true median, so how many of these do is binomial: no shape
    of the noise is assumed. Five samples or fewer give their own range, which holds the median
    with less confidence (94 % for five, 88 % for four). Raises ValueError without samples.
    """
    ordered = sorted(samples)
    if not ordered:
        raise ValueError("no samples")
    count = len(ordered)
    outside, left_out = 0.0, 0
    while True:
        outside += math.comb(count, left_out) / 2**count
        if outside > (1 - confidence) / 2 or left_out >= (count - 1) // 2:
            break
        left_out += 1
    # Of `left_out` samples on either side, the last is the bound.
    last = max(left_out - 1, 0)
    return ordered[last], ordered[count - 1 - last]


PRECISION = 0.07
"""A ratio is known well enough when its interval reaches this far to either side, relative to it:
by the noise of rounds alone two runs would differ by more than 15 % once in a few hundred. What
differs from world to world, such as where a heap lies, comes on top, and no number of rounds shows
it."""
FEWEST = 9
"""Rounds before an interval is believed: of fewer, some are narrow by chance."""


def settled(arms: Sequence[Sequence[float]]) -> bool:
    """Whether the ratios of all pairs of arms are known well enough to stop; one alone never is.

    Args:
        arms: of each the times of all rounds so far.

    """
    if len(arms) < 2 or len(arms[0]) < FEWEST:
        return False
    return all(width(a, b) <= PRECISION for a, b in itertools.combinations(arms, 2))


def width(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Half the interval of `ratio`, relative to it."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, high = interval(ratios)
    return (high - low) / 2 / statistics.median(ratios)
