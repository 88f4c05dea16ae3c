"""How much memory a phase takes, by samples: a counter of the process is the job's to reset."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_PAGE = os.sysconf("SC_PAGE_SIZE")
_EVERY = 0.01


class Peaks:
    """Bytes above what was held at its start, for each named phase."""

    def __init__(self) -> None:
        self.cpu: dict[str, int] = {}
        self.device: dict[str, int] = {}

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Sample while the block runs."""
        start, most = _now(), [0, 0]
        done = threading.Event()

        def look() -> None:
            for at, (now, before) in enumerate(zip(_now(), start, strict=True)):
                most[at] = max(most[at], now - before)

        def sample() -> None:
            while not done.wait(_EVERY):
                look()

        thread = threading.Thread(target=sample, name=f"prove: memory of {phase}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            look()
            done.set()
            thread.join()
            self.cpu[phase] = max(self.cpu.get(phase, 0), most[0])
            self.device[phase] = max(self.device.get(phase, 0), most[1])


def _now() -> tuple[int, int]:
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * _PAGE
    allocated = 0
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        module = getattr(torch, kind.type, None) if kind is not None else None
        if module is not None and hasattr(module, "memory_allocated") and module.is_initialized():
            allocated = module.memory_allocated()
    return resident, allocated
