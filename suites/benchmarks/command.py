"""ci/bench: run the asv benchmarks, compare revisions, hold counts to their baseline."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.environment import clean, interpreter
from benchmarks.results.reproducibility import FACTOR
from benchmarks.settings import PREFIX, Settings
from harness.system import pipes, warm

ROOT = Path(__file__).parents[2]
MACHINE = Path.home() / ".asv-machine.json"
ROUNDS = 10
"""Interleaved rounds of a comparison, each a world: of seven asv's test of samples, two-sided at
0.002, can call a difference one, but a single odd world on either side would hide it."""
COMPARED_SECONDS = 4.0
"""For a measurement in each of them, at most: it has ROUNDS of them, and those of two commits."""
COMPARED = r"(time_call|track_(collectives|received|peak|calls))$"
"""What a comparison looks at: a ratio has no samples to tell a change from noise by."""


def main() -> int:
    """Do what the command line asks; 0 ok, 1 a regression, 2 wrong usage, 3 nothing measured."""
    warm.limit_threads()  # before anything imports torch or numpy
    options = _options()
    settings = _settings(options)
    if options.agree:
        from benchmarks.results import reproducibility

        return reproducibility.main(*options.agree)
    if options.check or options.update_baseline:
        return _counted(options, settings)
    if options.journal and (options.table or options.goals):
        os.environ[f"{PREFIX}JOURNAL"] = str(options.journal)
    if options.table:
        from benchmarks.results import table

        return table.main(settings, options.kept)
    if options.goals:
        from benchmarks.results import goals

        return goals.main(settings, options.bench, options.world, options.kept)
    if options.publish:
        return _publish()
    settings = replace(settings, smallest=settings.quick)
    os.environ.update(settings.environment())
    os.environ[f"{PREFIX}OWNER"] = str(os.getpid())
    _know_machine()
    if options.compare:
        return _compare(options.compare, options.bench)
    return _run(options.bench, options.journal)


def _settings(options: argparse.Namespace) -> Settings:
    """What the environment says, and the command line over it."""
    told = Settings.from_environment()
    quick = told.quick or options.quick
    usual = COMPARED_SECONDS if options.compare and not quick else 0.0
    return replace(
        told,
        quick=quick,
        device=options.device,
        backend=options.backend,
        share_gpus=options.share_gpus,
        room=_room(options),
        seconds=options.seconds or told.seconds or usual,
    )


def _room(options: argparse.Namespace) -> int:
    """The most ranks that NCCL takes here; 0: no bound."""
    if options.backend != "nccl" or options.share_gpus:
        return 0
    from harness.system import devices

    return devices.count(options.device)


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ci/bench",
        description=__doc__,
        epilog="Ends with 0: ok; 1: a regression or a failed benchmark; 2: wrong usage; "
        "3: nothing was measured.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--compare", metavar="REV", help="measure REV and HEAD in interleaved rounds")
    what.add_argument("--publish", action="store_true", help="write .asv/html from saved results")
    what.add_argument("--check", action="store_true", help="fail when a count rose over baseline")
    what.add_argument("--update-baseline", action="store_true", help="write baseline.json anew")
    what.add_argument(
        "--table", action="store_true", help="torch, reference and floor side by side"
    )
    what.add_argument(
        "--goals", action="store_true", help="what the reference is to reach, and does"
    )
    what.add_argument(
        "--agree",
        type=Path,
        nargs=2,
        metavar=("FIRST", "SECOND"),
        help="whether two journals of one code say the same: ratios that both know within "
        f"{FACTOR - 1:.0%}%, counts exactly",
    )
    parser.add_argument("--quick", action="store_true", help="small models, few samples")
    parser.add_argument(
        "--bench",
        type=_pattern,
        metavar="REGEX",
        help="only benchmarks whose name matches; with --goals also name and regime, as "
        "'CopyStateDict large'",
    )
    parser.add_argument(
        "--journal", type=Path, metavar="FILE", help="also write each measurement there, as JSON"
    )
    parser.add_argument(
        "--from",
        dest="kept",
        type=Path,
        metavar="FILE",
        help="with --table or --goals: the numbers of such a file, nothing is measured",
    )
    parser.add_argument(
        "--world",
        type=int,
        default=4,
        metavar="N",
        help="with --goals: worlds of this size, or the nearest that a benchmark has "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.0,
        metavar="S",
        help="most time for one measurement, in as many worlds as have 4 s each; it ends sooner "
        "where its ratios are known (default: "
        f"{Settings().budget:g}; --compare: {COMPARED_SECONDS:g}; "
        f"--quick: {Settings(quick=True).budget:g})",
    )
    parser.add_argument("--device", default="cpu", metavar="TYPE", help="default: %(default)s")
    parser.add_argument("--backend", metavar="NAME", help="default: the device's own")
    parser.add_argument(
        "--share-gpus",
        action="store_true",
        help="NCCL: let ranks share GPUs where there are fewer than ranks; times say little then",
    )
    options = parser.parse_args()
    if options.kept and not (options.table or options.goals):
        parser.error("--from: expected --table or --goals beside it")
    if options.seconds < 0:
        parser.error(f"--seconds {options.seconds:g}: expected more than 0")
    if options.world < 1:
        parser.error(f"--world {options.world}: expected a number of ranks, 1 or more")
    try:
        Settings.from_environment()
    except ValueError as error:
        parser.error(f"{PREFIX}SECONDS or {PREFIX}DEADLINE: {error}")
    if (options.device, options.backend, options.share_gpus) == ("cpu", None, False):
        options.backend = "gloo"
        return options
    import pytest

    from harness.settings.options import _backend, _device

    try:
        options.backend = _backend(options.backend, _device(options.device))
    except pytest.UsageError as error:
        parser.error(str(error))
    if options.share_gpus and options.backend != "nccl":
        parser.error("--share-gpus: expected --backend nccl")
    return options


def _counted(options: argparse.Namespace, settings: Settings) -> int:
    from benchmarks.results import baseline
    from benchmarks.run.world import WorldError

    quick = replace(settings, quick=True)
    try:
        return baseline.check(quick) if options.check else baseline.update(quick)
    except (WorldError, ValueError) as error:
        print(f"ci/bench: nothing to compare: {error}", file=sys.stderr)
        return 3


def _asv(*arguments: str) -> int:
    command = [sys.executable, "-m", "asv", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def _know_machine() -> None:
    """Let asv describe the machine by itself, where it would ask."""
    if not MACHINE.exists() and _asv("machine", "--yes"):
        raise SystemExit("asv machine --yes failed")


def _run(bench: str | None, kept: Path | None) -> int:
    """Measure the working tree; saved for the site when HEAD is what was measured."""
    extra = ["--bench", bench] if bench else []
    saved = clean(ROOT)
    if saved:
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True)
        extra += ["--set-commit-hash", head.strip()]
    with tempfile.TemporaryDirectory() as folder:
        journal = (kept or Path(folder, "journal")).absolute()
        journal.write_text("")  # measurements are added to what is there
        os.environ[f"{PREFIX}JOURNAL"] = str(journal)
        environment = f"existing:{interpreter(ROOT)}"
        status = _asv("run", "--show-stderr", "--environment", environment, *extra)
        measured = [json.loads(line) for line in journal.read_text().splitlines()]
    return _outcome(status, measured, saved)


def _outcome(status: int, measured: list[dict[str, Any]], saved: bool) -> int:
    """The exit code, and in words what was measured."""
    numbers = sum(bool(arm["seconds"]) for one in measured for arm in one["arms"].values())
    wrong = [
        f"{one['benchmark']} {one['regime']} x{one['size']}, {name}: {arm['wrong']}"
        for one in measured
        for name, arm in one["arms"].items()
        if arm["wrong"]
    ]
    for line in dict.fromkeys(wrong):
        print(f"no number: {line}")
    print(f"{len(measured)} measurements, {numbers} timed; asv ended with {status}")
    if not saved:
        print("not a clean checkout of a commit (reference/, suites/): not saved for the site")
    if not numbers:
        print("ci/bench: nothing was measured", file=sys.stderr)
        return 3
    return 1 if status or wrong else 0


def _compare(revision: str, bench: str | None) -> int:
    """Interleaved rounds of two commits, in the overlay environment."""
    if not clean(ROOT):
        print("uncommitted changes: what is compared is the commits, not the working tree")
    command = [
        *(sys.executable, "-m", "asv", "continuous", "--interleave-rounds"),
        *("--append-samples", "--no-only-changed", "--show-stderr", "--bench", bench or COMPARED),
        *("-a", f"rounds={ROUNDS}", "--factor", str(FACTOR), revision, "HEAD"),
    ]
    compared = False
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            compared |= re.match(r"\| *[-+]? *\|.*\S", line) is not None
    if not compared:
        print("ci/bench: nothing was compared", file=sys.stderr)
        return 3
    return 1 if process.returncode else 0


def _publish() -> int:
    """The site; 3 when there is no point in any graph."""
    if _asv("publish"):
        return 3
    graphs = (ROOT / ".asv" / "html" / "graphs").rglob("bench_*.json")
    points = sum(_points(json.loads(file.read_text())) for file in graphs)
    print(f"{points} points; open .asv/html/index.html through: .venv/bin/asv preview")
    return 0 if points else 3


def _points(series: list[Any]) -> int:
    """How many numbers a graph of asv holds: [[revision, value or values], ...]."""
    values = [v for _, y in series for v in (y if isinstance(y, list) else [y])]
    return sum(isinstance(v, (int, float)) and not math.isnan(v) for v in values)


if __name__ == "__main__":
    try:
        sys.exit(pipes.run(main))
    except KeyboardInterrupt:
        print("ci/bench: interrupted; the file of --journal has what was measured", file=sys.stderr)
        sys.exit(130)
