"""`ci/fuzz`: draw cases of every function, run them on real ranks, and compare with the oracle.

What differs is made smaller, until two ranks and a tensor are left if they will do, and a script
that repeats it is written. A case is a world, meshes, tensors, nested containers and calls, all
drawn at once; the oracle is a slow simulation of all ranks that shares nothing with the reference.

Exit 0: nothing differs; 1: something does; 2: wrong usage; 3: the environment failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from generated.emit import tensors_of
from harness.system import processes, warm

if TYPE_CHECKING:
    from generated.search import Failure
    from generated.world import Stage

ROOT = Path(__file__).parents[2]


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = argparse.ArgumentParser(
        prog="ci/fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--minutes", type=float, default=5.0, metavar="M", help="how long (default: %(default)g)")
    add(
        "--cases",
        type=int,
        default=0,
        metavar="N",
        help="N cases of each function, however long they take, instead of --minutes",
    )
    add(
        "--function",
        action="append",
        default=[],
        metavar="NAME",
        help="draw cases of this function alone, by a name of --list, upstream's too; may be given "
        "several times",
    )
    add(
        "--subject",
        default="shardproof",
        metavar="ROOT",
        help="import root of the implementation (default: %(default)s)",
    )
    add("--seed", default="random", metavar="N", help="a number, or random (the default)")
    add("--first", action="store_true", help="end with the first difference")
    add(
        "--shrink",
        type=float,
        default=60.0,
        metavar="S",
        help="most seconds for making a difference smaller (default: %(default)g)",
    )
    add("--out", metavar="DIR", help="where scripts go (default: out/fuzz)")
    add("--replay", metavar="SCRIPT", help="judge the case of such a script again, and no other")
    add("--journal", metavar="FILE", help="also leave each difference there, a JSON object a line")
    add(
        "--planted",
        nargs="*",
        metavar="NAME",
        help="look for faults that are planted in copies of the reference, all or those named",
    )
    add("--list", action="store_true", help="name the functions, and run nothing")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    options = parser().parse_args(arguments)
    warm.limit_threads()
    # Thresholds within reach of small tensors; read when the subject is imported.
    os.environ.setdefault("SHARDPROOF_BUCKET_MIB", "1")
    from generated.search import Search, functions, upstream_names

    try:
        names = functions(options.function)
        if options.cases < 0:
            raise LookupError(f"--cases {options.cases}: expected a number from 1 up")
        if options.minutes <= 0:
            raise LookupError(f"--minutes {options.minutes:g}: expected a positive number")
        if options.seed != "random" and not options.seed.isdecimal():
            raise LookupError(f"--seed {options.seed}: expected a number or random")
        _import(options.subject)
    except LookupError as error:
        print(f"ci/fuzz: {error.args[0]}", file=sys.stderr)
        return 2
    if options.list:
        for name in names:
            print(f"{name:<20}{', '.join(upstream_names()[name])}".rstrip())
        return 0
    seed = random.SystemRandom().randrange(10**6) if options.seed == "random" else int(options.seed)
    if options.planted is not None:
        from generated import planted

        return planted.main(options.planted, min(options.minutes, planted.MINUTES), seed)
    processes.adopt_orphans()
    warm.warm_up()
    from generated.world import Stage, WorldError

    stage = Stage(options.subject)
    try:
        if options.replay:
            return _replay(stage, Path(options.replay))
        report = Report(options)
        search = Search(
            stage,
            names,
            seed,
            86400.0 if options.cases else 60 * options.minutes,
            options.shrink,
            told=_tell,
            failed=report,
            most=options.cases,
            first=options.first,
        )
        begin = time.monotonic()
        print(f"ci/fuzz --subject {options.subject} --seed {seed}: {', '.join(names)}", flush=True)
        found = search.run()
        _tell("")
        seconds = time.monotonic() - begin
    except WorldError as error:
        print(f"\nci/fuzz: {error}", file=sys.stderr)
        return 3
    finally:
        stage.close()
    for text in search.slow:
        print(f"SLOW     {text} (not when run again by itself)")
    print(f"{search.cases} cases in {seconds:.0f} s, {len(found)} differences; seed {seed}")
    if search.cases == 0:
        print("ci/fuzz: no case was run", file=sys.stderr)
        return 3
    return 1 if found else 0


def _import(root: str) -> None:
    try:
        importlib.import_module(f"{root}._state_dict_utils")
    except ImportError as error:
        raise LookupError(f"--subject {root}: cannot be imported ({error})") from error


def _tell(line: str) -> None:
    if sys.stdout.isatty():
        print(f"\r\x1b[K{line}", end="", flush=True)
    elif line:
        print(line, flush=True)


class Report:
    """Tells of each failure, and leaves its script and its line of the journal."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._folder = Path(options.out) if options.out else ROOT / "out" / "fuzz"
        self._journal = options.journal
        self._subject = options.subject
        self._count = 0

    def __call__(self, failure: Failure) -> None:
        from generated.repeat import script

        self._count += 1
        self._folder.mkdir(parents=True, exist_ok=True)
        case, difference = failure.case, failure.difference
        name = f"{difference.call}-{time.strftime('%Y%m%d-%H%M%S')}-{self._count}.py"
        path = self._folder / name
        path.write_text(script(case, difference, self._subject, name))
        tensors, steps = tensors_of(case), len(case["steps"])
        _tell("")
        print(f"DIFFERS  {difference}")
        print(
            f"  smallest  {case['world']} ranks, {tensors} tensors, {steps} steps; first seen in "
            f"case {failure.cases}, after {failure.seconds:.0f} s"
        )
        print(f"  repeat    python {path}", flush=True)
        if self._journal:
            said = {
                "difference": str(difference),
                "seconds": round(failure.seconds, 1),
                "cases": failure.cases,
                "ranks": case["world"],
                "tensors": tensors,
                "steps": steps,
            }
            with Path(self._journal).open("a") as file:
                file.write(json.dumps(said) + "\n")


def _replay(stage: Stage, path: Path) -> int:
    from generated.judge import judge
    from generated.repeat import case_in

    try:
        case = case_in(path)
    except (OSError, ValueError) as error:
        print(f"ci/fuzz: {error}", file=sys.stderr)
        return 2
    difference = judge(stage, case, fresh=True)
    print(f"DIFFERS  {difference}" if difference else "as expected")
    return 1 if difference else 0
