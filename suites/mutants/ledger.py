"""What became of each automatic mutant when it was last judged: a line each in judged.jsonl."""

from __future__ import annotations

import collections
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutants import answers
from mutants.answers import Answer, entry_for
from mutants.judge import ROOT, Result
from mutants.operators import Automatic
from mutants.scope import current
from mutants.statements import digest_of_the_reference

_NAME = "judged.jsonl"
_OPEN = {"broken", "undecided"}


@functools.cache
def state_of_the_code() -> str:
    """A digest of the reference and of the checks."""
    paths = [*sorted((ROOT / current().suite).rglob("*.py"))]
    paths += [ROOT / file for file in current().besides]
    checks = [path.read_bytes() for path in paths]
    return hashlib.sha256(repr((digest_of_the_reference(), checks)).encode()).hexdigest()[:16]


@dataclass
class Ledger:
    """The last verdict on each mutant, by its key."""

    folder: Path
    rows: dict[tuple[str, ...], dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        """What has been judged, in any state of the code."""
        path = folder / _NAME
        lines = path.read_text().splitlines() if path.exists() else []
        rows = (json.loads(line) for line in lines if line.endswith("}"))
        return cls(folder, {tuple(row["key"]): row for row in rows})

    def add(self, mutant: Automatic, result: Result) -> None:
        """One has been judged: kept at once, for a run may be ended at any moment."""
        row = {"key": mutant.key, "name": mutant.name, "code": state_of_the_code(), **vars(result)}
        self.rows[mutant.key] = row
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _NAME).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def is_current(self, mutant: Automatic) -> bool:
        """Whether it was judged as the code stands."""
        row = self.rows.get(mutant.key)
        return row is not None and row["code"] == state_of_the_code() and row["state"] not in _OPEN

    def state_of(self, mutant: Automatic) -> str:
        """The last verdict on it, of whatever state of the code."""
        row = self.rows.get(mutant.key)
        return row["state"] if row else "unjudged"

    def report(self, mutants: Sequence[Automatic], known: Mapping[Automatic, Answer]) -> int:
        """Print the score by module and who survived without an answer; the exit status."""
        count: dict[str, collections.Counter[str]] = {}
        open_questions: list[Automatic] = []
        seconds: list[float] = []
        for mutant in mutants:
            row, state = self.rows.get(mutant.key), self.state_of(mutant)
            answer = known.get(mutant)
            if answer and answer.equivalent:
                state = "wrong answer" if state == "caught" else "equivalent"
            elif state in {"survived", "unexecuted"}:
                open_questions.append(mutant)
            if row:
                seconds.append(row["seconds"])
            count.setdefault(mutant.file, collections.Counter())[state] += 1
        states = (
            "caught",
            "survived",
            "unexecuted",
            "undecided",
            "equivalent",
            "unreached",
            "unjudged",
        )
        print(f"{'module':<46}{'score':>7}" + "".join(f"{s:>12}" for s in states))
        total: collections.Counter[str] = collections.Counter()
        for file, of_it in sorted(count.items()):
            total += of_it
            print(_line(file, of_it, states))
        print(_line("all", total, states))
        judged = len(seconds)
        print(f"{judged} judged, {sum(seconds) / max(judged, 1):.1f} s each")
        if open_questions:
            path = self.folder / "survivors.toml"
            path.write_text("\n".join(entry_for(m, equivalent="") for m in open_questions))
            print(f"{len(open_questions)} to be answered in {answers.PATH.name}: {path}")
        if total["wrong answer"] or total["broken"]:
            wrong, broken = total["wrong answer"], total["broken"]
            print(f"{wrong} are said to be equivalent, and caught; {broken} could not be judged")
            return 3
        return 1 if open_questions else 0


def _line(name: str, of_it: Mapping[str, int], states: Sequence[str]) -> str:
    caught = of_it.get("caught", 0)
    told = caught + of_it.get("survived", 0) + of_it.get("unexecuted", 0)
    score = f"{100 * caught / told:.1f}%" if told else "-"
    return f"{name:<46}{score:>7}" + "".join(f"{of_it.get(s, 0):>12}" for s in states)
