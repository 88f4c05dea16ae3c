"""What accelerators this machine has: asked of the driver by a child, never by the parent of ranks.

Asking has a price. NVIDIA's management library starts a thread when it is first asked (nvmlInit of
driver 580, which torch.cuda.is_available() calls), the runtime makes a context besides; and a
process with threads or a context cannot fork ranks.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import traceback
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
    return str(in_a_child(_accelerator))


@functools.cache
def count(kind: str) -> int:
    """Devices of a type that torch sees here; 0 where it sees none."""
    if kind == "cpu":
        return 1
    return int(in_a_child(functools.partial(_count, kind)))


@functools.cache
def name(kind: str) -> str:
    """What the first device of a type calls itself."""
    return str(in_a_child(functools.partial(_name, kind)))


def _accelerator() -> str:
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found else ""


def _count(kind: str) -> int:
    import torch

    module = getattr(torch, kind, None)
    if module is None or not getattr(module, "is_available", lambda: False)():
        return 0
    return int(module.device_count())


def _name(kind: str) -> str:
    import torch

    return str(torch.get_device_module(kind).get_device_name(0))


def in_a_child(ask: Callable[[], Any]) -> Any:
    """What `ask` gives, JSON, when a fork of this process calls it; the fork then ends.

    A process that has threads already forks no ranks, and asks by itself.

    Raises:
        RuntimeError: `ask` raised, its process died, or it did not answer within LIMIT.

    """
    if processes.thread_count() != 1:
        return ask()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(ask, writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        late = not select.select([pipe], [], [], LIMIT)[0]
        if late:
            os.kill(child, signal.SIGKILL)
        told = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if late:
        raise RuntimeError(f"the device's driver gave no answer within {LIMIT:g} s")
    if not told:
        raise RuntimeError(f"asking the device's driver ended the process that asked: {status}")
    answer = json.loads(told)
    if "error" in answer:
        raise RuntimeError(f"the device's driver cannot be asked: {answer['error']}")
    return answer["value"]


def _answer(ask: Callable[[], Any], writing: int) -> None:
    """Be the child; never returns."""
    code = 1
    try:
        try:
            answer = {"value": ask()}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        os.write(writing, json.dumps(answer).encode())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
