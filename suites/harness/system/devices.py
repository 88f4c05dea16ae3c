"""What accelerators this machine has: asked of the driver by a child, never by the parent of ranks.

Asking has a price. NVIDIA's management library starts a thread when it is first asked (nvmlInit of
driver 580, which torch.cuda.is_available() calls), the runtime makes a context besides; and a
process with threads or a context cannot fork ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from harness.system import processes

LIMIT = 60.0
"""Seconds that a driver has to answer."""


@functools.cache
def built() -> str:
    """The type of accelerator that torch is built for, whether there is one or not; or cpu."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=False)
    return found.type if found else "cpu"


@functools.cache
def accelerator() -> str:
    """The type of this machine's accelerator, as cuda; empty where torch sees none."""
    if built() == "cpu":
        return ""

    def ask() -> str:
        import torch

        found = torch.accelerator.current_accelerator(check_available=True)
        return found.type if found else ""

    return str(in_a_child(ask))


@functools.cache
def count(kind: str) -> int:
    """Devices of a type that torch sees here; 0 where it sees none."""
    if kind == "cpu":
        return 1

    def ask() -> int:
        import torch

        module = getattr(torch, kind, None)
        if module is None or not getattr(module, "is_available", lambda: False)():
            return 0
        return int(module.device_count())

    return int(in_a_child(ask))


@functools.cache
def name(kind: str) -> str:
    """What the first device of a type calls itself."""

    def ask() -> str:
        import torch

        return str(torch.get_device_module(kind).get_device_name(0))

    return str(in_a_child(ask))


def in_a_child(ask: Callable[[], Any]) -> Any:
    """What `ask` gives, JSON, when a fork of this process calls it.

    A process that has threads already forks no ranks, and asks by itself.

    Raises:
        RuntimeError: `ask` raised, its process died, or it did not answer within LIMIT.

    """
    if processes.thread_count() != 1:
        return ask()
    try:
        return processes.ask_a_child(ask, LIMIT)
    except ChildProcessError as error:
        raise RuntimeError(f"asking the device's driver {error}") from None
