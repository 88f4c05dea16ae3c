"""The memory that a call takes at its highest, the same in each run.

Buffers of a collective are dropped by threads of the transport's, which the machine may run late;
so an operation waits until they have.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.run.operations import Operations

PEAKS = 2
"""Times that a peak is measured, in case that a thread was seen asleep a moment too early."""
LONGEST_SETTLING = 30.0
"""Seconds after which a thread that still runs is none that is about to free buffers."""
SMALLEST = 1024
"""Bytes of the smallest allocation that counts; smaller ones are bookkeeping, freed at any time."""


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes by which the call raises what torch's allocator has handed out, at its highest.

    Sizes as asked for, so the same from run to run; on the CPU from the profiler's record of
    allocations, which sees every thread.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return int(torch.cuda.max_memory_allocated() - before)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        kept = call()
    del kept
    record = profile.kineto_results
    assert record is not None
    events = [e for e in record.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if abs(event.nbytes()) >= SMALLEST:
            live += event.nbytes()
        peak = max(peak, live)
    return peak


class Settled(Operations):
    """Once a collective is done, waits before the next operation until no thread has its buffers.

    Not right after the collective was called: its caller waits for it later, with no operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self._under_way: list[dist.Work] = []
        self._waited = False

    def before(self) -> None:
        """Wait, where a collective has ended since the last operation."""
        under_way = [work for work in self._under_way if not work.is_completed()]
        done = len(under_way) < len(self._under_way)
        self._under_way = under_way
        if done or self._waited:
            settle()

    def after(self, namespace: str, name: str, args: tuple[Any, ...], result: Any) -> None:
        """Note what may end before the next one."""
        self._waited = namespace == "_c10d_functional" and name.startswith("wait_tensor")
        if namespace == "c10d":
            parts = result if isinstance(result, (list, tuple)) else (result,)
            boxed = [part for part in parts if isinstance(part, torch.ScriptObject)]
            self._under_way += map(dist.Work.unbox, boxed)


def settle() -> None:
    """Wait until every other thread of this process sleeps.

    A thread of Gloo's drops the buffers of a collective after it has told the caller that it is
    done, and a machine that is busy may run it much later: no time is long enough, but a thread
    that has something left to do is not asleep. It may be for a moment, where another holds the
    lock, so they have to be found asleep twice.

    Raises:
        TimeoutError: one ran for LONGEST_SETTLING.

    """
    end = time.monotonic() + LONGEST_SETTLING
    asleep = 0
    while asleep < 2:
        os.sched_yield()
        running = _running()
        asleep = 0 if running else asleep + 1
        if running and time.monotonic() > end:
            raise TimeoutError(
                f"the thread {running} runs for {LONGEST_SETTLING:.0f} s: peak memory is measured "
                "while other threads sleep, since one may be about to free a collective's buffers"
            )


def _running() -> str:
    """The id and name of another thread that does not sleep; empty when all do."""
    me = threading.get_native_id()
    for task in os.listdir("/proc/self/task"):
        if int(task) == me:
            continue
        try:
            with open(f"/proc/self/task/{task}/stat") as file:
                name, _, rest = file.read().rpartition(") ")
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        if rest[0] != "S":
            return f"{name})"
    return ""
