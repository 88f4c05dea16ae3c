"""Judge automatic mutants of the reference by the checks that execute their line: `ci/mutation`.

Exit 0: each mutant that was judged is caught, or is answered in suites/mutants/survivors.toml;
1: one survives, or no check executes it; 2: wrong usage; 3: an answer does not hold, or the judging
itself broke.
"""

from __future__ import annotations

import argparse
import collections
import fnmatch
import hashlib
import itertools
import re
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from harness.system import pipes
from mutants import answers, scope
from mutants.answers import Answer, BadAnswerError
from mutants.executed import FOLDER, Executed
from mutants.instrument import marks_of_mutants
from mutants.judge import BAD, Judge, Result, from_a_warm_parent
from mutants.ledger import Ledger
from mutants.operators import Automatic, all_mutants
from mutants.statements import Statement, sources, statements

_FIRST = 3
"""How many of the checks that have caught most are tried first: of its function, file, of all."""
_REASON = re.compile(r"#\s*Not reached (on a CPU|with torch [\d.]+): \S")


def chosen_of(mutants: Sequence[Automatic], options: argparse.Namespace) -> list[Automatic]:
    """The mutants that the options name, in an order that they alone decide."""
    wanted = options.module or ["*"]
    found = [m for m in mutants if any(fnmatch.fnmatch(m.file, f"*{w}") for w in wanted)]
    if options.shard:
        number, count = options.shard
        found = [m for m in found if _place(m, "shard") % count == number - 1]
    if options.sample is not None:
        # By digest: what is drawn does not change with code elsewhere.
        found = sorted(found, key=lambda m: _place(m, str(options.seed)))[: options.sample]
    if options.each is not None:
        drawn: dict[str, list[Automatic]] = {}
        for mutant in sorted(found, key=lambda m: _place(m, str(options.seed))):
            drawn.setdefault(mutant.file, []).append(mutant)
        # The first of each module before the second of any: --minutes may end it anywhere.
        rounds = itertools.zip_longest(*(of_it[: options.each] for of_it in drawn.values()))
        found = [m for of_round in rounds for m in of_round if m is not None]
    return found


def _place(mutant: Automatic, salt: str) -> int:
    return int(hashlib.sha256(repr((salt, mutant.key)).encode()).hexdigest()[:12], 16)


class Selection:
    """The checks that are to judge each mutant."""

    def __init__(self, executed: Executed, ledger: Ledger) -> None:
        self._executed = executed
        self._number = {(s.file, s.line): n for n, s in enumerate(statements())}
        self._caught: dict[tuple[str, ...], collections.Counter[str]] = {}
        for row in ledger.rows.values():
            self.learn(row["key"][0], row["key"][1], row["state"], row["said"])

    def place(self, mutant: Automatic) -> Statement:
        """The statement that the mutant stands in."""
        return statements()[self._number[mutant.file, mutant.line]]

    def runs(self, mutant: Automatic) -> bool:
        """Whether a check executes the statement that the mutant stands in."""
        users = self._executed.users_of(self._number[mutant.file, mutant.line])
        return bool(self._executed.checks_of(users))

    def of(self, mutant: Automatic, answer: Answer | None) -> list[str]:
        """Those that could tell, in the order in which they are likely to."""
        number = self._number[mutant.file, mutant.line]
        users = self._executed.users_of(number)
        mark = marks_of_mutants()[mutant] if users == {number} else None
        found = self._executed.checks_of(users, mark)
        first = []
        for around in ((mutant.file, mutant.function), (mutant.file,), ()):
            counted = self._caught.get(around, collections.Counter())
            first += [c for c, _ in counted.most_common() if c in found][:_FIRST]
        if answer and answer.check:
            first = [c for c in found if c.partition("[")[0] == answer.check.partition("[")[0]]
        return list(dict.fromkeys([*first, *found]))

    def learn(self, file: str, function: str, state: str, check: str) -> None:
        """Remember which check caught one, in which function."""
        if state == "caught":
            for around in ((file, function), (file,), ()):
                self._caught.setdefault(around, collections.Counter())[check] += 1


def measure(executed: Executed, judge: Judge) -> None:
    """Bring what is known of the checks up to date."""
    began = time.monotonic()

    def say(done: int, total: int) -> None:
        if done:
            left = (time.monotonic() - began) / done * (total - done)
            print(f"    measured {done} of {total} checks, {left / 60:.0f} min left", flush=True)

    print("--- which check executes what", flush=True)
    executed.measure(judge, say)
    if bad := [c for c, ran in executed.checks.items() if ran.verdict in BAD]:
        print(f"    {len(bad)} checks do not pass on the reference and judge nothing: {bad[0]}")
        for check in bad:
            del executed.checks[check]
    judge.passing |= {c for c, ran in executed.checks.items() if ran.verdict == "pass"}


def judge_all(
    judge: Judge,
    chosen: Sequence[Automatic],
    known: dict[Automatic, Answer],
    executed: Executed,
    ledger: Ledger,
    options: argparse.Namespace,
) -> int:
    """Judge the mutants one after the other; the ledger has each at once. Returns how many."""
    selection = Selection(executed, ledger)
    explained = {s for block, why in unexecuted_blocks(executed) if why for s in block}
    began = time.monotonic()
    print(f"--- {len(chosen)} mutants", flush=True)
    for done, mutant in enumerate(chosen, 1):
        if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
            print(f"    {options.minutes:g} minutes are over", flush=True)
            return done - 1
        checks = selection.of(mutant, known.get(mutant))
        tried = checks[: options.first]
        if checks:
            result = judge.judge(mutant.plant, tried)
        elif not selection.runs(mutant):
            result = Result("unreached" if selection.place(mutant) in explained else "unexecuted")
        elif mutant.operator == "condition" and _leads_to(selection.place(mutant), explained):
            result = Result("unreached")
        else:
            result = Result("survived", message="in no check it computes anything else")
        if result.state == "survived" and len(tried) < len(checks):
            result.state = "undecided"
        selection.learn(mutant.file, mutant.function, result.state, result.said)
        ledger.add(mutant, result)
        left = (time.monotonic() - began) / done * (len(chosen) - done) / 60
        print(
            f"{done:>4}/{len(chosen)} {result.state:<11}{mutant.name[:150]}  "
            f"({result.ran} of {len(checks)} checks, {result.seconds:.1f} s; {left:.0f} min left)",
            flush=True,
        )
        if result.state == "broken":
            print(f"    {result.said}", file=sys.stderr)
    return len(chosen)


def _leads_to(test: Statement, explained: Collection[Statement]) -> bool:
    """Whether a branch of the statement is among those that cannot be reached here."""
    return any(s.file == test.file and test.line < s.line <= test.end for s in explained)


def unexecuted_blocks(executed: Executed) -> Iterator[tuple[list[Statement], bool]]:
    """Runs of statements that no check executes, and whether a comment says why.

    It stands in the block or above it, above the function or class that the block is part of, or
    in a block around it.
    """
    every = statements()
    lines = {file: text.splitlines() for file, text in sources().items()}
    order = {s: n for n, s in enumerate(every)}
    groups = itertools.groupby(
        enumerate(executed.unexecuted()),
        lambda pair: (pair[1].file, pair[1].function, order[pair[1]] - pair[0]),
    )
    outer: list[Statement] = []
    for (file, function, _), group in groups:
        block = [statement for _, statement in group]
        around = [s for s in every if s.file == file and f"{function}.".startswith(f"{s.defines}.")]
        spans = [(block[0].line, max(s.end for s in block))]
        spans += [(s.line, s.line) for s in around if s.defines]
        said = (line for a, b in spans for line in lines[file][max(a - 3, 0) : b])
        found = any(map(_REASON.search, said)) or any(
            s.file == file and s.line < block[0].line <= s.end for s in outer
        )
        outer += block if found else []
        yield block, found


def tell_unexecuted(executed: Executed) -> int:
    """Print the blocks that no check executes; 1 when one is without a reason."""
    unexplained = 0
    for block, explained in unexecuted_blocks(executed):
        first, last = block[0], max(s.end for s in block)
        unexplained += not explained
        mark = "explained  " if explained else "unexecuted "
        print(f"{mark}{first.file}:{first.line}-{last} {first.function}: {first.text[:100]}")
    total = sum(not s.imported for s in statements())
    missing = len(executed.unexecuted())
    print(f"{missing} of {total} statements, in {unexplained} blocks without a reason")
    return 1 if unexplained else 0


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected K/N with K from 1 to N")
    return int(found[1]), int(found[2])


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ci/mutation", description=__doc__)
    add = parser.add_argument
    add(
        "--callers",
        action="store_true",
        help="of what install(callers=True) puts in, judged by suites/integration",
    )
    add("--module", action="append", metavar="GLOB", help="only files that match: grid.py, fsdp/*")
    add("--sample", type=int, metavar="N", help="N of them, the same ones for the same seed")
    add("--each", type=int, metavar="N", help="N of each module, the same ones for the same seed")
    add("--seed", type=int, default=0, metavar="S", help="of the sample (default: %(default)s)")
    add("--shard", type=_shard, metavar="K/N", help="the K-th of N parts")
    add("--resume", action="store_true", help="leave out what was judged of the code as it is")
    add(
        "--again",
        action="append",
        metavar="STATE",
        help="only those of which the last verdict was that: survived, undecided, unexecuted",
    )
    add("--minutes", type=float, metavar="M", help="start no mutant after M minutes")
    add(
        "--first",
        type=int,
        metavar="N",
        help="at most N checks for each, those first that are likely to tell: a mutant that passes "
        "them, but not all that run its line, is undecided",
    )
    add(
        "--equivalent", action="store_true", help="judge those, too, that are said to be equivalent"
    )
    add("--state", type=Path, default=FOLDER, metavar="DIR", help="default: out/mutation")
    add("--list", action="store_true", help="name the mutants, and judge none")
    add("--report", action="store_true", help="the score of what was judged so far, by module")
    add("--unexecuted", action="store_true", help="list what no check executes")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Judge the mutants that the options name, or tell what is known of them."""
    options = _options(arguments)
    if options.callers:
        scope.choose("callers")
    mutants = all_mutants()
    try:
        known = answers.read(mutants)
    except BadAnswerError as error:
        print(f"ci/mutation: {error}", file=sys.stderr)
        return 3
    chosen = chosen_of(mutants, options)
    if not chosen:
        print(
            "ci/mutation: no mutant matches --module, --sample, --each and --shard; "
            "--list names all",
            file=sys.stderr,
        )
        return 2
    ledger = Ledger.read(options.state)
    if options.again:
        chosen = [m for m in chosen if ledger.state_of(m) in options.again]
    if options.list:
        print("\n".join(m.name for m in chosen))
        return 0
    if options.report:
        return ledger.report(chosen, known)
    if not options.equivalent:
        chosen = [m for m in chosen if m not in known or not known[m].equivalent]
    if options.resume:
        chosen = [m for m in chosen if not ledger.is_current(m)]
    executed = Executed.read(options.state)
    status = 0

    def work(judge: Judge) -> None:
        nonlocal status
        measure(executed, judge)
        if options.unexecuted:
            status = tell_unexecuted(executed)
            return
        done = judge_all(judge, chosen, known, executed, ledger, options)
        status = ledger.report(chosen[:done], known)

    return (from_a_warm_parent(work) and 3) or status


if __name__ == "__main__":
    sys.exit(pipes.run(main))
