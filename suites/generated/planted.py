"""Faults of ten dimensions in a copy of the reference, each a patch that `ci/fuzz` has to find.

    ci/fuzz --planted               all of them, a line each: found when, and how small
    ci/fuzz --planted NAME ...      some

A patch in faults/ begins with its dimension and what a user would suffer. To add one: change the
reference, `git diff reference > x.patch`, cut its paths to `a/shardproof/...`, write the two lines.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "faults"
MINUTES = 2.0


@dataclass(frozen=True)
class Fault:
    """One patch."""

    name: str
    dimension: str
    fault: str
    path: Path


@dataclass(frozen=True)
class Found:
    """What became of a search for it."""

    difference: str = ""
    """Empty where it was not found."""
    seconds: float = 0.0
    cases: int = 0
    ranks: int = 0
    tensors: int = 0
    steps: int = 0


def faults() -> list[Fault]:
    """All patches, by dimension."""
    found = []
    for path in sorted(FOLDER.glob("*.patch")):
        first, second = path.read_text().splitlines()[:2]
        dimension, fault = first.removeprefix("Dimension: "), second.removeprefix("Fault: ")
        found.append(Fault(path.stem, dimension, fault, path))
    return sorted(found, key=lambda fault: (fault.dimension, fault.name))


def search(fault: Fault, minutes: float = MINUTES, seed: int = 0) -> Found:
    """Plant a fault in a copy, and look for it among the cases of all functions.

    Raises RuntimeError where it cannot be planted or the search itself fails.
    """
    with tempfile.TemporaryDirectory(prefix="shardproof-fault-") as name:
        folder = Path(name)
        shutil.copytree(
            ROOT / "reference" / "shardproof",
            folder / "shardproof",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        done = subprocess.run(
            ["git", "apply", "-p1", str(fault.path)],
            cwd=folder,
            env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{fault.name}: the patch does not apply: {done.stderr.strip()}")
        journal = folder / "journal"
        begin = time.monotonic()
        done = subprocess.run(
            [
                *(sys.executable, "-m", "generated", "--first", "--minutes", str(minutes)),
                *("--seed", str(seed), "--shrink", "30", "--out", str(folder / "out")),
                *("--journal", str(journal)),
            ],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT / 'suites'}"},
            capture_output=True,
            text=True,
            check=False,
            timeout=60 * minutes + 300,
        )
        seconds = time.monotonic() - begin
        if done.returncode not in (0, 1):
            raise RuntimeError(f"{fault.name}: {(done.stdout + done.stderr)[-2000:]}")
        if not journal.exists():
            return Found(seconds=seconds)
        _must_be_the_faults(fault, next((folder / "out").glob("*.py")))
        return Found(**json.loads(journal.read_text().splitlines()[0]))


def _must_be_the_faults(fault: Fault, script: Path) -> None:
    """Raise RuntimeError where the reference itself differs in the case, too."""
    done = subprocess.run(
        [sys.executable, "-m", "generated", "--replay", str(script)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'reference'}:{ROOT / 'suites'}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-500:]
        raise RuntimeError(f"{fault.name}: the reference differs without the fault, too: {said}")


def main(names: list[str], minutes: float, seed: int) -> int:
    """Search for each, and say what was found."""
    known = {fault.name: fault for fault in faults()}
    if unknown := set(names) - known.keys():
        print(
            f"ci/fuzz: no fault {', '.join(sorted(unknown))}; there are {', '.join(known)}",
            file=sys.stderr,
        )
        return 2
    missed = 0
    for fault in [known[name] for name in names] or list(known.values()):
        try:
            found = search(fault, minutes, seed)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 3
        missed += not found.difference
        if found.difference:
            size = f"{found.ranks} ranks, {found.tensors} tensors, {found.steps} steps"
            said = f"{found.seconds:4.0f} s, case {found.cases:5}, {size}: {found.difference}"
        else:
            said = f"not found in {found.seconds:.0f} s: {fault.fault}"
        print(f"{fault.dimension:<10}{fault.name:<20}{said[:150]}", flush=True)
    return 1 if missed else 0
