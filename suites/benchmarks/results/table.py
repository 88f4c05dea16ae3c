"""Torch, the reference and the floor side by side: `ci/bench --table`, for docs/benchmarks.md."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

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
    try:
        place, results = measure_or_read(wanted, settings, file)
    except (OSError, ValueError) as error:
        print(f"ci/bench: {error}; --journal makes one", file=sys.stderr)
        return 2
    print(f"| {place} | torch | shardproof | floor | collectives | received | peak |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    status = 0
    for (benchmark, regime, size), found in zip(wanted, results, strict=True):
        name = label(benchmark, regime, size)
        if isinstance(found, Exception):
            print(f"{name}: {found}", file=sys.stderr)
            status = 1
            continue
        times: list[str] = []
        counts: list[dict[str, Any]] = []
        for arm in ARMS:
            told = found.get(arm, {})
            if wrong := told.get("wrong"):
                print(f"{name}, {arm}: {wrong}", file=sys.stderr)
                status = 1
            times.append(_seconds(told["median"]) if "median" in told else "-")
            counts.append(told)
        columns = [
            " / ".join(_count(c.get(track), unit) for c in counts[:2])
            for track, unit in (("collectives", ""), ("received", "B"), ("peak", "B"))
        ]
        ranks = f"{size} rank{'s' if size > 1 else ''}"
        row = [
            f"`{benchmark.functions[0].rpartition('.')[2]}`, {regime}, {ranks}",
            *times,
            *columns,
        ]
        print(f"| {' | '.join(row)} |", flush=True)
    return status


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-4 else f"{value * 1e6:.3g} us"


def _count(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if not unit:
        return f"{value:.0f}"
    for scale, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= scale:
            return f"{value / scale:.1f} {name}"
    return f"{value:.0f} {unit}"
