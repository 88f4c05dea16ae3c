"""The command `ci/compare`: two runs, or two versions of torch, in terms of defects."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from harness.system import pipes
from report.changes import changes, lines
from report.compare import NotComparableError
from report.html import comparison_page
from report.read import BadResultsError, read
from report.slower import slower

ROOT = Path(__file__).parents[2]
_TORCH = "torch=="
_VERSION = re.compile(r"torch==\d+\.\d+\.\d+\S*")


def main(arguments: list[str] | None = None) -> int:
    """Print what changed; 0 nothing got worse, 1 something did, 2 usage, 3 no comparison."""
    parser = argparse.ArgumentParser(
        prog="ci/compare",
        description="What appeared, what went and what got worse between two runs, in terms of "
        "defects. Only checks that ran in both count; where both folders have benchmarks.jsonl, "
        "as ci/bench --journal leaves it, also what costs more.",
        epilog="Ends with 0: nothing got worse; 1: something did; 2: wrong usage; 3: there is no "
        "comparison, or a run failed.",
    )
    parser.add_argument("before", metavar="A", help="a folder with results.json, or torch==2.13.0")
    parser.add_argument("now", metavar="B", help="the same")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write it there for machines, too"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write it there as a page, too")
    parser.add_argument(
        "--runs",
        type=Path,
        default=ROOT / "out" / "compare",
        metavar="DIR",
        help="where runs of torch==VERSION are kept; a run that is there is used again "
        "(default: out/compare)",
    )
    options = parser.parse_args(arguments)
    for name in (options.before, options.now):
        if not _VERSION.fullmatch(name) and not Path(name).exists():
            parser.error(f"{name}: expected a folder with results.json, or torch==2.13.0")
    try:
        folders = [_folder(name, options.runs) for name in (options.before, options.now)]
        first, second = map(read, folders)
        found = changes(first, second, slower(*folders))
    except (BadResultsError, NotComparableError, _RunFailedError, ValueError) as error:
        print(f"ci/compare: {error}", file=sys.stderr)
        return 3
    for line in lines(found, options.before, options.now):
        print(line)
    if options.json:
        options.json.write_text(json.dumps(found.as_json(), indent=1) + "\n")
    if options.html:
        names = (options.before, options.now)
        comparison_page.write(found, (first, second), names, options.html)
    return int(found.worse)


class _RunFailedError(Exception):
    """A run for the comparison did not come to its end; the text says which."""


def _folder(name: str, runs: Path) -> Path:
    """The folder of a run; made first where a version of torch is named."""
    if not name.startswith(_TORCH):
        return Path(name)
    version = name.removeprefix(_TORCH)
    folder = runs / version
    if not (folder / "results.json").exists():
        print(f"--- torch {version}: ci/conformance and ci/integration", file=sys.stderr)
        words = ["--run-dir", str(folder), "suites/conformance", "suites/integration"]
        installed = metadata.version("torch").partition("+")[0]
        other = [] if version == installed else ["--torch", version]
        command = ["ci/conformance", *other, *words]
        ended = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
        if ended.returncode not in (0, 1):
            raise _RunFailedError(f"{' '.join(command)}: ended with {ended.returncode}")
    return folder


if __name__ == "__main__":
    sys.exit(pipes.run(main))
