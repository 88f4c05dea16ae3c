"""Counts that must not rise: `ci/bench --check` against suites/benchmarks/baseline.json.

Collectives, bytes received, peak memory and Python calls of one call of the reference, each the
largest over the ranks. They have no noise, so any rise is a change of the code. Python calls may
rise by CALLS_MAY_RISE, because a refactoring moves them without moving the cost.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema

from benchmarks.base import CONSTANT, COUNTED, Measured
from benchmarks.listing import benchmarks, label
from benchmarks.run.parent import Parent
from benchmarks.settings import REFERENCE, Settings

FILE = Path(__file__).parents[1] / "baseline.json"
_COUNTS = {
    "type": "object",
    "additionalProperties": {"type": "integer", "minimum": 0},
}
SCHEMA = {
    "type": "object",
    "required": ["about", "counts"],
    "additionalProperties": False,
    "properties": {
        "about": {"type": "object", "additionalProperties": {"type": "string"}},
        "counts": {"type": "object", "additionalProperties": _COUNTS},
    },
}
CALLS_MAY_RISE = 1.1
GROWTH_MAY_BE = {CONSTANT: 1.02}
"""Largest ratio of a count from the smallest to the largest world, where it must be constant."""

Counts = dict[str, dict[str, int]]


def measured(parent: Parent, wanted: Iterable[Measured]) -> Counts:
    """Label to counts of each measurement of `wanted`; one world for all of a size.

    Raises `world.WorldError` when a world fails, ValueError when a result was wrong.
    """
    by_world: dict[tuple[bool, int], list[tuple[Measured, str, int]]] = defaultdict(list)
    for benchmark in wanted:
        if not benchmark.missing(REFERENCE, parent.settings):
            for regime, size in benchmark.grid(parent.settings):
                by_world[benchmark.fake, size].append((benchmark, regime, size))
    found: Counts = {}
    for (fake, size), group in sorted(by_world.items(), key=lambda item: item[0]):
        begin = time.monotonic()
        results = parent.measure_all(group, arms=(REFERENCE,), timed=False)
        for (benchmark, regime, _), arms in zip(group, results, strict=True):
            numbers = arms[REFERENCE]
            if numbers["wrong"]:
                raise ValueError(f"{label(benchmark, regime, size)}: {numbers['wrong']}")
            found[label(benchmark, regime, size)] = {n: numbers[n] for n in COUNTED}
        kind = "fake ranks" if fake else "ranks"
        spent = time.monotonic() - begin
        print(f"{size} {kind}: {len(group)} counted in {spent:.1f} s", file=sys.stderr, flush=True)
    return found


def rises(now: Counts, base: Counts) -> list[str]:
    """What is more than the baseline, what is not in it, and what it has that was not measured."""
    found = []
    for name in sorted(now.keys() | base.keys()):
        if name not in base:
            found.append(f"{name}: not in the baseline")
        elif name not in now:
            found.append(f"{name}: in the baseline, but was not measured")
        else:
            for count in COUNTED:
                before, after = base[name].get(count), now[name][count]
                allowed = CALLS_MAY_RISE if count == "calls" else 1.0
                if before is None:
                    found.append(f"{name}: {count} is not in the baseline")
                elif after > before * allowed:
                    found.append(f"{name}: {count} rose from {before:,} to {after:,}")
    return found


def falls(now: Counts, base: Counts) -> int:
    """How many counts are lower than the baseline."""
    return sum(
        now[name][count] < base[name].get(count, 0)
        for name in now.keys() & base.keys()
        for count in COUNTED
    )


def growths(now: Counts, wanted: Iterable[Measured], settings: Settings) -> list[str]:
    """Where a count grows faster with the world than its benchmark states."""
    found = []
    for benchmark in wanted:
        sizes = [size for _, size in benchmark.grid(settings)]
        first, last = sizes[0], sizes[-1]
        for count, stated in benchmark.growth.items():
            for regime in benchmark.regimes:
                less = now[label(benchmark, regime, first)][count]
                more = now[label(benchmark, regime, last)][count]
                allowed = less * GROWTH_MAY_BE.get(stated, last / first)
                if more > allowed:
                    found.append(
                        f"{type(benchmark).__name__}: {count} is stated as {stated}, but grows "
                        f"from {less:,} with {first} ranks to {more:,} with {last}"
                    )
    return found


def about() -> dict[str, str]:
    """What the counts depend on besides the code."""
    import torch

    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return {"torch": torch.__version__.partition("+")[0], "python": version}


class BadBaselineError(Exception):
    """A baseline that is not there, not JSON, or not of its schema; the text says where."""


def read(file: Path) -> dict[str, Any]:
    """What is saved: `about`, and the counts of each measurement."""
    try:
        saved: dict[str, Any] = json.loads(file.read_text())
        jsonschema.validate(saved, SCHEMA)
    except FileNotFoundError:
        raise BadBaselineError(f"{file}: there is none") from None
    except ValueError as error:
        raise BadBaselineError(f"{file}: not JSON ({error})") from None
    except jsonschema.ValidationError as error:
        raise BadBaselineError(f"{file}: at {error.json_path}: {error.message[:300]}") from None
    return saved


def check(settings: Settings, file: Path = FILE) -> int:
    """Compare; 0: nothing rose, 1: something did, 3: it cannot be compared. Prints why."""
    wanted = benchmarks()
    try:
        saved = read(file)
    except BadBaselineError as error:
        print(f"{error}; restore it, or write one with ci/bench --update-baseline", file=sys.stderr)
        return 3
    now = measured(Parent(settings), wanted)
    if saved["about"] != about():
        print(
            f"the baseline was counted with {saved['about']}, this is {about()}: not comparable; "
            "run ci/setup, or ci/bench --update-baseline",
            file=sys.stderr,
        )
        return 3
    bad = rises(now, saved["counts"]) + growths(now, wanted, settings)
    for line in bad:
        print(line)
    if bad:
        print(f"{len(bad)} rose. If that is meant: ci/bench --update-baseline, and say why")
        return 1
    lower = falls(now, saved["counts"])
    print(f"{len(now)} measurements, {len(now) * len(COUNTED)} counts: none rose, {lower} fell")
    if lower:
        print("ci/bench --update-baseline keeps it so")
    return 0


def update(settings: Settings, file: Path = FILE) -> int:
    """Write the baseline; 1 when a count grows faster with the world than stated."""
    wanted = benchmarks()
    now = measured(Parent(settings), wanted)
    if bad := growths(now, wanted, settings):
        print("\n".join(bad))
        return 1
    rows = ",\n".join(f"  {json.dumps(n)}: {json.dumps(now[n])}" for n in sorted(now))
    text = f'{{\n "about": {json.dumps(about())},\n "counts": {{\n{rows}\n }}\n}}\n'
    file.write_text(text)
    print(f"{len(now)} measurements written to {file}")
    return 0
