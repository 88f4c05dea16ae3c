"""What differs from the last run of another torch that stands beside a run, in defects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from defects.catalogue import Defect
from defects.catalogue import read as read_defects
from report.changes import changes
from report.compare import NotComparableError
from report.read import BadResultsError, read

_MOST = 20
"""Runs that are looked at: results of a whole run take some tenths of a second to read."""


def run_beside(data: Mapping[str, Any], folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest run beside `folder` of the same subject and backend under another torch.

    It has to hold most of the checks: what a few of them show says little of a torch.
    """
    folder = folder.resolve()
    others = [p for p in folder.parent.glob("*/results.json") if p.parent.resolve() != folder]
    for path in sorted(others, key=lambda p: p.stat().st_mtime, reverse=True)[:_MOST]:
        try:
            other = read(path, validate=False)
            if _is_of_another_torch(data["run"], other.get("run", {})) and _covers(other, data):
                return path, read(path)
        except BadResultsError:
            continue  # of an older form: nothing to compare with
    return None


def _is_of_another_torch(run: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    same = all(run[key] == other.get(key) for key in ("subject", "backend", "device"))
    return same and run["torch"] != other.get("torch")


def _covers(other: Mapping[str, Any], data: Mapping[str, Any]) -> bool:
    there = {check["id"] for check in other.get("checks", ())}
    here = [check["id"] for check in data["checks"]]
    return 2 * sum(identity in there for identity in here) > len(here)


def lines(data: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Which defects are new and which are gone; nothing where no such run stands there."""
    if (found := run_beside(data, folder)) is None:
        return
    path, other = found
    try:
        differ = changes(other, data)
    except NotComparableError:
        return
    known = read_defects()
    version = str(other["run"]["torch"]).partition("+")[0]
    name = path.parent.name
    if not differ.appeared and not differ.vanished:
        yield f"the same defects as torch {version} ({name}), in {differ.common} checks of both"
        return
    yield f"since torch {version} ({name}), in {differ.common} checks that ran in both:"
    for word, group in (("new", differ.appeared), ("gone", differ.vanished)):
        for identity in sorted(group, key=lambda i: _rank(known, i)):
            title = f"  {known[identity].title}" if identity in known else ""
            yield f"{word:<8} {identity}{title}"


def _rank(known: Mapping[str, Defect], identity: str) -> tuple[int, str]:
    return known[identity].rank if identity in known else (len(known), identity)
