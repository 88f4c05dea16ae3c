"""Torch, the reference and the floor side by side: `ci/bench --table`, for docs/benchmarks.md."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.base import SUBJECTS
from benchmarks.journal import Arms
from benchmarks.listing import benchmarks, label
from benchmarks.results.measurements import measure_or_read
from benchmarks.settings import ARMS, Settings

SHOWN = (
    ("GatherStateDict", "many", 4),
    ("GatherStateDict", "model", 4),
    ("GatherStateDict", "large", 4),
    ("BroadcastStateDict", "many", 4),
    ("BroadcastStateDict", "model", 4),
    ("BroadcastStateDict", "large", 4),
    ("DistributeStateDict", "model", 4),
    ("OffloadStateDictToCpu", "model", 2),
    ("CreateCpuStateDict", "large", 2),
    ("CopyStateDict", "model", 1),
    ("FlattenStateDict", "many", 1),
    ("ChunkDtensor", "model", 4),
    ("AllGatherDtensor", "model", 4),
)
"""What docs/benchmarks.md shows of the grid: one of each family."""


def main(settings: Settings, file: Path | None) -> int:
    """Measure what is SHOWN, or find it in a journal, and print it as Markdown.

    Ends with 0; 1: an arm that should has no number; 2: no journal; 3: no world fits here.
    """
    known = {type(b).__name__: b for b in benchmarks()}
    wanted = [(known[n], regime, size) for n, regime, size in SHOWN if not settings.beyond(size)]
    if not wanted:
        print("ci/bench: no world of the table fits here", file=sys.stderr)
        return 3
    measured = measure_or_read(wanted, settings, file)
    if measured is None:
        return 2
    place, results = measured
    print(f"| {place} | torch | shardproof | floor | collectives | received | peak |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    status = 0
    for (benchmark, regime, size), found in zip(wanted, results, strict=True):
        name = label(benchmark, regime, size)
        if isinstance(found, Exception):
            print(f"{name}: {found}", file=sys.stderr)
            status = 1
            continue
        for arm, numbers in found.items():
            if numbers["wrong"]:
                print(f"{name}, {arm}: {numbers['wrong']}", file=sys.stderr)
                status = 1
        ranks = f"{size} rank{'s' if size > 1 else ''}"
        row = [f"`{benchmark.functions[0].rpartition('.')[2]}`, {regime}, {ranks}"]
        row += [_shown(found, arm, "median", _seconds) for arm in ARMS]
        for track, show in (("collectives", str), ("received", _bytes), ("peak", _bytes)):
            row.append(" / ".join(_shown(found, arm, track, show) for arm in SUBJECTS))
        print(f"| {' | '.join(row)} |", flush=True)
    return status


def _shown(found: Arms, arm: str, what: str, show: Callable[[Any], str]) -> str:
    """That number of the arm, or a dash."""
    value = found.get(arm, {}).get(what)
    return "-" if value is None else show(value)


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-4 else f"{value * 1e6:.3g} us"


def _bytes(value: float) -> str:
    for scale, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= scale:
            return f"{value / scale:.1f} {name}"
    return f"{value:.0f} B"
