"""Ending the ranks of a world: whatever is left of them, and nobody else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SUITES = Path(__file__).parents[1]

ENDS_A_GROUP_THAT_IS_GONE = """
import subprocess
from harness.parent.local_ranks import LocalRanks

class Rank:
    # One that has not joined the group of the first rank.
    def __init__(self):
        self.started = subprocess.Popen(["sleep", "60"])
        self.pid = self.started.pid
    @property
    def exitcode(self):
        return self.started.poll()
    def join(self, timeout=None):
        self.started.poll()

first = subprocess.Popen(["true"], start_new_session=True)
first.wait()
ranks = LocalRanks.__new__(LocalRanks)
ranks._group, ranks._processes = first.pid, {1: Rank()}
ranks._kill_group()
print("went on; the other rank ended with", ranks._processes[1].started.wait(10))
"""


def test_a_group_that_has_ended_meanwhile_takes_nobody_along() -> None:
    """Its signal finds no group; the one of number 0 would be whoever started the run."""
    ended = subprocess.run(
        [sys.executable, "-c", ENDS_A_GROUP_THAT_IS_GONE],
        env=os.environ | {"PYTHONPATH": str(SUITES)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        start_new_session=True,
    )
    assert ended.returncode == 0, f"ended with {ended.returncode}: {ended.stderr}"
    assert ended.stdout == "went on; the other rank ended with -9\n"
