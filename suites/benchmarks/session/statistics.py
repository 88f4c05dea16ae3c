"""From the samples of ranks to one number, on a machine where others work, too."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence


def slowest(by_rank: Sequence[Sequence[float]]) -> list[float]:
    """Of each round the largest time over the ranks; raises ValueError where ranks differ in count.

    A collective is over when its last rank is.
    """
    return [max(times) for times in zip(*by_rank, strict=True)]


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
