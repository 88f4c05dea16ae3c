"""Tonight's verdicts against the last night's, and one order against the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.records.verdicts import UNEXPECTED, Verdict

Verdicts = Mapping[str, str]
"""Check id to verdict."""

NOT_RUN = frozenset({Verdict.PRECONDITION})


def of(results: Mapping[str, Any]) -> dict[str, str]:
    """The verdicts of a results.json."""
    return {check["id"]: check["verdict"] for check in results["checks"]}


@dataclass
class Comparison:
    """What a night says that the one before did not."""

    changed: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Check to (verdict before, verdict now), of checks that ran in both."""
    lost: dict[str, str] = field(default_factory=dict)
    """Checks that gave a verdict before and give none now, to that verdict."""
    ran_before: int = 0
    ran_now: int = 0

    def remembered(self, now: Verdicts) -> dict[str, str]:
        """The verdicts for the next night to compare with: a lost check is lost till it returns."""
        return {**now, **self.lost}


def compare(before: Verdicts, now: Verdicts) -> Comparison:
    """Hold a night against the one before."""
    found = Comparison(ran_before=ran(before), ran_now=ran(now))
    for check, verdict in sorted(before.items()):
        if verdict in NOT_RUN:
            continue
        if now.get(check, Verdict.PRECONDITION) in NOT_RUN:
            found.lost[check] = verdict
        elif now[check] != verdict:
            found.changed[check] = (verdict, now[check])
    return found


def ran(verdicts: Verdicts) -> int:
    """How many checks gave a verdict on the subject."""
    return sum(v not in NOT_RUN for v in verdicts.values())


def unexpected(verdicts: Verdicts) -> dict[str, str]:
    """The verdicts that nothing expects: what keeps the issue open."""
    return {check: v for check, v in sorted(verdicts.items()) if v in UNEXPECTED}


def merged(orders: Sequence[Verdicts]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """(one verdict a check, the checks on which the orders disagree with what each said).

    Where the orders disagree, the verdict is the worse: the first that is unexpected.
    """
    found: dict[str, str] = {}
    split: dict[str, list[str]] = {}
    for check in sorted(set().union(*orders)):
        said = [order.get(check, "not run") for order in orders]
        if len(set(said)) > 1:
            split[check] = said
        found[check] = next((v for v in said if v in UNEXPECTED), said[0])
    return found, split
