"""A journal: each measurement of a run, a JSON object a line, as `ci/bench --journal` leaves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.base import Measured

Arms = dict[str, dict[str, Any]]
"""Arm to its numbers."""


def write(file: Path, where: str, wanted: tuple[Measured, str, int], arms: Arms) -> None:
    """Add a measurement; `where` are machine and settings in words."""
    benchmark, regime, size = wanted
    line = {
        "where": where,
        "benchmark": type(benchmark).__name__,
        "regime": regime,
        "size": size,
        "arms": arms,
    }
    # Only the digits of a number that say something: a file of half the size.
    rounded = json.loads(json.dumps(line), parse_float=lambda text: float(f"{float(text):.6g}"))
    with file.open("a") as stream:
        stream.write(json.dumps(rounded) + "\n")


def read(file: Path) -> tuple[str, dict[str, Arms]]:
    """(where it was measured, label to arms); ValueError where it is no journal of one machine."""
    found = {}
    places: set[str] = set()
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            one = json.loads(line)
            found[f"{one['benchmark']} {one['regime']} x{one['size']}"] = one["arms"]
            places.add(one["where"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no journal: line {number}: {error!r}") from None
    if len(places) > 1:
        raise ValueError(f"{file} has numbers of several: {'; '.join(sorted(places))}")
    return "".join(places), found
