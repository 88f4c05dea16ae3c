"""What a night found, for a person and for the next night."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from defects import summary
from nightly import speed, verdicts
from nightly.chain import ORDERS, Step
from nightly.speed import Speed
from nightly.verdicts import Comparison
from report.changes import changes
from report.compare import NotComparableError

SHOWN = 50
"""Lines of a list in the report; night.json has them all."""


@dataclass
class Found:
    """The outcome of one night."""

    title: str
    results: list[dict[str, Any]]
    """Of each order."""
    now: dict[str, str]
    compared: Comparison
    split: dict[str, list[str]]
    """Checks whose verdict depends on the order, to what each order says."""
    speed: Speed | None
    steps: list[Step]
    weak: bool = False
    """Whether a mutant of the reference survives, and nothing says why."""
    generated: list[str] = dataclasses.field(default_factory=list)
    """What differed from the oracle in generated cases of the reference."""
    before: dict[str, Any] | None = None
    """The results of the last night; None where it is gone, or was of other checks."""

    reproduced: list[str] = dataclasses.field(default_factory=list)
    """Reproducers that do not show what the catalogue says."""

    @property
    def bad(self) -> dict[str, str]:
        """The verdicts that nothing expects."""
        return verdicts.unexpected(self.now)

    @property
    def wrong(self) -> bool:
        """Whether something is to be mended; a verdict that changed for the better is not."""
        slow = self.speed is not None and bool(self.speed.slower or self.speed.gone)
        found = self.compared.lost or slow or self.weak or self.generated
        return bool(self.bad or self.split or found or self.reproduced)

    @property
    def news(self) -> bool:
        """Whether tonight differs from the night before."""
        return bool(self.compared.changed or self.compared.lost)

    def findings(self) -> Iterator[str]:
        """Each reason for which the night is not green, in one line."""
        compared, fast = self.compared, self.speed
        if self.bad:
            yield f"{len(self.bad)} unexpected verdicts"
        if compared.changed:
            yield f"{len(compared.changed)} verdicts changed since the last night"
        if compared.lost:
            yield (
                f"{len(compared.lost)} checks gave a verdict before and give none now "
                f"({compared.ran_now} ran, {compared.ran_before} before); "
                "--accept, where that is meant"
            )
        if self.split:
            yield f"{len(self.split)} checks depend on the order"
        if self.generated:
            yield f"{len(self.generated)} generated cases of the reference differ from the oracle"
        if self.reproduced:
            yield f"{len(self.reproduced)} reproducers do not show what the catalogue says"
        if fast is not None and not fast.measured:
            yield "no benchmark gave a number in both runs"
        if fast is not None and fast.slower:
            yield f"{len(fast.slower)} benchmarks are slower than in the last green night"
        if fast is not None and fast.gone:
            yield f"{len(fast.gone)} benchmarks of the last green night gave no number"
        if self.weak:
            yield "automatic mutants survive without an answer: mutation.log names them"

    def as_json(self) -> dict[str, Any]:
        """All of it, for machines."""
        return {
            "title": self.title,
            "wrong": self.wrong,
            "news": self.news,
            "findings": list(self.findings()),
            "compared": dataclasses.asdict(self.compared),
            "unexpected": self.bad,
            "order": self.split,
            "generated": self.generated,
            "reproducers": self.reproduced,
            "speed": dataclasses.asdict(self.speed) if self.speed else None,
            "steps": [dataclasses.asdict(step) for step in self.steps],
        }

    def markdown(self) -> str:
        """The night for a person."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        run = self.results[0]["run"]
        yield f"# {self.title}"
        yield ""
        yield (
            f"commit {run['commit'] or 'unknown'}; torch {run['torch']}; "
            f"{self.compared.ran_now} checks ran"
        )
        yield ""
        yield from [f"- **{f}**" for f in self.findings()] or ["Nothing to report."]
        yield from _list("Defects", list(summary.lines(self.results[0])))
        yield from _list("Defects since the last night", self._defects_since())
        changed = self.compared.changed.items()
        yield from _list("Changed", [f"`{c}`: {a} -> **{b}**" for c, (a, b) in changed])
        yield from _list("Unexpected", [self._failure(check) for check in self.bad])
        yield from _list("Lost", [f"`{c}`: was {v}" for c, v in self.compared.lost.items()])
        yield from _list(
            "Depend on the order",
            [
                f"`{check}`: " + ", ".join(f"{o} {v}" for o, v in zip(ORDERS, said, strict=True))
                for check, said in self.split.items()
            ],
        )
        yield from _list("Generated cases", self.generated)
        yield from _list("Reproducers", self.reproduced)
        if fast := self.speed:
            yield from _list(
                f"Slower (gate: {speed.SPREADS:g} x the {fast.spread:.0%} between two runs)",
                [f"{n}: {a:.2f} -> **{b:.2f}** x the floor" for n, (a, b) in fast.slower.items()],
            )
            yield from _list("Without a number", fast.gone)
        yield from _list(
            "Steps", [f"{s.name}: exit {s.status}, {s.seconds:g} s" for s in self.steps]
        )

    def _defects_since(self) -> list[str]:
        """Which defects appeared, which went; nothing where no night is there to compare with."""
        if self.before is None:
            return []
        try:
            found = changes(self.before, self.results[0])
        except NotComparableError:
            return []
        both = (("appeared", found.appeared), ("went", found.vanished))
        return [f"{i} {how} ({len(ids)} checks)" for how, group in both for i, ids in group.items()]

    def _failure(self, check: str) -> str:
        verdict = self.bad[check]
        for results in self.results:
            for one in results["checks"]:
                if one["id"] == check and one["verdict"] == verdict:
                    return f"`{check}`: **{verdict}**: {one['message'][:300]}\n  `{one['command']}`"
        return f"`{check}`: **{verdict}**"


def _list(title: str, lines: list[str]) -> Iterator[str]:
    if lines:
        yield ""
        yield f"## {title}"
        yield ""
        yield from (f"- {line}" for line in lines[:SHOWN])
        if len(lines) > SHOWN:
            yield f"- and {len(lines) - SHOWN} more, in night.json"
