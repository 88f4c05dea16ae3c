"""The matrix of a run: functions down, laws across, how many checks of each cell hold."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

HOLDS = frozenset({"pass"})
NOT_RUN = frozenset({"precondition"})


@dataclass
class Cell:
    """The verdicts of the checks of one function under one law."""

    verdicts: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.verdicts.total()

    @property
    def held(self) -> int:
        return sum(self.verdicts[v] for v in HOLDS)

    @property
    def state(self) -> str:
        """Worst first: unexpected, expected (failures known), absent (not run), holds, empty."""
        if not self.total:
            return "empty"
        if any(self.verdicts[v] for v in ("fail", "error", "timeout", "crash", "xpass")):
            return "unexpected"
        if self.verdicts["xfail"]:
            return "expected"
        return "holds" if self.held else "absent"

    def __str__(self) -> str:
        mark = {"unexpected": "✗", "expected": "x", "absent": "?", "holds": "✓", "empty": "·"}
        absent = sum(self.verdicts[v] for v in NOT_RUN)
        count = f" {self.held}/{self.total - absent}?" if absent else f" {self.held}/{self.total}"
        if self.state == "holds" and not absent:
            count = f" {self.held}"
        elif self.state == "absent":
            count = f" {absent}"
        return mark[self.state] + (count if self.total else "")


Rows = dict[str, dict[str, Cell]]


def matrix(checks: list[dict[str, Any]]) -> dict[str, Rows]:
    """Module -> function -> law -> cell, for the checks that judge a function."""
    found: dict[str, dict[str, dict[str, Cell]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(Cell))
    )
    # By id, not as they ran: the picture is the same in every --order.
    for check in sorted(checks, key=lambda c: c["id"]):
        if check["function"]:
            found[check["module"]][check["function"]][check["law"]].verdicts[check["verdict"]] += 1
    return {module: dict(rows) for module, rows in sorted(found.items())}
