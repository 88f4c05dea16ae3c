"""CPUs that do not halt while ranks are measured.

A rank that waits for the others leaves its CPU idle. In a virtual machine an idle CPU is soon given
back to the host, and wakes late for a rank that is to go on. How soon depends on what else ticks on
the machine: asv's own processes do, so that torch's 149 broadcasts to four ranks on two cores took
132 ms under asv and 170 ms without. Where both CPUs ticked, torch's `_distribute_state_dict` of a
model took 53 times its floor, and 116 times where they did not, with five times the spread between
worlds (28 %, 5 %).
"""

from __future__ import annotations

import os
import signal
import time

from harness.system import processes

TICK = 0.0005
"""Seconds between two ticks: they take 1 to 2 % of a CPU."""


def keep_awake() -> list[int]:
    """Start a process on each CPU of this one that ticks for as long as this one lives; pids."""
    return [_start(cpu) for cpu in sorted(os.sched_getaffinity(0))]


def _start(cpu: int) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        # Ctrl-C is for the parent, with which this one ends.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        processes.die_with_parent(parent)
        os.sched_setaffinity(0, {cpu})
        while True:
            time.sleep(TICK)
    finally:
        os._exit(1)
