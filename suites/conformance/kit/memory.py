"""Memory that a call touches."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MIB = 1 << 20

_STATUS = Path("/proc/self/status")

# From malloc.h and mallopt(3).
_MMAP_THRESHOLD = -3


def peak_growth(call: Callable[[], Any], device: torch.device | None = None) -> int:
    """Bytes by which the call raises the memory that this process uses, at its highest.

    On an accelerator what its allocator hands out. On the CPU resident memory, by the kernel's
    count of touched pages, so memory that is only allocated costs nothing. What the process has
    freed goes back to the kernel before the call, or the call could use it unseen, and at once
    while it runs, or what the C library keeps for later would count.
    """
    gc.collect()
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)
        torch.accelerator.reset_peak_memory_stats(device)
        allocated = torch.accelerator.memory_allocated(device)
        kept = call()
        torch.accelerator.synchronize(device)
        del kept
        return int(torch.accelerator.max_memory_allocated(device) - allocated)
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, MIB // 8)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = _status("VmHWM")
    kept = call()
    after = _status("VmHWM")
    del kept
    return after - before


def _status(name: str) -> int:
    """A size of this process as the kernel counts it, in bytes."""
    found = re.search(rf"^{name}:\s*(\d+) kB$", _STATUS.read_text(), re.M)
    assert found is not None, f"{_STATUS} tells no {name}"
    return int(found[1]) * 1024
