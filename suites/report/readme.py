"""Fill README.md with what its commands really print: `python -m report.readme [NAME ...]`.

Each place is marked `<!-- output: NAME -->`; without names all are filled, which takes half an
hour. The commands run in the root of the repository, as a reader would run them.
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

from harness import pipes

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
_BOTH = "suites/conformance suites/integration"
_PROGRESS = re.compile(r"[.xspFE!?TC]+ *\[ *\d+%\]")
_WIDTH = 150


def _whole(text: str) -> str:
    return text


def _short_progress(text: str) -> str:
    """Of the lines of dots the first and the last."""
    lines = text.splitlines()
    dots = [n for n, line in enumerate(lines) if _PROGRESS.fullmatch(line)]
    if len(dots) > 2:
        lines[dots[0] + 1 : dots[-1]] = ["..."]
    return "\n".join(lines)


def _without_matrix(text: str) -> str:
    """The first rows of the first table stand for all: it is shown in whole above."""
    lines = _short_progress(text).splitlines()
    heads = [n for n, line in enumerate(lines) if line.endswith("cost")]
    if heads:
        end = max(n for n, line in enumerate(lines) if line.startswith("shardproof "))
        lines[heads[0] + 4 : end] = ["..."]
    return "\n".join(lines)


def _table(text: str) -> str:
    """Of a command that says more, the table alone."""
    return "\n".join(line for line in text.splitlines() if line.startswith("|"))


def _one_failure(text: str) -> str:
    lines = text.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("FAIL  "))
    end = next(n for n in range(first, len(lines)) if lines[n].startswith("  repeat")) + 1
    return "\n".join(line[:_WIDTH] for line in lines[first:end])


@dataclass(frozen=True)
class Place:
    """One place of the README: the command, its exit code, and what is kept of its output."""

    command: str
    shown: bool = True
    """Whether the command stands above its output."""
    exit: int = 0
    keep: Callable[[str], str] = _whole
    fence: bool = True


EXAMPLE = "torchrun --standalone --nproc-per-node 4 tp_ddp.py"
PLACES = {
    "ci/conformance": Place("ci/conformance", keep=_short_progress),
    "failure": Place(
        "ci/conformance --expectations /nonexistent -k test_a_dict_that_only_one_rank_holds",
        shown=False,
        exit=1,
        keep=_one_failure,
    ),
    "ci/test": Place("ci/test", keep=_without_matrix),
    "ci/world-cost": Place("ci/world-cost"),
    # Measured together with GOALS.md: half an hour on a machine with nothing else to do.
    "ci/bench --table": Place(
        "ci/bench --table --from suites/benchmarks/goals.jsonl", shown=False, fence=False
    ),
    "before and after": Place(
        f"ci/conformance {_BOTH} >&2 && before=$(readlink -f out/latest) && "
        f"ci/conformance --subject shardproof {_BOTH} >&2 && "
        '.venv/bin/python -m report --compare "$before" out/latest',
        shown=False,
        fence=False,
    ),
    "ci/ecosystem": Place("ci/ecosystem", shown=False, keep=_table, fence=False),
    "example": Place(EXAMPLE),
    "example, mended": Place(f"{EXAMPLE} --mend"),
}


def example() -> str:
    """The script that the README shows."""
    found = re.search(r"<!-- file: tp_ddp.py -->\n```python\n(.*?)```", README.read_text(), re.S)
    if not found:
        raise SystemExit("README.md shows no tp_ddp.py")
    return found[1]


def shown(name: str) -> str:
    """What the README shows in a place now, without the command."""
    found = _place(name).search(README.read_text())
    if not found:
        raise SystemExit(f"README.md has no place for the output of {name!r}")
    return found[2].removeprefix(f"$ {PLACES[name].command}\n")


def run(name: str) -> str:
    """Run the command of a place; what is to be shown of its output."""
    place = PLACES[name]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tp_ddp.py").write_text(example())
        bin_ = ROOT / ".venv" / "bin"
        ended = subprocess.run(
            ["bash", "-c", place.command],
            cwd=folder if place.command.startswith("torchrun") else ROOT,
            env=os.environ | {"PATH": f"{bin_}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            timeout=3000,
            check=False,
        )
    if ended.returncode != place.exit:
        raise SystemExit(f"{place.command}: exit {ended.returncode}, expected {place.exit}")
    return place.keep(ended.stdout.strip("\n")) + "\n"


def _place(name: str) -> re.Pattern[str]:
    place = PLACES[name]
    if not place.fence:
        return re.compile(rf"(<!-- output: {re.escape(name)} -->\n)((?:\|.*\n)*)")
    return re.compile(rf"(<!-- output: {re.escape(name)} -->\n```text\n)(.*?)(?=```)", re.S)


def main() -> int:
    """Run the commands, write the README; 1 when a command ended otherwise than it should."""
    parser = argparse.ArgumentParser(prog="python -m report.readme", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(PLACES)}")
    names = parser.parse_args().names or list(PLACES)
    if unknown := set(names) - set(PLACES):
        parser.error(f"no place {', '.join(sorted(unknown))}; there are {', '.join(PLACES)}")
    for name in names:
        print(f"{name}: {PLACES[name].command}", file=sys.stderr)
        shown(name)
        command = f"$ {PLACES[name].command}\n" if PLACES[name].shown else ""
        output = command + run(name)
        text = _place(name).sub(lambda m, o=output: m[1] + o, README.read_text())  # type: ignore[misc]
        README.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(pipes.run(main))
