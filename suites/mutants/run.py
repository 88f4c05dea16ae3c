"""Plant each fault in a copy of the reference, and judge the copy: `ci/mutants [NAME ...]`.

Exit 0: each fault was caught by a check of the function that it breaks; 1: one survived;
2: no such name; 3: a fault could not be planted, or the judging itself broke. A fault that shows
only on an accelerator is named as not judged where there is none.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import devices
from mutants.catalog import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
BAD = {"fail", "timeout", "crash", "error"}


class CannotPlantError(Exception):
    """The text that a mutant replaces is not in the reference exactly once."""


def plant(mutant: Mutant, folder: Path) -> None:
    """Copy the reference into `folder`, with the fault in it."""
    shutil.copytree(
        ROOT / "reference" / "shardproof",
        folder / "shardproof",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    path = folder / "shardproof" / mutant.file
    source = path.read_text()
    if source.count(mutant.old) != 1:
        raise CannotPlantError(
            f"{mutant.name}: its text stands {source.count(mutant.old)} times in {mutant.file}, "
            "expected once: bring suites/mutants/catalog.py up to date"
        )
    path.write_text(source.replace(mutant.old, mutant.new))


def judge(mutant: Mutant) -> tuple[str, list[str]]:
    """(what happened: caught, survived, unjudged or broken; the checks that caught it, or why)."""
    device = accelerator() if mutant.accelerator else None
    if mutant.accelerator and device is None:
        return "unjudged", []
    with tempfile.TemporaryDirectory(prefix="shardproof-mutant-") as name:
        folder = Path(name)
        plant(mutant, folder)
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "harness",
                "-q",
                "--tb=no",
                "-rN",
                "-p",
                "no:cacheprovider",
                "--subject",
                "shardproof",
                "--run-dir",
                str(folder / "run"),
                "--maxfail=3",
                "--thorough",
                "--collective-limit",
                "4",
                "--check-limit",
                "15",
                # Gloo, since its ranks share a GPU: NCCL would leave out what needs several.
                *(("--device", device, "--backend", "gloo") if device else ()),
                *(str(ROOT / "suites" / "conformance" / t) for t in mutant.checks),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
            env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT / 'suites'}"},
        )
        results = folder / "run" / "results.json"
        if not results.exists():
            return "broken", [done.stdout[-2000:] + done.stderr[-2000:]]
        data = json.loads(results.read_text())
    if (
        f"{name}/" not in data["run"]["subject_file"]
        and data["run"]["subject_file"] != "__init__.py"
    ):
        return "broken", ["the copy was not the one that was judged"]
    verdicts = {c["verdict"] for c in data["checks"]}
    if verdicts <= {"precondition"}:  # the copy cannot be imported, or lacks the function
        return "broken", sorted({c["message"] for c in data["checks"]}) or [done.stdout[-2000:]]
    killers = [c["id"] for c in data["checks"] if c["verdict"] in BAD]
    if killers:
        return "caught", killers
    unrun = [c["message"] for c in data["checks"] if c["verdict"] == "precondition"]
    if not unrun:
        return "survived", []
    return "survived", [
        f"{len(unrun)} of {len(data['checks'])} checks could not run here: {unrun[0]}"
    ]


def accelerator() -> str | None:
    """The type of this machine's accelerator, if it has one."""
    return devices.accelerator() or None


def main() -> int:
    """Judge the mutants named, or all."""
    parser = argparse.ArgumentParser(prog="ci/mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to run (default: all)")
    parser.add_argument("--list", action="store_true", help="say what each is, and run nothing")
    options = parser.parse_args()
    known = {m.name: m for m in MUTANTS}
    if unknown := set(options.names) - known.keys():
        print(f"no mutant {', '.join(sorted(unknown))}; see ci/mutants --list", file=sys.stderr)
        return 2
    if options.list:
        for mutant in MUTANTS:
            print(f"{mutant.name:<44}{mutant.fault}")
        return 0
    chosen = [known[n] for n in options.names] or list(MUTANTS)
    worst = 0
    for number, mutant in enumerate(chosen, 1):
        began = time.monotonic()
        try:
            state, said = judge(mutant)
        except CannotPlantError as error:
            state, said = "broken", [str(error)]
        worst = max(worst, {"caught": 0, "unjudged": 0, "survived": 1, "broken": 3}[state])
        first = said[0].rpartition("::")[2] if state == "caught" else mutant.fault
        if state == "unjudged":
            first = f"shows on an accelerator only: {mutant.fault}"
        print(
            f"{number:>3}/{len(chosen)} {state:<9}{mutant.name:<44}{first}  "
            f"({time.monotonic() - began:.0f} s)",
            flush=True,
        )
        if state in {"broken", "survived"} and said:
            print(said[0], file=sys.stderr)
    return worst


if __name__ == "__main__":
    sys.exit(main())
