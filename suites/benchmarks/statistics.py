"""From the samples of ranks to one number, on a machine where others work, too."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from benchmarks.settings import FEWEST_WORLDS

Worlds = Sequence[Sequence[float]]
"""Seconds of a call: of each world those of its rounds."""


def typical(seconds: Worlds) -> float:
    """Median over the worlds of the median over the rounds of each."""
    return statistics.median(map(statistics.median, seconds))


def ratios(ours: Worlds, theirs: Worlds) -> list[float]:
    """Our time over theirs: of each world the median of its rounds; of a single one each round's.

    The two stand next to each other in each round, so that what slows the machine slows both. One
    world is one sample: memory lies elsewhere in the next, and all rounds of a world have that in
    common.
    """
    by_world = [
        [a / b for a, b in zip(mine, other, strict=True)]
        for mine, other in zip(ours, theirs, strict=True)
    ]
    return by_world[0] if len(by_world) == 1 else list(map(statistics.median, by_world))


def ratio(ours: Worlds, theirs: Worlds) -> float:
    """The `middle` of the `ratios`; of a single world's, and of three worlds', their median."""
    found = ratios(ours, theirs)
    return middle(found) if len(ours) >= FEWEST_PAIRED else statistics.median(found)


FEWEST_PAIRED = 4
"""Worlds from which on one that is odd is forgiven when they are paired."""


def middle(worlds: Sequence[float]) -> float:
    """Of a few positive samples the median of the means of all pairs, each with itself too.

    Geometric means, since half and double lie as far from one. It forgives one odd sample in four,
    and of seven is known as well as the median of eleven (Hodges and Lehmann, 1963): two runs of
    145 ratios here disagreed about 13 medians, and of the same samples about 9 of these.
    """
    pairs = itertools.combinations_with_replacement(worlds, 2)
    return statistics.median(math.sqrt(a * b) for a, b in pairs)


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


PRECISION = 0.1
"""A world has rounds enough when the interval of a ratio reaches this far to either side, relative
to it; the median of several worlds is known better."""
FEWEST = 9
"""Rounds before an interval is believed: of fewer, some are narrow by chance."""


def settled(arms: Sequence[Sequence[float]]) -> bool:
    """Whether a world has shown the ratios of all pairs of arms; a single arm has none.

    Args:
        arms: of each the times of all rounds so far.

    """
    if len(arms) < 2 or len(arms[0]) < FEWEST:
        return False
    return all(width(ratios([a], [b])) <= PRECISION for a, b in itertools.combinations(arms, 2))


ERROR = 0.035
"""A ratio is known when its standard error, relative to it, is no larger. Then two runs differ by
more than 15 % of it, 2.8 standard errors of their difference, once in 200 times."""


def error(worlds: Sequence[float]) -> float:
    """The standard error of the `middle` of at least four positive samples, relative to it.

    As for their mean: of normal samples the `middle` is known as well but for 5 % of the variance.
    A few samples are alike by chance now and then; so it is the standard deviation of Student's t,
    for four 1.7 times as large as where their own were known.
    """
    count = len(worlds)
    return statistics.stdev(map(math.log, worlds)) * math.sqrt((count - 1) / (count - 3) / count)


def doubt(ours: Worlds, theirs: Worlds) -> float:
    """The `error` of our time over theirs; infinite where the worlds are too few to tell."""
    return error(ratios(ours, theirs)) if len(ours) >= FEWEST_WORLDS else math.inf


def known(arms: Sequence[Worlds]) -> bool:
    """Whether worlds have shown the ratios of all pairs of arms; a single arm has none."""
    return all(doubt(a, b) <= ERROR for a, b in itertools.combinations(arms, 2))


def width(samples: Sequence[float]) -> float:
    """Half the interval of the median, relative to it."""
    low, high = interval(samples)
    return (high - low) / 2 / statistics.median(samples)
