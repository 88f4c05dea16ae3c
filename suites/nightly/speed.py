"""Tonight's benchmarks against the last green night's.

A benchmark counts as its ratio to the floor measured in the same run, so that a slower machine is
no regression. The gate is three times the spread between tonight's two runs of the same code.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.settings import FLOOR

SPREADS = 3.0
"""Run-to-run spreads that a ratio may rise before it counts as slower."""
_PERCENTILE = 90

Ratios = Mapping[str, float]
"""Benchmark, regime, size and arm, to the arm's time over the floor's."""


def ratios(journal: Path) -> dict[str, float]:
    """The ratios that a run of ci/bench left; arms without a number, or without floor, are out."""
    found: dict[str, float] = {}
    for line in journal.read_text().splitlines():
        one = json.loads(line)
        floor = one["arms"].get(FLOOR, {}).get("median")
        for arm, numbers in one["arms"].items():
            if arm != FLOOR and floor and numbers.get("median"):
                name = f"{one['benchmark']} {one['regime']} x{one['size']} {arm}"
                found[name] = numbers["median"] / floor
    return found


@dataclass
class Speed:
    """What the benchmarks of a night say."""

    spread: float = 0.0
    """The larger part of the differences between two runs of one code, as a share."""
    slower: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Benchmark to (ratio of the green night, ratio tonight)."""
    gone: list[str] = field(default_factory=list)
    """Benchmarks that gave a number in the green night and none tonight."""
    measured: int = 0


def judge(first: Ratios, second: Ratios, green: Ratios) -> tuple[Speed, dict[str, float]]:
    """(tonight against the green night, tonight's ratios): of two runs the better counts."""
    tonight = {name: min(first[name], second[name]) for name in first.keys() & second.keys()}
    apart = [abs(math.log(first[name] / second[name])) for name in tonight]
    spread = _percentile(apart)
    found = Speed(spread=math.expm1(spread), measured=len(tonight))
    found.gone = sorted(green.keys() - tonight.keys())
    for name in sorted(tonight.keys() & green.keys()):
        if math.log(tonight[name] / green[name]) > SPREADS * spread:
            found.slower[name] = (green[name], tonight[name])
    return found, tonight


def _percentile(values: list[float]) -> float:
    if len(values) < 2:
        return max(values, default=0.0)
    return statistics.quantiles(values, n=100, method="inclusive")[_PERCENTILE - 1]
