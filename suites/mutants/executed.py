"""Which check executes which statement of the reference, and could tell which mutant of it.

It is measured once and kept in a file. A copy of the reference sets marks as it runs, in memory
that the parent shares with all ranks: that holds for threads of autograd and for ranks that are
killed, and costs no file and no tracer. What was measured of a check holds while the reference and
the check's own source stay as they were.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mutants import marks
from mutants.instrument import marks_of_mutants, plant_marks
from mutants.judge import ROOT, Judge, path_of
from mutants.scope import current
from mutants.statements import Statement, digest_of_the_reference, statements

FOLDER = ROOT / "out" / "mutation"
_SAVE_EVERY = 100
_IMPORT = "<import>"


def _taken() -> dict[str, Any]:
    return {"executed": f"{marks.taken():x}"}


@dataclass
class Ran:
    """What was measured of one check."""

    source: str
    """A digest of what the check consists of."""
    seconds: float
    verdict: str
    executed: str
    """Hexadecimal, a bit for each mark."""

    @functools.cached_property
    def bits(self) -> int:
        return int(self.executed, 16)


@dataclass
class Executed:
    """What each check executes."""

    path: Path
    checks: dict[str, Ran] = field(default_factory=dict)
    on_import: str = "0"
    """What the import of the reference executes, as in Ran."""

    @classmethod
    def read(cls, folder: Path = FOLDER) -> Executed:
        """What was measured of the reference of today, perhaps nothing."""
        numbers = [(mutant.key, mark) for mutant, mark in marks_of_mutants().items()]
        digest = hashlib.sha256(repr((digest_of_the_reference(), numbers)).encode()).hexdigest()
        path = folder / f"executed-{digest[:16]}.json"
        data = json.loads(path.read_text()) if path.exists() else {}
        on_import = data.pop(_IMPORT, "0")
        return cls(path, {check: Ran(**ran) for check, ran in data.items()}, on_import)

    def write(self) -> None:
        """Keep it; the file is whole at every moment."""
        path = self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        step = path.with_suffix(".part")
        data: dict[str, Any] = {c: dataclasses.asdict(ran) for c, ran in self.checks.items()}
        data[_IMPORT] = self.on_import
        step.write_text(json.dumps(data) + "\n")
        step.replace(path)

    def forget_changed(self, digests: Mapping[str, str]) -> None:
        """Keep only the checks that were seen to pass and have not changed since."""
        self.checks = {
            check: ran
            for check, ran in self.checks.items()
            if digests.get(check) == ran.source and ran.verdict in {"pass", "precondition"}
        }

    def measure(self, judge: Judge, say: Callable[[int, int], None]) -> None:
        """Run the checks that have not been seen to pass, and forget those that are gone."""
        digests = digests_of(judge)
        self.forget_changed(digests)
        missing = [check for check in judge.items if check not in self.checks]
        if not missing:
            return
        judge.after_check = _taken
        try:
            with marks.in_a_file():
                self._take(judge, missing, digests, say)
        finally:
            judge.after_check = dict
            self.write()

    def _take(
        self,
        judge: Judge,
        missing: list[str],
        digests: dict[str, str],
        say: Callable[[int, int], None],
    ) -> None:
        left = set(missing)
        for done, word in enumerate(judge.run(plant_marks, missing, to_the_end=True)):
            if reason := word.get("broken") or word.get("import") or word.get("silent"):
                raise RuntimeError(f"the checks could not be measured: {reason}")
            if "on_import" in word:
                self.on_import = word["on_import"]["executed"]
            if "check" in word:
                left.discard(word["check"])
                self.checks[word["check"]] = Ran(
                    digests[word["check"]], word["seconds"], word["verdict"], word["executed"]
                )
            if done % _SAVE_EVERY == 0:
                self.write()
                say(done, len(missing))
        if left:
            raise RuntimeError(f"the session ended before {len(left)} checks were measured")

    def checks_of(self, numbers: Iterable[int], mark: int | None = None) -> list[str]:
        """The checks that execute one of the statements, those first that are likely to tell.

        With the mark of a mutant: only those that set it. First come the checks of which the
        functions around the statements are the greatest part, for their time.
        """
        every = statements()
        wanted = sum(1 << n for n in set(numbers)) if mark is None else 1 << mark
        around = {(every[n].file, every[n].function) for n in numbers}
        near = sum(1 << n for n, s in enumerate(every) if (s.file, s.function) in around)
        found = [c for c, ran in self.checks.items() if ran.bits & wanted]

        def worth(check: str) -> float:
            ran = self.checks[check]
            return (ran.bits & near).bit_count() / ran.bits.bit_count() / (0.1 + ran.seconds)

        return one_of_each_first(sorted(found, key=worth, reverse=True))

    def unexecuted(self) -> list[Statement]:
        """The statements that neither a check nor the import executes."""
        union = int(self.on_import, 16) | self._executed()
        return [s for n, s in enumerate(statements()) if not s.imported and not union >> n & 1]

    def _executed(self) -> int:
        union = 0
        for ran in self.checks.values():
            union |= ran.bits
        return union

    def users_of(self, number: int) -> set[int]:
        """The statements that checks run where they depend on this one.

        Itself, and where it runs on import: those that use a name that it binds, or one that is
        bound with the help of such a name; and all that is inside of it, where it is a function or
        a class.
        """
        every = statements()
        here = every[number]
        # In a check, too, perhaps: one that starts an interpreter imports the reference there.
        early = int(self.on_import, 16) >> number & 1
        if not here.imported and not early:
            return {number}
        names: set[str] = set()
        new = set(here.bound) if here.imported else {here.function.rpartition(".")[2]}
        found: set[int] = set()
        while new:
            names |= new
            found |= {n for n, s in enumerate(every) if s.used & new}
            new = {name for n in found if every[n].imported for name in every[n].bound} - names
        if here.imported and (inside := here.defines or here.function):
            found |= {
                n
                for n, s in enumerate(every)
                if s.file == here.file and f"{s.function}.".startswith(f"{inside}.")
            }
        return {n for n in found | {number} if not every[n].imported}


def digests_of(judge: Judge) -> dict[str, str]:
    """Check -> a digest of its source as it is now."""
    return {check: _digest(check.partition("::")[0]) for check in judge.items}


def one_of_each_first(checks: Iterable[str]) -> list[str]:
    """One variant of each check before the second of any, for they mostly agree.

    And so do checks of one class: one of each before the second of any.
    """
    found = list(checks)
    for family_of in (_check_of, _class_of):
        seen: collections.Counter[str] = collections.Counter()
        order: dict[str, int] = {}
        for check in found:
            family = family_of(check)
            order[check] = seen[family]
            seen[family] += 1
        found.sort(key=order.__getitem__)
    return found


def _check_of(variant: str) -> str:
    return variant.partition("[")[0]


def _class_of(variant: str) -> str:
    return _check_of(variant).rpartition("::")[0]


@functools.cache
def _digest(file: str) -> str:
    """Of a file of checks and of what all checks share."""
    suite = sorted((ROOT / current().suite).rglob("*.py"))
    parts = [path_of(file), *(p for p in suite if not p.name.startswith("test_"))]
    return hashlib.sha256(b"".join(p.read_bytes() for p in parts)).hexdigest()[:16]
