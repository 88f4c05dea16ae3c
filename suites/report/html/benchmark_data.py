"""What charts read of a run's benchmarks: of a journal, as `ci/bench --journal FILE` leaves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import journal
from benchmarks.listing import benchmarks
from benchmarks.settings import FLOOR
from report.slower import NAME

_ARMS = {"torch.distributed": "torch", "shardproof": "reference", FLOOR: "floor"}
_COUNTS = ("collectives", "received", "peak")


def benchmarks_of(folder: Path) -> dict[str, Any] | None:
    """The measurements that lie in the folder, or None; ValueError where the file is no journal."""
    file = folder / NAME
    if not file.exists():
        return None
    where, found = journal.read(file)
    functions = {type(one).__name__: one.functions[0] for one in benchmarks()}
    rows = []
    for label, arms in found.items():
        name, regime, size = label.split(" ")
        rows.append(
            {
                "name": name,
                "title": _title(name, functions),
                "regime": regime,
                "ranks": int(size.removeprefix("x")),
                "arms": {_ARMS.get(arm, arm): _numbers(told) for arm, told in arms.items()},
            }
        )
    return {"where": where, "rows": sorted(rows, key=_order)}


def _title(name: str, functions: dict[str, str]) -> str:
    """The function, with the benchmark's name where that is another."""
    if name not in functions:
        return name
    function = functions[name].rpartition(".")[2]
    same = function.replace("_", "").lower() == name.lower()
    return function if same else f"{function} ({name})"


def _numbers(told: dict[str, Any]) -> dict[str, Any]:
    found = {"seconds": told.get("median"), "wrong": told.get("wrong")}
    found |= {count: told.get(count) for count in _COUNTS}
    return {name: value for name, value in found.items() if value not in (None, "")}


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["title"].strip("_").lower(), row["regime"], row["ranks"]
