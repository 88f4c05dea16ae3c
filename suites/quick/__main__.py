"""ci/quick: lint, types, and the checks that a change reaches, within a minute."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from harness.system import pipes
from quick import choose
from quick.affected import Affected, affected_by
from quick.imports import ROOT

CHECKS_A_SECOND = 5
"""On two cores, with room to spare: a whole run of conformance does eight to ten."""
COLLECTION = 10.0
"""Seconds to collect the checks and to import torch."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="ci/quick",
        description="Lint, types, and the checks that a change reaches through imports, against "
        "the reference, in about a minute. It is for the work on a change; ci/test is what a "
        "change must pass.",
        epilog="Ends with 0: nothing found; 1: something is to be mended; 2: wrong usage; "
        "3: the environment failed.",
    )
    parser.add_argument(
        "files", nargs="*", type=Path, help="changed files (default: what git says has changed)"
    )
    parser.add_argument("--since", default="HEAD", help="changed since this commit (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="how long it may take (%(default)g)"
    )
    given = parser.parse_args(arguments)
    begin = time.monotonic()
    changed = [p.resolve() for p in given.files] or _changed(given.since)
    if missing := [str(p) for p in given.files if not p.exists()]:
        parser.error(f"no such file: {', '.join(missing)}")
    if not changed:
        print(f"nothing has changed since {given.since}")
        return 0
    reached = affected_by(changed)
    status = int(_lint([p for p in changed if p.suffix == ".py" and p.exists()]))
    left = given.seconds - (time.monotonic() - begin) - COLLECTION
    if reached.functions or reached.tests:
        status = max(status, _check(reached, max(1, round(left * CHECKS_A_SECOND))))
    print(
        f"{time.monotonic() - begin:.0f} s. Left out: the other checks, integration with public "
        "API, counts of the benchmarks, mutants (ci/test runs them)"
    )
    for path in reached.unknown:
        print(f"  {path.relative_to(ROOT)}: no check depends on it by an import")
    return status


def _changed(since: str) -> list[Path]:
    lists = (["diff", "--name-only", since], ["ls-files", "--others", "--exclude-standard"])
    names: list[str] = []
    for words in lists:
        ran = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        if ran.returncode:
            sys.exit(f"ci/quick: git {' '.join(words)}: {ran.stderr.strip()}")
        names += ran.stdout.splitlines()
    return [ROOT / name for name in names]


def _lint(files: Sequence[Path]) -> bool:
    """Lint and format of the changed files; types of all, since a change has effects elsewhere."""
    names = list(map(str, files))
    commands = [["ruff", "check", *names], ["ruff", "format", "--check", *names]] if files else []
    found = False
    for tool, *words in [*commands, ["mypy"]]:
        command = [str(Path(sys.executable).with_name(tool)), *words]
        found |= subprocess.run(command, cwd=ROOT, check=False).returncode != 0
    return found


def _check(reached: Affected, most: int) -> int:
    """0: all hold; 1: one does not; 3: they could not be judged."""
    outside = [str(p) for p in reached.tests if "conformance" not in p.parts]
    environment = os.environ | {
        choose.FUNCTIONS: "\n".join(reached.functions),
        choose.FILES: "\n".join(map(str, reached.tests)),
        choose.MOST: str(most),
    }
    command = [sys.executable, "-m", "harness", "-p", "quick.choose", "--subject", "shardproof"]
    ran = subprocess.run(
        [*command, "-q", "--tb=short", "suites/conformance", *outside],
        cwd=ROOT,
        env=environment,
        check=False,
    )
    return ran.returncode if ran.returncode in (0, 1) else 3


if __name__ == "__main__":
    sys.exit(pipes.run(lambda: main(sys.argv[1:])))
