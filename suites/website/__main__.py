"""The command `ci/site`: pages of many runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.system import pipes
from website.build import build
from website.history import NoSiteError, history
from website.mixture import refuse_mixture


def main(arguments: list[str] | None = None) -> int:
    """0 written; 2 wrong usage; 3 the runs make no site."""
    parser = argparse.ArgumentParser(
        prog="ci/site",
        description="A static site of many runs, from their results.json alone: versions of torch, "
        "backends and functions, the nights, the difference of any two runs, badges.",
        epilog="Ends with 0: written; 2: wrong usage; 3: there is no run, or the runs are of "
        "several commits of the suites.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "results",
        nargs="+",
        type=Path,
        metavar="RESULTS",
        help="a results.json, the folder of a run, or a folder of folders, as out/nightly",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the pages")
    parser.add_argument(
        "--mixed",
        action="store_true",
        help="take runs of several commits of the suites: the site says so, and compares only "
        "checks that both runs have",
    )
    options = parser.parse_args(arguments)
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out}: expected a folder")
    try:
        found = history(options.results)
        if not options.mixed:
            refuse_mixture(found.runs)
    except NoSiteError as error:
        print(f"ci/site: {error}", file=sys.stderr)
        return 3
    for line in found.left_out:
        print(f"left out: {line}", file=sys.stderr)
    build(found, options.out)
    print(f"{options.out / 'index.html'}: {len(found.runs)} runs, {len(found.columns)} columns")
    return 0


if __name__ == "__main__":
    sys.exit(pipes.run(main))
