"""`ci/fuzz`: draw cases of every function, run them on real ranks, and compare with the oracle.

What differs is made smaller, until two ranks and a tensor are left if they will do, and a script
that repeats it is written. A case is a world, meshes, tensors, nested containers and calls, all
drawn at once; the oracle is a slow simulation of all ranks that shares nothing with the reference.

Exit 0: nothing differs; 1: something does; 2: wrong usage; 3: the environment failed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from harness import processes, warm

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
    add("--function", action="append", default=[], metavar="NAME",
        help="draw cases of this function alone; may be given several times (--list names all)")
    add("--subject", default="shardproof", metavar="ROOT",
        help="import root of the implementation (default: %(default)s)")
    add("--seed", default="random", metavar="N", help="a number, or random (the default)")
    add("--first", action="store_true", help="end with the first difference")
    add("--shrink", type=float, default=60.0, metavar="S",
        help="most seconds for making a difference smaller (default: %(default)g)")
    add("--out", metavar="DIR", help="where scripts go (default: out/fuzz)")
    add("--replay", metavar="SCRIPT", help="judge the case of such a script again, and no other")
    add("--list", action="store_true", help="name the functions, and run nothing")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    options = parser().parse_args(arguments)
    warm.limit_threads()
    # Thresholds within reach of small tensors; read when the subject is imported.
    os.environ.setdefault("SHARDPROOF_BUCKET_MIB", "1")
    from generated.search import Search, functions

    try:
        names = functions(options.function)
        if options.minutes <= 0:
            raise LookupError(f"--minutes {options.minutes:g}: expected a positive number")
        if options.seed != "random" and not options.seed.isdecimal():
            raise LookupError(f"--seed {options.seed}: expected a number or random")
        _import(options.subject)
    except LookupError as error:
        print(f"ci/fuzz: {error.args[0]}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(names))
        return 0
    processes.adopt_orphans()
    warm.warm_up()
    from generated.world import Stage, WorldError

    seed = random.SystemRandom().randrange(10**6) if options.seed == "random" else int(options.seed)
    stage = Stage(options.subject)
    try:
        if options.replay:
            return _replay(stage, Path(options.replay))
        search = Search(
            stage, names, seed, 60 * options.minutes, options.shrink, _tell, first=options.first
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
    folder = Path(options.out) if options.out else ROOT / "out" / "fuzz"
    _report(search, folder, options.subject)
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


def _report(search: object, folder: Path, subject: str) -> None:
    from generated.repeat import script
    from generated.search import Search

    assert isinstance(search, Search)
    for number, failure in enumerate(search.found, 1):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{failure.difference.call}-{time.strftime('%Y%m%d-%H%M%S')}-{number}.py"
        path = folder / name
        path.write_text(script(failure.case, failure.difference, subject, name))
        case = failure.case
        print(f"DIFFERS  {failure.difference}")
        print(
            f"  smallest  {case['world']} ranks, {len(case['pool'])} tensors, "
            f"{len(case['steps'])} steps; first seen in case {failure.cases}"
        )
        print(f"  repeat    python {path}")
    for text in search.slow:
        print(f"SLOW     {text} (not when run again by itself)")


def _replay(stage: object, path: Path) -> int:
    from generated.judge import judge
    from generated.repeat import case_in
    from generated.world import Stage

    assert isinstance(stage, Stage)
    try:
        case = case_in(path)
    except (OSError, ValueError) as error:
        print(f"ci/fuzz: {error}", file=sys.stderr)
        return 2
    difference = judge(stage, case, fresh=True)
    print(f"DIFFERS  {difference}" if difference else "as expected")
    return 1 if difference else 0
