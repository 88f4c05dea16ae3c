"""ci/report: write the page of a run anew, or take a picture of it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.system import pipes
from report.html import run_page
from report.read import BadResultsError, read


def main(arguments: list[str] | None = None) -> int:
    """Write report.html; 0 written, 2 usage, 3 there are no readable results."""
    parser = argparse.ArgumentParser(
        prog="ci/report",
        description="Write report.html of a run anew, from its results.json.",
        epilog="Ends with 0: written; 2: wrong usage; 3: there is nothing to write it from, or no "
        "browser for a picture.",
    )
    parser.add_argument(
        "run",
        nargs="?",
        type=Path,
        default=Path("out/latest"),
        metavar="RUN",
        help="its folder, or its results.json (default: out/latest)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write there (default: RUN/report.html)"
    )
    parser.add_argument(
        "--screenshot",
        type=Path,
        metavar="PNG",
        help="also leave a picture of its first screen there; needs Chromium, and the packages "
        "that ci/setup installs",
    )
    options = parser.parse_args(arguments)
    folder = options.run if options.run.is_dir() else options.run.parent
    file = options.output or folder / run_page.NAME
    try:
        run_page.write(read(options.run), file, folder)
        print(file)
        if options.screenshot:
            from report.browser.chromium import NoBrowserError, screenshot

            try:
                screenshot(file, options.screenshot)
            except NoBrowserError as error:
                print(f"ci/report: {error}", file=sys.stderr)
                return 3
            print(options.screenshot)
    except (BadResultsError, OSError, ValueError) as error:
        print(f"ci/report: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(pipes.run(main))
