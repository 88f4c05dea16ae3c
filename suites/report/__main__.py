"""Show a run: `python -m report [--known] [FOLDER | results.json]`, by default out/latest.

`python -m report --compare BEFORE AFTER` shows two runs side by side, as a table in Markdown;
`python -m report --laws` prints the laws of the contract.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from harness.system import pipes
from report import beside
from report.compare import NotComparableError, compare
from report.laws import listing
from report.read import BadResultsError, read
from report.terminal import Screen, show, show_known


def main() -> int:
    """Print the report; 3 when there are no readable results."""
    parser = argparse.ArgumentParser(prog="python -m report", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, default=Path("out/latest"))
    parser.add_argument(
        "--known", action="store_true", help="list known failures with their reasons"
    )
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="two runs side by side"
    )
    parser.add_argument("--brief", action="store_true", help="leave the single failures out")
    parser.add_argument("--laws", action="store_true", help="print the laws of the contract")
    options = parser.parse_args()
    if options.laws:
        print(listing())
        return 0
    try:
        if options.compare:
            before, after = map(read, options.compare)
            print("\n".join(compare(before, after)))
            return 0
        data = read(options.run)
    except (BadResultsError, NotComparableError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 3
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    colour = colour and os.environ.get("TERM") != "dumb"
    screen = Screen(sys.stdout, colour, shutil.get_terminal_size().columns)
    folder = options.run if options.run.is_dir() else options.run.parent
    if options.known:
        show_known(data, screen)
    show(
        data,
        os.path.relpath(folder),
        screen,
        failures=not options.brief,
        beside=() if options.brief else beside.lines(data, folder.resolve()),
    )
    return 0


if __name__ == "__main__":
    sys.exit(pipes.run(main))
