"""A suite whose parent meets a fault of faults/table.py; run by test_fault_table.py.

A test without a world runs in the parent, and plants the fault there.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from faults.own_disk import fill, mount_small
from faults.table import LIMIT
from harness.session import plugin, results

KIND, PHASE, *_ = os.environ["FAULT_CELL"].split(", ")
PARENT = os.getpid()
undo: list[Callable[[], Any]] = []
HERE = Path(__file__).parent
SMALL = HERE / ("tmp" if PHASE == "start" else "out")
"""Where ranks have their folders, or where the run leaves its results."""

plugin.Run._write_at = property(lambda _: 0.0, lambda *_: None)  # type: ignore[assignment]
if KIND == "disk full":
    inside = [p.name for p in SMALL.iterdir()]
    mount_small(SMALL)
    for name in inside:
        (SMALL / name).mkdir()


def exhaust_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # What one rank takes, and no more: the world is half started when they end.
    room = len(os.listdir("/proc/self/fd")) + 4
    resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))
    undo.append(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)))


def fill_the_disk() -> None:
    file = fill(SMALL)
    if PHASE == "start":
        undo.append(file.unlink)
    else:  # nobody else sees this disk
        (results_of_the_run,) = SMALL.glob("*/results.json")
        undo.append(lambda: shutil.copy(results_of_the_run, HERE / "seen.json"))


def be_continued_later() -> None:
    stopped = f"grep -q '^State:.T' /proc/{PARENT}/status"
    wait = f"until {stopped}; do sleep 0.1; done; sleep {LIMIT + 1}; kill -CONT {PARENT}"
    undo.append(subprocess.Popen(["sh", "-c", wait]).wait)


def be_killed_while_it_writes() -> None:
    def write(self: Path, text: str, *args: Any, **kw: Any) -> int:
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        os.kill(PARENT, signal.SIGKILL)
        return 0

    Path.write_text = write  # type: ignore[assignment, method-assign]


def jump() -> None:
    real = time.time
    time.time = lambda: real() - 86400.0


def raise_in_a_report() -> None:
    def fail(*_: Any) -> None:
        raise ValueError("planted")

    results.check = fail  # type: ignore[assignment]


FAULTS: dict[tuple[str, str], Callable[[], Any]] = {
    ("no descriptors", "start"): exhaust_descriptors,
    ("disk full", "start"): fill_the_disk,
    ("disk full", "report"): fill_the_disk,
    ("SIGSTOP", "body"): be_continued_later,
    ("SIGKILL", "body"): lambda: None,
    ("SIGKILL", "report"): be_killed_while_it_writes,
    ("clock jump", "report"): jump,
    ("raise", "report"): raise_in_a_report,
}


@pytest.mark.world(2)
def test_before() -> None:
    dist.barrier()


def test_plants() -> None:
    FAULTS[KIND, PHASE]()


@pytest.mark.world(2)
def test_planted(rank: int) -> None:
    dist.barrier()
    if PHASE == "body" and rank == 0:
        os.kill(PARENT, {"SIGSTOP": signal.SIGSTOP, "SIGKILL": signal.SIGKILL}[KIND])
        if KIND == "SIGKILL":
            time.sleep(1000)
    dist.barrier()
    if (KIND, PHASE) == ("disk full", "report"):
        print("for the log")
        raise ValueError("planted")


def test_undoes() -> None:
    for step in undo:
        step()


@pytest.mark.world(2)
def test_after() -> None:
    dist.barrier()
