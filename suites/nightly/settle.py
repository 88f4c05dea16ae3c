"""The command `ci/nightly-issue`: what the last nights found, told to the tracker.

Reads night.json and report.md alone, with nothing but Python's own library.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from harness.system import pipes
from nightly.issue import Tracker, TrackerError
from nightly.state import BadStateError, State


def main(arguments: list[str] | None = None) -> int:
    """Settle the issue of each thing that was judged; 0 done, 2 usage, 3 no night or no tracker."""
    parser = argparse.ArgumentParser(prog="ci/nightly-issue", description=__doc__)
    parser.add_argument("repository", metavar="OWNER/NAME")
    parser.add_argument("--state", type=Path, default=Path("out/nightly"), metavar="DIR")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    options = parser.parse_args(arguments)
    nights = sorted(options.state.glob("*/last.json"))
    if not nights:
        print(f"ci/nightly-issue: no night in {options.state}: run ci/nightly first")
        return 3
    tracker = Tracker(options.repository, options.dry_run)
    try:
        for last in nights:
            folder, found = _night(last)
            body = (folder / "report.md").read_text()
            done = tracker.settle(found["title"], body, wrong=found["wrong"], news=found["news"])
            print(f"{folder}: {done}")
    except (TrackerError, BadStateError) as error:
        print(f"ci/nightly-issue: {error}", file=sys.stderr)
        return 3
    return 0


def _night(last: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of the night that was judged last, and its night.json."""
    name = (State(last.parent).read("last") or {}).get("night")
    if not isinstance(name, str) or Path(name).name != name:
        raise BadStateError(f"{last}: 'night' is {name!r}, expected the name of a folder beside it")
    file = last.parent / name / "night.json"
    try:
        found = json.loads(file.read_text())
        kinds = {k: type(found[k]) for k in ("title", "wrong", "news")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadStateError(f"{file} is not what a night leaves: {error!r}") from None
    if kinds != {"title": str, "wrong": bool, "news": bool}:
        raise BadStateError(f"{file}: expected a text and two truth values: {kinds}")
    return file.parent, dict(found)


if __name__ == "__main__":
    sys.exit(pipes.run(main))
