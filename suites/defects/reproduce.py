"""ci/reproduce: prints the file that shows a defect with torch alone, or runs it.

Files lie in suites/defects/reproducers, as sp_001_some_words.py. Each is for `torchrun`, with as
many ranks as its docstring says, and imports torch and the standard library. It ends with 1 where
the defect shows, and with 0 where torch is right. Its docstring says what breaks, why and for whom;
the lines that it prints say what was expected and what torch gave. A new one starts as a copy of a
neighbour.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from packaging.version import Version

from defects import catalogue
from defects.catalogue import Defect
from defects.runs import ByTorchrun, Ended, Warm
from harness.system import pipes

FOLDER = Path(__file__).parent / "reproducers"
REPRODUCED = Path(__file__).parent / "reproduced.json"
"""What each said in the last `ci/reproduce … --check --write` under each version of torch."""
SIDES = {"plain": "", "installed": "install()", "callers": "install(callers=True)"}
"""torch as it is; after install(); and after install(callers=True), for the defects it is for."""
_CALLERS = "install(callers=True)"
_EXIT = {"does not show": 0, "shows": 1, "broke": 3}
_RANKS = re.compile(r"torchrun --standalone --nproc-per-node (\d+) (\S+)\n")


def files() -> dict[str, Path]:
    """The reproducers by the id of their defect."""
    return {f"SP-{path.name[3:6]}": path for path in sorted(FOLDER.glob("sp_*.py"))}


def ranks(path: Path) -> int:
    """How many ranks a file asks for, by the command in its docstring."""
    found = _RANKS.search(path.read_text())
    if not found or found[2] != path.name:
        raise ValueError(f"{path}: the docstring needs its torchrun command")
    return int(found[1])


def verdict(identity: str, ended: Ended) -> str:
    """shows, does not show, or broke: an exit that the file did not mean."""
    if ended.code == 0 and f"{identity} does not show" in ended.output:
        return "does not show"
    if ended.code and f"{identity} shows" in ended.output:
        return "shows"
    crashes = "crashes" in catalogue.read()[identity].severity
    return "shows" if ended.signal and crashes else "broke"


def reproduced() -> dict[str, dict[str, dict[str, str]]]:
    """What each reproducer said, by version of torch, defect and side."""
    return dict(json.loads(REPRODUCED.read_text()))


def expected(defect: Defect, torch: str, side: str) -> str:
    """What the catalogue says that a reproducer shows under this torch."""
    menders = {"plain": (), "installed": ("install",)}.get(side, ("install", _CALLERS))
    there = defect.is_in(torch) and not set(menders) & set(defect.mended_by)
    return "shows" if there else "does not show"


def sides(defect: Defect) -> list[str]:
    """What a defect's reproducer is run on."""
    return [side for side in SIDES if side != "callers" or _CALLERS in defect.mended_by]


def main() -> int:
    """Print, or run; 1 where a defect shows, 3 where a reproducer broke."""
    parser = argparse.ArgumentParser(prog="ci/reproduce", allow_abbrev=False)
    parser.add_argument("ids", nargs="*", metavar="ID", help="SP-001; all with --all")
    parser.add_argument("--run", action="store_true", help="run it with torchrun")
    parser.add_argument("--install", action="store_true", help="run after shardproof.install()")
    parser.add_argument(
        "--callers", action="store_true", help="run after shardproof.install(callers=True)"
    )
    parser.add_argument("--all", action="store_true", help="run all, and print a table")
    parser.add_argument(
        "--check",
        action="store_true",
        help="run each on torch as it is and after install, and compare with the catalogue",
    )
    parser.add_argument(
        "--write", action="store_true", help="with --check: keep it for docs/defects.md"
    )
    parser.add_argument("--warm", action="store_true", help="run in forks of one process: faster")
    options = parser.parse_args()
    if options.check and (options.install or options.callers):
        parser.error("--check runs with and without install: leave --install and --callers out")
    if options.write and not options.check:
        parser.error("--write is for --check")
    try:
        known, found = catalogue.read(), files()
    except catalogue.BadDefectError as error:
        parser.error(str(error))
    if not options.ids and not options.all:
        parser.error("name a defect, as SP-001, or --all")
    wanted = list(found) if options.all else options.ids
    for identity in wanted:
        if identity not in known:
            parser.error(f"{identity}: there is no such defect; ci/defects lists them")
        if identity not in found:
            parser.error(f"{identity}: has no reproducer yet")
    if (options.install or options.callers) and not (options.run or options.all):
        parser.error("--install and --callers are for --run or --all")
    if not (options.run or options.all or options.check):
        print("\n".join(found[i].read_text() for i in wanted), end="")
        return 0
    if options.check:
        return _check(wanted, known, warm=options.warm, write=options.write)
    said = _run(
        wanted,
        install=options.install or options.callers,
        callers=options.callers,
        warm=options.warm,
        brief=options.all,
    )
    return max(_EXIT[word] for word in said.values())


def _check(wanted: Sequence[str], known: Mapping[str, Defect], *, warm: bool, write: bool) -> int:
    """Run each on all its sides; 1 where one says what the catalogue does not."""
    from torch import __version__

    torch = str(__version__)
    said: dict[str, dict[str, str]] = {identity: {} for identity in wanted}
    for side, call in SIDES.items():
        those = [identity for identity in wanted if side in sides(known[identity])]
        if not those:
            continue
        print(f"--- torch {torch}{call and f', after {call}'}", flush=True)
        found = _run(
            those, install=side != "plain", callers=side == "callers", warm=warm, brief=True
        )
        for identity, word in found.items():
            said[identity][side] = word
    runs = [(i, side, word) for i, words in said.items() for side, word in words.items()]
    differ = [
        f"{i} {word} ({side}, torch {torch}); the catalogue says: {expected(known[i], torch, side)}"
        for i, side, word in runs
        if word != expected(known[i], torch, side)
    ]
    print(f"--- {len(differ)} of {len(runs)} differ from the catalogue", *differ, sep="\n")
    if any(word == "broke" for *_, word in runs):
        print("ci/reproduce: a reproducer broke", file=sys.stderr)
        return 3
    if write:
        kept = reproduced()
        of_this = kept.setdefault(Version(torch).base_version, {})
        of_this |= said
        kept = {
            version: dict(sorted(kept[version].items())) for version in sorted(kept, key=Version)
        }
        REPRODUCED.write_text(json.dumps(kept, indent=1) + "\n")
        print(f"{REPRODUCED}: written; ci/defects --write puts it on the page")
    return 1 if differ else 0


def _run(
    wanted: Iterable[str], *, install: bool, callers: bool = False, warm: bool, brief: bool
) -> dict[str, str]:
    found, verdicts = files(), {}
    with (Warm if warm else ByTorchrun)(install, callers=callers) as runs:
        for identity in wanted:
            ended = runs.run(found[identity], ranks(found[identity]))
            said = verdict(identity, ended)
            if not brief or said == "broke":
                print(ended.output + ended.errors * (said == "broke"), end="")
            signal = f" (a rank was ended by {ended.signal})" if ended.signal else ""
            line = f"{identity} {said}{signal}"
            if brief or line not in ended.output.splitlines():
                print(line)
            sys.stdout.flush()
            verdicts[identity] = said
    return verdicts


if __name__ == "__main__":
    sys.exit(pipes.run(main))
