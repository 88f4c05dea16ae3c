"""`ci/soak`: run checks for some minutes in one parent, a core beside them busy; say what changed.

Each round has all checks in another order, each world another seed. A check whose verdict differs
from its first, memory or descriptors of the parent that grow, and a verdict that nothing expects
are findings. The rule for what grows stands in suites/soak/trend.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from soak.trend import FEWEST, Sample, quarters

ROOT = Path(__file__).parents[2]
BURN = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): pass"


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = argparse.ArgumentParser(
        prog="ci/soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Whatever else pytest takes: -k, a path of checks (default: suites/conformance).",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--minutes", type=float, default=10.0, metavar="M", help="default: %(default)g")
    add("--checks", type=int, default=0, metavar="N", help="so many checks, instead of --minutes")
    add("--subject", default="shardproof", metavar="ROOT", help="default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="of orders and worlds (default: 0)")
    add("--burners", type=int, default=1, metavar="N", help="busy processes, default: 1")
    add("--json", type=Path, metavar="FILE", help="default: out/soak-<date>-<pid>/soak.json")
    return made


@contextlib.contextmanager
def burning(count: int) -> Iterator[None]:
    """Keep so many processes busy on the last core."""
    command = [sys.executable, "-c", BURN, str(os.getpid())]
    burners = [subprocess.Popen(command) for _ in range(count)]
    try:
        for burner in burners:
            os.sched_setaffinity(burner.pid, {max(os.sched_getaffinity(0))})
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """0 nothing changed and nothing grew, 1 something did, 2 wrong usage, 3 no soak came about."""
    options, more = parser().parse_known_args(arguments)
    if options.minutes <= 0 or min(options.burners, options.checks, options.seed) < 0:
        parser().error("expected --minutes above 0, --burners, --checks and --seed from 0 up")
    folder = ROOT / "out" / f"soak-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    file = (options.json or folder / "soak.json").absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    named = any(Path(word.partition("::")[0]).exists() for word in more)
    words = [sys.executable, "-m", "harness", "-p", "soak.plugin", "-p", "no:terminal"]
    words += ["-p", "no:junitxml", "-p", "no:cacheprovider", "-s", "--subject", options.subject]
    words += ["--session-limit", "1e9", "--run-dir", str(folder)]
    words += ["--soak-minutes", str(options.minutes), "--soak-seed", str(options.seed)]
    # One parent for all, which is what is looked at.
    words += ["--jobs", "1", "--soak-checks", str(options.checks)]
    words += ["--soak-json", str(file), *more, *([] if named else ["suites/conformance"])]
    length = f"{options.checks:,} checks" if options.checks else f"{options.minutes:g} minutes"
    print(f"{length}, subject {options.subject}, seed {options.seed}", flush=True)
    with burning(options.burners):
        ended = subprocess.run(words, check=False, cwd=Path.cwd()).returncode
    if not file.exists():
        print(f"ci/soak: the session ended with {ended} and left no figures", file=sys.stderr)
        return 2 if ended == 2 else 3
    found = json.loads(file.read_text())
    if not found["checks"]:
        print("ci/soak: no check ran", file=sys.stderr)
        return 3
    for line in told(found):
        print(line)
    print(f"figures: {os.path.relpath(file)}")
    return int(bool(found["changed"] or found["grown"] or found["unexpected"]))


def told(found: dict[str, Any]) -> Iterator[str]:
    """The lines at the end."""
    for change in found["changed"]:
        yield "{check}: {first} at first, {then} as check {number}, seed {seed}".format(**change)
    for check, verdict in found["unexpected"].items():
        yield f"{check}: {verdict}"
    yield from found["grown"]
    samples = [Sample(*values) for values in found["samples"]]
    if len(samples) < FEWEST:
        yield f"{len(samples)} checks are too few to tell what grows: {FEWEST} are needed"
        return
    first, last = (part[len(part) // 2] for part in quarters(samples))
    fewest = [min(s.descriptors for s in part) for part in quarters(samples)]
    yield (
        f"{found['checks']:,} checks in {found['minutes']:.1f} minutes, "
        f"{found['checks'] / found['of']:.1f} rounds of {found['of']:,}: "
        f"{len(found['changed'])} verdicts changed; the parent held "
        f"{first.kilobytes / 1024:.1f} MB and {fewest[0]} descriptors in the first quarter, "
        f"{last.kilobytes / 1024:.1f} MB and {fewest[1]} in the last"
    )


if __name__ == "__main__":
    sys.exit(main())
