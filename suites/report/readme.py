"""Fill the pages with what commands really print: `python -m report.readme [NAME ...]`.

The pages are README.md, CONTRIBUTING.md and docs/*.md. Each place in a page is marked
`<!-- output: NAME -->`. Without names all places are filled, which takes half an hour. The commands
run in the root of the repository, as a reader would run them; a command that several places show
runs once.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.system import pipes

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
PAGES = (README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
_BOTH = "suites/conformance suites/integration"
_PROGRESS = re.compile(r"[.xspFE!?TC]+ *\[ *\d+%\]")
_WIDTH = 150


def _short_progress(text: str) -> str:
    """Of the lines of dots the first and the last."""
    lines = text.splitlines()
    dots = [n for n, line in enumerate(lines) if _PROGRESS.fullmatch(line)]
    if len(dots) > 2:
        lines[dots[0] + 1 : dots[-1]] = ["..."]
    return "\n".join(lines)


_DEFECT = re.compile(r"\w+ +SP-\d{3}  ")
_ASIDE = re.compile(r"the subject warned in |\d+ (of the )?known failures")
_GOES_ON = " " * 11
"""How a line begins that goes on with the field, or the defect, of the line above."""


def _heads(lines: list[str]) -> list[int]:
    return [n for n, line in enumerate(lines) if line.rstrip().endswith(" cos")]


def _short_matrix(text: str) -> str:
    """The first rows of the first table, and what stands below the last one."""
    lines = _short_progress(text).splitlines()
    if heads := _heads(lines):
        end = next(n for n in range(heads[-1], len(lines)) if lines[n].startswith("✓ all"))
        lines[heads[0] + 3 : end] = ["...", ""]
    defects = [n for n, line in enumerate(lines) if _DEFECT.match(line)]
    if defects:
        end = next(n for n in range(defects[-1] + 1, len(lines)) if lines[n][:11] != _GOES_ON)
        lines[defects[2] : end] = ["..."]
    return "\n".join(line for line in lines if not _ASIDE.match(line))


def _without_matrix(text: str) -> str:
    """The first rows of the first table, and the counts of the run."""
    lines = _short_progress(text).splitlines()
    if heads := _heads(lines):
        end = max(n for n, line in enumerate(lines) if line.startswith("shardproof "))
        lines[heads[0] + 4 : end] = ["..."]
    return "\n".join(lines)


def _table(text: str) -> str:
    """Of a command that says more, the table alone."""
    return "\n".join(line for line in text.splitlines() if line.startswith("|"))


def _first_rows(text: str) -> str:
    """The head of a table and its first four rows."""
    return "\n".join(_table(text).splitlines()[:6])


def _last_row(text: str) -> str:
    """The head of a table and its last row."""
    lines = _table(text).splitlines()
    return "\n".join([*lines[:2], lines[-1]])


def _one_failure(text: str) -> str:
    lines = text.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("FAIL  "))
    end = next(n for n in range(first, len(lines)) if lines[n].startswith("  repeat")) + 1
    return "\n".join(line[:_WIDTH] for line in lines[first:end])


def _short_failure(text: str) -> str:
    """The check, its clause, the cause, and the command that repeats it."""
    kept: list[str] = []
    keeps = False
    for line in _one_failure(text).splitlines():
        keeps = line.startswith(("FAIL  ", "  clause", "  cause", "  repeat")) or (
            keeps and line.startswith(_GOES_ON)
        )
        kept += [line] if keeps else []
    return "\n".join(kept)


@dataclass(frozen=True)
class Place:
    """One place in a page: the command, its exit code, and what is kept of its output."""

    command: str
    shown: bool = True
    """Whether the command stands above its output."""
    exit: int = 0
    keep: Callable[[str], str] = str
    fence: bool = True


EXAMPLE = "torchrun --standalone --nproc-per-node 4 tp_ddp.py"
_FAILURE = "ci/conformance --expectations /nonexistent -k test_a_dict_that_only_one_rank_holds"
_TABLE = "ci/bench --table --from suites/benchmarks/goals.jsonl"
_COMPARE = (
    f"ci/conformance {_BOTH} >&2 && before=$(readlink -f out/latest) && "
    f"ci/conformance --subject shardproof {_BOTH} >&2 && "
    '.venv/bin/python -m report --compare "$before" out/latest'
)
PLACES = {
    "ci/conformance": Place("ci/conformance", keep=_short_progress),
    "ci/conformance, in short": Place("ci/conformance", keep=_short_matrix),
    "failure": Place(_FAILURE, shown=False, exit=1, keep=_one_failure),
    "failure, in short": Place(_FAILURE, shown=False, exit=1, keep=_short_failure),
    "ci/test": Place("ci/test", keep=_without_matrix),
    "ci/world-cost": Place("ci/world-cost"),
    # Measured together with GOALS.md: half an hour on a machine with nothing else to do.
    "ci/bench --table": Place(_TABLE, shown=False, fence=False),
    "ci/bench --table, in short": Place(_TABLE, shown=False, keep=_first_rows, fence=False),
    "before and after": Place(_COMPARE, shown=False, fence=False),
    "before and after, in all": Place(_COMPARE, shown=False, keep=_last_row, fence=False),
    "ci/ecosystem": Place("ci/ecosystem", shown=False, keep=_table, fence=False),
    "example": Place(EXAMPLE),
    "example, mended": Place(f"{EXAMPLE} --mend"),
}


def example() -> str:
    """The script that the page about install() shows."""
    for page in PAGES:
        found = re.search(
            r"<!-- file: tp_ddp.py -->\n```python\n(.*?)```", page.read_text(), re.DOTALL
        )
        if found:
            return found[1]
    raise SystemExit("no page shows tp_ddp.py")


def shown(name: str) -> str:
    """What the pages show in a place now, without the command."""
    found = _place(name).search(_page(name).read_text())
    assert found, name
    return found[2].removeprefix(f"$ {PLACES[name].command}\n")


def run(command: str, exit_code: int = 0) -> str:
    """What the command of a place prints; the example stands where it runs."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tp_ddp.py").write_text(example())
        bin_ = ROOT / ".venv" / "bin"
        ended = subprocess.run(
            ["bash", "-c", command],
            cwd=folder if command.startswith("torchrun") else ROOT,
            env=os.environ | {"PATH": f"{bin_}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            timeout=3000,
            check=False,
        )
    if ended.returncode != exit_code:
        raise SystemExit(f"{command}: exit {ended.returncode}, expected {exit_code}")
    return ended.stdout.strip("\n")


def _place(name: str) -> re.Pattern[str]:
    mark = f"<!-- output: {re.escape(name)} -->\n"
    if not PLACES[name].fence:
        return re.compile(rf"({mark})((?:\|.*\n)*)")
    return re.compile(rf"({mark}```text\n)(.*?)(?=```)", re.DOTALL)


def _page(name: str) -> Path:
    """The page that has the place; every place stands in one."""
    found = [page for page in PAGES if _place(name).search(page.read_text())]
    if len(found) != 1:
        pages = ", ".join(str(page.relative_to(ROOT)) for page in found) or "no page"
        raise SystemExit(f"<!-- output: {name} --> stands in {pages}, expected one page")
    return found[0]


def _fill(name: str, output: str) -> None:
    place, page = PLACES[name], _page(name)
    command = f"$ {place.command}\n" if place.shown else ""
    text = f"{command}{place.keep(output)}\n"
    page.write_text(_place(name).sub(lambda found: found[1] + text, page.read_text()))


def main() -> int:
    """Run the commands, write the pages; 1 when a command ended otherwise than it should."""
    parser = argparse.ArgumentParser(prog="ci/readme", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(PLACES)}")
    names = parser.parse_args().names or list(PLACES)
    if unknown := set(names) - set(PLACES):
        parser.error(f"no place {', '.join(sorted(unknown))}; there are {', '.join(PLACES)}")
    for command in dict.fromkeys(PLACES[name].command for name in names):
        same = [name for name, place in PLACES.items() if place.command == command]
        print(f"{', '.join(same)}: {command}", file=sys.stderr)
        for name in same:
            _page(name)
        output = run(command, PLACES[same[0]].exit)
        for name in same:
            _fill(name, output)
    return 0


if __name__ == "__main__":
    sys.exit(pipes.run(main))
