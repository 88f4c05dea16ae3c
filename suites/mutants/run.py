"""Plant each fault in a copy of the reference, and judge the copy: `ci/mutants [NAME ...]`.

Exit 0: each fault was caught by a check of the functions that it breaks; 1: one survived; 2: wrong
usage; 3: a fault could not be planted, or the judging itself broke. A fault that shows only on an
accelerator is named as not judged where there is none. First comes the check that is known to catch
a fault (`suites/mutants/caught.json`); what `ci/mutation` has measured of the others saves those
that do not run the lines that a patch changes.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.system import devices, pipes
from mutants import patches, scope
from mutants.catalog import MUTANTS, Mutant
from mutants.executed import Executed, digests_of, one_of_each_first
from mutants.judge import ROOT, CannotPlantError, Judge, Result, from_a_warm_parent
from mutants.patches import Patch
from mutants.statements import numbers_at

Fault = Mutant | Patch
_WORST = {"caught": 0, "unjudged": 0, "survived": 1, "undecided": 1, "broken": 3}
_TOLD = {"caught", "survived"}
CAUGHT = Path(__file__).parent / "caught.json"
"""By fault the check that caught it when `--write` was last given. It says where to begin, no
more: each fault is planted and judged each time."""


class Report:
    """The results so far, on the terminal and in a file that is whole at every moment."""

    def __init__(self, path: Path, total: int) -> None:
        self._path, self._total = path, total
        self._began = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.worst = 0
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, fault: Fault, result: Result) -> None:
        """One fault has been judged."""
        self.worst = max(self.worst, _WORST[result.state])
        row: dict[str, Any] = {"name": fault.name, "fault": fault.fault, **vars(result)}
        if isinstance(fault, Patch):
            row |= {"dimension": fault.dimension, "functions": fault.functions}
        self.rows.append(row)
        step = self._path.with_suffix(".part")
        step.write_text(json.dumps(self.rows, indent=1) + "\n")
        step.replace(self._path)
        done = len(self.rows)
        left = (time.monotonic() - self._began) / done * (self._total - done)
        told = result.said.rpartition("::")[2] if result.state == "caught" else fault.fault
        print(
            f"{done:>3}/{self._total} {result.state:<9} {fault.name:<44} {told}  "
            f"({result.ran} checks, {result.seconds:.1f} s; {left / 60:.0f} min left)",
            flush=True,
        )
        if result.state == "broken":
            print(f"    {result.said}", file=sys.stderr)
        elif result.state == "survived" and result.unrun:
            print(f"    {len(result.unrun)} checks could not run here: {result.unrun[0]}")

    def keep(self, before: Mapping[str, str]) -> None:
        """Write which check caught each, beside what is known of faults that were not judged."""
        found = {r["name"]: r["said"] for r in self.rows if r["state"] == "caught"}
        text = json.dumps({**before, **found}, indent=1, sort_keys=True, ensure_ascii=False)
        CAUGHT.write_text(text + "\n")

    def sum_up(self) -> None:
        """How many of each dimension were caught."""
        counted = collections.Counter((r.get("dimension", 0), r["state"]) for r in self.rows)
        for dimension in sorted({d for d, _ in counted}):
            of_it = {state: n for (d, state), n in counted.items() if d == dimension}
            name = f"{dimension}. {patches.DIMENSIONS[dimension]}" if dimension else "catalog"
            caught, survived = of_it.get("caught", 0), of_it.get("survived", 0)
            others = ", ".join(f"{n} {s}" for s, n in of_it.items() if s not in _TOLD)
            print(f"{name:<34}{caught:>4} of {caught + survived:<4} caught {others}".rstrip())
        print(f"results: {self._path}")


def caught_before(path: Path = CAUGHT) -> dict[str, str]:
    """Fault -> the check that caught it; ValueError where the file says anything else."""
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(check, str) for check in found.values()):
        raise ValueError(f"{path}: expected an object, fault -> the check that caught it")
    return found


def known_first(fault: Fault, checks: list[str], judge: Judge, known: str | None) -> list[str]:
    """The check that caught the fault before, and after it the others."""
    fits = known in judge.items if isinstance(fault, Patch) else known in checks
    if known is None or not fits:
        return checks
    return [known, *(check for check in checks if check != known)]


def that_can_tell(fault: Fault, checks: list[str], judge: Judge, executed: Executed) -> list[str]:
    """The checks that run the lines it changes: of a patch those of its functions first.

    Of a mutant of the catalog only those of its files. What was not measured may run them, too.
    """
    numbers = {n for at in numbers_at(fault.lines()) for n in executed.users_of(at)}
    named = set(checks)
    others = judge.items if isinstance(fault, Patch) else {}
    running = [c for c in executed.checks_of(numbers) if c in named or c in others]
    unknown = one_of_each_first(c for c in checks if c not in executed.checks)
    return [*sorted(running, key=lambda c: c not in named), *unknown]


def judge_all(
    faults: list[Fault], report: Report, first: int | None, before: Mapping[str, str]
) -> None:
    """Judge the faults, those that need the same device from one parent."""
    judged: dict[tuple[str, ...], list[Fault]] = {}
    for fault in faults:
        if isinstance(fault, Mutant) and fault.accelerator and not devices.accelerator():
            report.add(fault, Result("unjudged", "shows on an accelerator only"))
        else:
            judged.setdefault(fault.arguments, []).append(fault)
    for arguments, of_them in judged.items():

        def work(judge: Judge, of_them: list[Fault] = of_them) -> None:
            executed = Executed.read()
            executed.forget_changed(digests_of(judge))
            judge.passing |= {c for c, ran in executed.checks.items() if ran.verdict == "pass"}
            for fault in of_them:
                try:
                    checks = fault.choose(judge.items)
                    if not fault.arguments:  # measured on a CPU
                        checks = that_can_tell(fault, checks, judge, executed)
                    checks = known_first(fault, checks, judge, before.get(fault.name))
                    result = judge.judge(fault.plant, checks[:first])
                    if result.state == "survived" and checks[:first] != checks:
                        result.state = "undecided"
                except CannotPlantError as error:
                    result = Result("broken", str(error))
                report.add(fault, result)

        if status := from_a_warm_parent(work, *arguments):
            report.worst = 3
            print(f"ci/mutants: the parent ended with {status}", file=sys.stderr)


def _scope(fault: Fault) -> scope.Scope:
    return fault.scope if isinstance(fault, Patch) else scope.SCOPES["set"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ci/mutants", description=__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="faults to judge (default: all)")
    add("--list", action="store_true", help="say what each is, and run nothing")
    add(
        "--patches",
        nargs="?",
        type=Path,
        const=patches.FOLDER,
        metavar="DIR",
        help=f"only patches, of this folder (default: {patches.FOLDER.relative_to(ROOT)})",
    )
    add(
        "--callers",
        action="store_true",
        help="patches of what install(callers=True) puts in, judged by suites/integration",
    )
    add(
        "--first",
        type=int,
        metavar="N",
        help="at most N checks for each, those first that are likely to tell: a fault that passes "
        "them, but not all, is undecided",
    )
    add("--write", action="store_true", help=f"keep which check caught each, in {CAUGHT.name}")
    add(
        "--json",
        type=Path,
        default=ROOT / "out" / "mutants.json",
        metavar="FILE",
        help="where the results go (default: out/mutants.json)",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Judge the faults named, or all."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.callers:
        scope.choose("callers")
    if options.patches and not options.patches.is_dir():
        parser.error(f"--patches {options.patches}: expected a folder of patches")
    try:
        faults: list[Fault] = [*patches.read_all((options.patches or patches.FOLDER).absolute())]
    except CannotPlantError as error:
        print(f"ci/mutants: {error}", file=sys.stderr)
        return 3
    if options.patches and not faults:
        parser.error(f"--patches {options.patches}: holds no file NAME.patch")
    if not options.patches:
        faults = [*MUTANTS, *faults]
    others = {f.name for f in faults if _scope(f) is not scope.current()}
    faults = [f for f in faults if f.name not in others]
    misplaced = others & set(options.names) if faults else others
    if misplaced:
        how = "without" if options.callers else "with"
        parser.error(f"judged {how} --callers: {', '.join(sorted(misplaced))}")
    known = {f.name: f for f in faults}
    if unknown := set(options.names) - known.keys():
        parser.error(f"no fault {', '.join(sorted(unknown))}; see ci/mutants --list")
    if options.list:
        for fault in faults:
            print(f"{fault.name:<44} {fault.fault}")
        return 0
    try:
        before = caught_before()
    except ValueError as error:
        parser.error(str(error))
    chosen = [known[n] for n in options.names] or faults
    report = Report(options.json.absolute(), len(chosen))
    judge_all(chosen, report, options.first, before)
    report.sum_up()
    if options.write:
        report.keep(before)
    return report.worst


if __name__ == "__main__":
    sys.exit(pipes.run(main))
