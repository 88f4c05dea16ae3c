"""Libraries under torch as it is, and with the reference: `python -m ecosystem.table RUN`.

RUN holds a run of the same checks for torch and one for each moment of install(). What was right
must stay right, with the same bits; exit 1 where it does not, 3 where a run is missing or did not
run what it selected.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecosystem.digests import read as read_digests
from harness.system import pipes
from report.read import BadResultsError, read

TORCH = "torch"
MOMENTS = ("after", "before", "twice")
_WRONG = re.compile(r"(^|: )(AssertionError|assert )")


@dataclass(frozen=True)
class Cell:
    """What a check ended in."""

    outcome: str
    """right; wrong: another result than it must be; error: none; not run."""
    message: str = ""


def cell(check: dict[str, Any]) -> Cell:
    """The outcome of one check of a run."""
    verdict, message = check["verdict"], check["message"].partition("\n")[0]
    if verdict == "pass":
        return Cell("right")
    if verdict == "precondition":
        return Cell("not run", message)
    return Cell("wrong" if verdict == "fail" and _WRONG.search(message) else "error", message)


class NotJudgedError(Exception):
    """The runs do not say what the table must: the text says why."""


class Runs:
    """The runs of all subjects over the same checks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data: dict[str, dict[str, Any]] = {}
        for name in (TORCH, *MOMENTS):
            try:
                self.data[name] = read(folder / name)
            except BadResultsError as error:
                raise NotJudgedError(str(error)) from None
            if (status := self.data[name]["run"]["exit"]) not in {0, 1}:
                raise NotJudgedError(f"{folder / name}: the run ended with {status}")
        self.checks = {
            name: {c["id"]: c for c in data["checks"] if c["module"] == "ecosystem"}
            for name, data in self.data.items()
        }
        if len({frozenset(checks) for checks in self.checks.values()}) != 1:
            raise NotJudgedError(f"{folder}: the runs hold different checks")
        if not self.checks[TORCH]:
            raise NotJudgedError(f"{folder}: the runs hold no scenario")
        self.cells = {n: {i: cell(c) for i, c in of.items()} for n, of in self.checks.items()}

    def turned(self) -> Iterator[tuple[str, str, str]]:
        """(check, moment, why) for each that was right under torch, and is not the same now."""
        for identity, before in self.cells[TORCH].items():
            if before.outcome != "right":
                continue
            for moment in MOMENTS:
                now = self.cells[moment][identity]
                if now.outcome != "right":
                    yield identity, moment, f"{now.outcome}: {now.message}"
                elif other := self.other_bits(identity, moment):
                    yield identity, moment, f"other bits: {other}"

    def other_bits(self, identity: str, moment: str) -> str:
        """Names of digests that differ from those under torch, and the ranks."""
        one, other = (read_digests(self.folder / name, identity) for name in (TORCH, moment))
        found = defaultdict(list)
        for rank in one.keys() | other.keys():
            mine, theirs = one.get(rank, {}), other.get(rank, {})
            for name in mine.keys() | theirs.keys():
                if mine.get(name) != theirs.get(name):
                    found[name].append(rank)
        return ", ".join(f"{name} on {' '.join(sorted(on))}" for name, on in sorted(found.items()))

    def reference(self, identity: str) -> Cell:
        """The worst of the three moments."""
        worst = ("error", "wrong", "not run", "right")
        return min(
            (self.cells[moment][identity] for moment in MOMENTS),
            key=lambda found: worst.index(found.outcome),
        )


def lines(runs: Runs) -> Iterator[str]:
    """The table, in Markdown: a row for each scenario of each library."""
    rows: dict[tuple[str, str], list[str]] = defaultdict(list)
    for identity, check in runs.checks[TORCH].items():
        rows[check["function"], scenario(identity)].append(identity)
    yield "| library | scenario | torch as it is | with the reference |"
    yield "| --- | --- | --- | --- |"
    for (library, name), identities in sorted(rows.items()):
        before = summary([runs.cells[TORCH][i] for i in identities])
        after = summary([runs.reference(i) for i in identities])
        yield f"| {library} | {name} | {before} | {after} |"


def scenario(identity: str) -> str:
    """A check's class and name in words, without its parameters."""
    path = identity.partition("[")[0].split("::")
    name = path[-1].removeprefix("test_").replace("_", " ")
    return f"{path[1].removeprefix('Test')}: {name}" if len(path) > 2 else name


def summary(cells: list[Cell]) -> str:
    """`right 4`, or `right 2, error 2`."""
    counts = Counter(c.outcome for c in cells)
    return ", ".join(
        f"{name} {counts[name]}" for name in ("right", "wrong", "error", "not run") if counts[name]
    )


def main() -> int:
    """Print the table and what turned; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ecosystem.table", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument(
        "--reasons", action="store_true", help="also say why the others are not right"
    )
    options = parser.parse_args()
    try:
        runs = Runs(options.run)
    except NotJudgedError as error:
        print(f"ci/ecosystem: {error}", file=sys.stderr)
        return 3
    print("\n".join(lines(runs)))
    if options.reasons:
        for identity, found in runs.cells[TORCH].items():
            for name, now in ((TORCH, found), ("reference", runs.reference(identity))):
                if now.outcome != "right":
                    print(f"\n{name}: {identity}\n  {now.outcome}: {now.message[:300]}")
    turned = list(runs.turned())
    print()
    for identity, moment, why in turned:
        print(f"TURNED  {identity}\n  install() {moment}   {why[:400]}", file=sys.stderr)
    total = len(runs.cells[TORCH])
    right = sum(found.outcome == "right" for found in runs.cells[TORCH].values())
    bad = len({identity for identity, _, _ in turned})
    print(f"{total} scenarios, {right} right under torch as it is: {bad} of them no longer are")
    if any(found.outcome == "not run" for of in runs.cells.values() for found in of.values()):
        print("ci/ecosystem: not all scenarios ran (--reasons)", file=sys.stderr)
        return 3
    return 1 if turned else 0


if __name__ == "__main__":
    sys.exit(pipes.run(main))
