"""Torch, the reference and the floor side by side: `ci/bench --table`, a place of the README."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from benchmarks.listing import benchmarks
from benchmarks.session.parent import Parent
from benchmarks.settings import ARMS, Settings
from harness import devices

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
"""What the README shows of the grid: one of each family."""


def main(settings: Settings) -> int:
    """Measure what is SHOWN and print it as Markdown; 1 when an arm that should has no number."""
    known = {type(b).__name__: b for b in benchmarks()}
    wanted = [(known[name], regime, size) for name, regime, size in SHOWN]
    results = Parent(settings).measure_each(
        wanted, told=lambda text: print(text, file=sys.stderr, flush=True)
    )
    print(f"| {where(settings)} | torch | shardproof | floor | collectives | received | peak |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    status = 0
    for (benchmark, regime, size), found in zip(wanted, results, strict=True):
        name = f"{type(benchmark).__name__} {regime} x{size}"
        if isinstance(found, Exception):
            print(f"{name}: {found}", file=sys.stderr)
            status = 1
            continue
        times: list[str] = []
        counts: list[dict[str, Any]] = []
        for arm in ARMS:
            numbers = found.get(arm, {})
            if wrong := numbers.get("wrong"):
                print(f"{name}, {arm}: {wrong}", file=sys.stderr)
                status = 1
            times.append(_seconds(numbers["median"]) if "median" in numbers else "-")
            counts.append(numbers)
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


def where(settings: Settings) -> str:
    """The machine, torch and the settings, for a table's head."""
    import torch

    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    device = (
        f"{os.cpu_count()} cores" if settings.device == "cpu" else devices.name(settings.device)
    )
    small = ", small models (--quick)" if settings.quick else ""
    return f"{device}, {cpu}, torch {torch.__version__}, {settings.where()}{small}"


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
