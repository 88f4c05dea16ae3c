"""From the samples of ranks to one number, on a machine where others work, too."""

from __future__ import annotations

import itertools
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
