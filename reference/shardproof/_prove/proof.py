"""The answer: a table of roads, what was found, and whether a road may be trusted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardproof._prove.findings import LOSS, NOTE, UNSAFE, Finding
from shardproof._prove.roads import ROADS
from shardproof._prove.room import size_text
from shardproof._prove.travel import Cell

SIDES = ("model", "optimizer")
_PRINTED = 12
"""Findings of one cell that the text lists."""


class NotWholeError(AssertionError):
    """A road that `require` names is not whole."""


@dataclass
class Proof:
    """What prove has found; the same on all ranks."""

    job: dict[str, Any]
    """Versions, ranks, wrappers, sizes."""
    cells: list[Cell] = field(default_factory=list)
    general: list[Finding] = field(default_factory=list)
    """About the job itself, whatever the road."""
    inventory: list[dict[str, Any]] = field(default_factory=list)
    """Each tensor once, with the ranks that hold each of its parts."""
    cost: dict[str, Any] = field(default_factory=dict)

    @property
    def findings(self) -> list[Finding]:
        """All of them: of the job, then road by road."""
        return [*self.general, *(finding for cell in self.cells for finding in cell.findings)]

    @property
    def losses(self) -> list[Finding]:
        """What is no note."""
        return [finding for finding in self.findings if finding.severity != NOTE]

    @property
    def whole(self) -> bool:
        """Whether every road that was run is whole, and the ranks do not contradict each other."""
        return not self.losses

    def verdict(self, road: str, side: str = "model") -> str:
        """Whole, lossy, unsafe, empty, not run; or '-' where the road has no such side."""
        _check_road(road)
        for cell in self.cells:
            if (cell.road, cell.side) == (road, side):
                return cell.verdict
        return "-"

    def require(self, *roads: str) -> None:
        """Raise NotWholeError unless these roads, or all that were run, are whole.

        A road that was not run is not whole, and nothing is where the ranks contradict each other.
        """
        for road in roads:
            _check_road(road)
        wrong = [str(finding) for finding in self.general if finding.severity != NOTE]
        asked = roads or tuple(dict.fromkeys(cell.road for cell in self.cells))
        for road in asked:
            cells = [cell for cell in self.cells if cell.road == road]
            if not cells:
                wrong.append(f"{road} was not run")
            for cell in cells:
                if cell.verdict in ("lossy", "unsafe"):
                    said = [str(f) for f in cell.findings if f.severity != NOTE]
                    wrong.append(f"{road}, {cell.side}: {cell.verdict}: {said[0] if said else ''}")
                elif cell.verdict == "not run" and roads:
                    wrong.append(f"{road}, {cell.side}: not run: {cell.why}")
        if wrong:
            raise NotWholeError("the checkpoint is not whole:\n  " + "\n  ".join(wrong))

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "format": 1,
            "whole": self.whole,
            "job": self.job,
            "general": [finding.told() for finding in self.general],
            "roads": [
                {
                    "road": cell.road,
                    "what": ROADS[cell.road].what,
                    "side": cell.side,
                    "verdict": cell.verdict,
                    "why": cell.why,
                    "findings": [finding.told() for finding in cell.findings],
                }
                for cell in self.cells
            ],
            "inventory": self.inventory,
            "cost": self.cost,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON (.json) or as a page (.html), by the ending; any rank can."""
        target = Path(path)
        if target.suffix == ".json":
            text = json.dumps(self.told(), indent=1)
        elif target.suffix in (".html", ".htm"):
            from shardproof._prove.page import page

            text = page(self)
        else:
            raise ValueError(f"{os.fspath(path)!r}: a proof is saved as .json or .html")
        target.write_text(text, encoding="utf-8")

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterable[str]:
        width = max([len("road"), *(len(cell.road) for cell in self.cells)])
        yield f"{'road':{width}}  {'model':9}  {'optimizer':9}"
        for road in dict.fromkeys(cell.road for cell in self.cells):
            verdicts = [self.verdict(road, side) for side in SIDES]
            yield f"{road:{width}}  {verdicts[0]:9}  {verdicts[1]:9}".rstrip()
        for severity, title in ((UNSAFE, "unsafe"), (LOSS, "lost"), (NOTE, "to know")):
            some = [f for f in self.findings if f.severity == severity]
            if some:
                yield ""
            yield from _grouped(some, title)
        left = [cell for cell in self.cells if cell.verdict == "not run"]
        for why in dict.fromkeys(cell.why for cell in left):
            roads = dict.fromkeys(cell.road for cell in left if cell.why == why)
            yield f"not run: {', '.join(roads)}: {why}"
        yield ""
        if self.cost:
            yield (
                f"{self.cost['seconds']:.3g} s; snapshot {size_text(self.cost['snapshot_bytes'])}; "
                f"besides it at most {size_text(self.cost['own_peak_bytes'])} on a rank, and "
                f"{size_text(self.cost['roads_peak_bytes'])} for what a road itself takes"
            )
        yield f"{'whole' if self.whole else 'not whole'}: {self.job['summary']}"


def _grouped(findings: list[Finding], title: str) -> Iterable[str]:
    """The same loss on several roads is one line."""
    groups: dict[tuple[Any, ...], list[Finding]] = {}
    for f in findings:
        key = (f.side, f.kind, f.name, f.what, tuple(f.ranks), f.first, f.defect, f.advice)
        groups.setdefault(key, []).append(f)
    for number, same in enumerate(groups.values()):
        if number == _PRINTED * 2:
            yield f"  and {len(groups) - number} more: save() writes all"
            return
        where = ", ".join(dict.fromkeys(f.where for f in same))
        yield f"{title}: {where}, {same[0].side}: {same[0]}"
        if same[0].advice and title != "to know":
            yield f"    {same[0].advice}"


def _check_road(road: str) -> None:
    if road not in ROADS:
        raise ValueError(f"{road!r} is no road of prove: it knows {', '.join(ROADS)}")
