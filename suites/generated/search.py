"""Hypothesis, driven from the parent: a case goes to all ranks, and a failure is made smaller."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import hypothesis
from hypothesis import strategies as st
from hypothesis.internal.conjecture import engine

from generated import load_cases, module_cases, more_cases  # noqa: F401  (they register strategies)
from generated.calls import CALLS
from generated.cases import STRATEGIES, Case
from generated.judge import Difference, judge, size_of
from generated.world import Stage

BATCH = 25
"""Cases that Hypothesis draws before it starts anew, with another seed."""


@dataclass
class Failure:
    """A difference, with the smallest case that was found to show it."""

    case: Case
    difference: Difference
    cases: int
    """Cases until it was first seen."""
    seconds: float
    """Until it was first seen."""


@dataclass
class Search:
    """Draws cases and judges them, until its time is over or a failure is small."""

    stage: Stage
    functions: tuple[str, ...]
    seed: int
    seconds: float
    shrinking: float = 60.0
    """Seconds for making a failure smaller."""
    told: Callable[[str], None] = lambda _: None
    failed: Callable[[Failure], None] = lambda _: None
    """Hears of each failure, once it is small."""
    most: int = 0
    """Cases of each function, instead of a time; 0: as many as there is time for."""
    first: bool = False
    """Whether to end with the first failure."""
    cases: int = 0
    found: list[Failure] = field(default_factory=list)
    known: set[str] = field(default_factory=set)
    """Kinds of differences that are not looked for any more."""
    slow: list[str] = field(default_factory=list)
    """Ranks that seemed to hang, and did not when the case was run again by itself."""

    def run(self) -> list[Failure]:
        """The failures, one of each kind."""
        begin = time.monotonic()
        number = 0
        turns = len(self.functions) if self.most else None
        while time.monotonic() - begin < self.seconds and not (self.first and self.found):
            if number == turns:
                break
            function = self.functions[number % len(self.functions)]
            number += 1
            left = self.seconds - (time.monotonic() - begin)
            failure = self._batch(function, self.seed * 1_000_003 + number, left)
            if failure is not None:
                failure.seconds = time.monotonic() - begin - failure.seconds
                self.found.append(failure)
                self.known.add(failure.difference.kind)
                self.failed(failure)
            gone = time.monotonic() - begin
            self.told(
                f"{gone:4.0f} of {self.seconds:.0f} s, {self.cases} cases, "
                f"{len(self.found)} differences; last {function}"
            )
        return self.found

    def _batch(self, function: str, seed: int, left: float) -> Failure | None:
        best: list[tuple[Any, Case, Difference]] = []
        deadline = time.monotonic() + left
        first: list[tuple[float, int]] = []
        kinds: dict[str, type[Exception]] = {}

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=self.most or BATCH,
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            database=None,
            deadline=None,
            derandomize=False,
            report_multiple_bugs=False,
            print_blob=False,
            verbosity=hypothesis.Verbosity.quiet,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(STRATEGIES[function]())
        def one(case: Case) -> None:
            if first:
                if time.monotonic() - first[0][0] > self.shrinking:
                    return
            elif time.monotonic() > deadline:
                return
            self.cases += not first
            difference = self._judged(case, quick=bool(first) and best[0][2].hang)
            if difference is None or difference.kind in self.known:
                return
            if not first:
                first.append((time.monotonic(), self.cases))
                kinds[difference.kind] = type("Different", (AssertionError,), {})
            if difference.kind not in kinds:
                return  # another failure is another search's
            best.append((size_of(case), case, difference))
            raise kinds[difference.kind](str(difference))

        engine.MAX_SHRINKING_SECONDS = int(self.shrinking)
        try:
            one()
        except AssertionError:
            pass
        except (hypothesis.errors.FlakyFailure, hypothesis.errors.Flaky):
            pass  # one that no longer failed, or that was out of time: the smallest is known
        if not best:
            return None
        _, case, difference = min(best, key=lambda item: item[0])
        return Failure(case, difference, first[0][1], time.monotonic() - first[0][0])

    def _judged(self, case: Case, *, quick: bool) -> Difference | None:
        difference = judge(self.stage, case, quick=quick)
        if difference is not None and difference.hang and not quick:
            again = judge(self.stage, case, fresh=True)
            if again is None:
                self.slow.append(str(difference))
            return again
        return difference


_TOGETHER = {
    "seams": ("unflatten_tensor", "sync_grad"),
    "chunks": ("chunk_dtensor", "chunk_tensor"),
    "boxes": ("box_for", "metadata"),
    "module": ("wrap",),
    "sequence": (),
}
"""Strategies that draw several calls."""


def upstream_names() -> dict[str, list[str]]:
    """Name of a strategy -> upstream's names of the functions that its cases call."""
    return {
        name: [
            function.rpartition(".")[2]
            for call in _TOGETHER.get(name, (name,))
            for function in CALLS[call].function.split()
        ]
        for name in STRATEGIES
    }


def functions(names: Iterable[str]) -> tuple[str, ...]:
    """The strategies of these names, or of upstream's names, or all; LookupError for others."""
    known = upstream_names()
    chosen: list[str] = []
    for name in names:
        found = [name] if name in known else [k for k, theirs in known.items() if name in theirs]
        if not found:
            raise LookupError(f"no function {name}; --list names those that there are")
        chosen += found
    return tuple(dict.fromkeys(chosen)) or tuple(STRATEGIES)


__all__ = ["STRATEGIES", "Failure", "Search", "functions", "st"]
