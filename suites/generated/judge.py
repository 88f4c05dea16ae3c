"""Run a case and hold what its ranks tell against what the oracle says: one difference, or none."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from generated.compare import Comparison
from generated.emit import source, tensors_of
from generated.oracle.simulation import simulate
from generated.oracle.tell import Expecting
from generated.tensor_texts import Case
from generated.world import Stage, Told

LIMIT, LAG = 20.0, 6.0
"""Seconds for a case, and for a rank after the first one to end it."""
QUICK, QUICK_LAG = 4.0, 1.5
"""The same once a hang is known and is made smaller."""


@dataclass(frozen=True)
class Difference:
    """What one rank told and must not."""

    call: str
    """The function."""
    number: int
    """Which call of the case."""
    rank: int
    text: str
    hang: bool = False

    @property
    def kind(self) -> str:
        """The text without what differs from case to case: differences of one kind are one."""
        if self.hang:
            return f"{self.call}: hangs"
        plain = re.sub(r"\[[^\]]*\]|'[^']*'|\"[^\"]*\"|\b[0-9a-f]{6,}\b|\d+", "", self.text)
        plain = re.sub(r"(it raised \w+).*", r"\1", plain, flags=re.DOTALL)
        return f"{self.call}: " + " ".join(plain.split())[:80]

    def __str__(self) -> str:
        place = f"call {self.number + 1} ({self.call})"
        return f"{place}, rank {self.rank}: {self.text}"


def judge(
    stage: Stage, case: Case, *, quick: bool = False, fresh: bool = False
) -> Difference | None:
    """The first difference of a case; `quick` shortens the wait for ranks that hang."""
    limit, lag = (QUICK, QUICK_LAG) if quick else (LIMIT, LAG)
    told = stage.play(case["world"], source(case), limit=limit, lag=lag, fresh=fresh)
    return compare(case, expected(case), told)


def expected(case: Case) -> list[list[dict[str, Any]]]:
    """What each rank must tell of each call: `[call][rank]`."""
    tellers = [Expecting() for _ in range(case["world"])]
    return [
        [teller.call(outcome) for teller, outcome in zip(tellers, outcomes, strict=True)]
        for outcomes in simulate(case)
    ]


def compare(case: Case, wanted: list[list[dict[str, Any]]], told: list[Told]) -> Difference | None:
    """The first difference, call by call and in each rank by rank."""
    calls = [step["call"] for step in case["steps"] if "call" in step]
    comparisons = [Comparison() for _ in told]
    for number, outcomes in enumerate(wanted):
        ended = [rank for rank, one in enumerate(told) if number < len(one.calls)]
        for rank in ended:
            text = comparisons[rank].difference(outcomes[rank], told[rank].calls[number])
            if text:
                return Difference(calls[number], number, rank, text)
        for rank, one in enumerate(told):
            if rank not in ended:
                text = f"it {one.end or 'told nothing'}"
                text += f"; ranks {ended} have ended the call" if ended else ""
                return Difference(calls[number], number, rank, text, one.end.startswith("hangs"))
    for rank, one in enumerate(told):
        last = calls[-1], len(calls) - 1, rank
        if one.end:
            return Difference(*last, f"after all calls it {one.end}")
        if one.living:
            return Difference(*last, f"{', '.join(one.living)} outlive the case")
    return None


def size_of(case: Case) -> tuple[Any, ...]:
    """How large a case is, for a person: ranks, calls, tensors, text."""
    return case["world"], len(case["steps"]), tensors_of(case), len(repr(case))
