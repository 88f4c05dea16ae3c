"""What Linux tells of processes, and how to end them: /proc, process groups, sub-reaping."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_TCP_LISTEN = "0A"


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def adopt_orphans() -> None:
    """Make orphaned descendants children of this process, so that none can hide from it."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """End this process when its parent ends, however the parent ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent went before the request was in place
        os._exit(1)


def _stat(pid: int) -> tuple[str, int, int] | None:
    """(state, parent, process group) of a process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    state, ppid, pgrp = text.rpartition(")")[2].split()[:3]
    return state, int(ppid), int(pgrp)


def state(pid: int) -> str:
    """One letter: R running, S sleeping, D disk, T stopped, Z zombie; empty when gone."""
    found = _stat(pid)
    return found[0] if found else ""


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def children(parent: int) -> list[int]:
    """Direct children of a process, zombies included."""
    try:
        # One small file a thread, instead of a walk over every process of the machine.
        lists = [(task / "children").read_text() for task in Path(f"/proc/{parent}/task").iterdir()]
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN
        return _children_by_walk(parent)
    return [int(word) for text in lists for word in text.split()]


def _children_by_walk(parent: int) -> list[int]:
    return [p for p in _all_pids() if (found := _stat(p)) and found[1] == parent]


def group_members(pgid: int) -> list[int]:
    """Living processes of a process group, whose number is positive."""
    if pgid <= 0:
        raise ValueError(
            f"process group {pgid}: 0 would be this process's own, expected a positive"
        )
    try:
        os.killpg(pgid, 0)
    except ProcessLookupError:
        return []
    except PermissionError:  # a member has become another user's
        return [p for p in _all_pids() if (s := _stat(p)) and s[2] == pgid]
    return [p for p in _all_pids() if (s := _stat(p)) and s[2] == pgid and s[0] != "Z"]


def command(pid: int) -> str:
    """The command line of a process, for messages."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return "?"
    return raw.replace(b"\0", b" ").decode(errors="replace").strip()[:120] or "?"


def ended_for_memory() -> int:
    """How many processes the kernel has ended for want of memory, on the whole machine."""
    try:
        counters = Path("/proc/vmstat").read_text()
    except OSError:
        return 0
    found = re.search(r"^oom_kill (\d+)$", counters, re.MULTILINE)
    return int(found[1]) if found else 0


def thread_count() -> int:
    """Native threads of this process, whoever started them."""
    return len(os.listdir("/proc/self/task"))


_ENDING = frozenset({signal.SIGINT, signal.SIGTERM})


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Let the signals that end a run wait; a process that is started inside has to let them in."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_signals_in() -> None:
    """In a process that was started while they were held back, after its handlers are set."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)


def ask_a_child(ask: Callable[[], Any], limit: float) -> Any:
    """What `ask` gives, JSON, when a fork of this process calls it; the fork then ends.

    Raises ChildProcessError with the cause, in words that go on after what was asked: it raised,
    its process died, or it did not end within `limit` seconds.
    """
    reader, writer = os.pipe()
    parent = os.getpid()
    with signals_held_back():
        child = os.fork()
        if child == 0:
            _answer(ask, parent, writer)
    os.close(writer)
    try:
        text = _read_to_the_end(reader, limit)
    finally:
        os.close(reader)
        signal_quietly(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if text is None:
        raise ChildProcessError(f"did not end within {limit:g} s")
    try:
        answer = json.loads(text)
    except ValueError:
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise ChildProcessError(f"ended the process with {how}") from None
    if "raised" in answer:
        raise ChildProcessError(f"raised {answer['raised']}")
    return answer["value"]


def _answer(ask: Callable[[], Any], parent: int, writer: int) -> None:
    """Be the child; never returns."""
    try:
        die_with_parent(parent)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        let_signals_in()
        try:
            answer = {"value": ask()}
        except Exception as error:
            answer = {"raised": f"{type(error).__name__}: {error}"}
        with open(writer, "wb") as pipe:
            pipe.write(json.dumps(answer).encode())
    finally:
        os._exit(0)


def _read_to_the_end(reader: int, limit: float) -> bytes | None:
    """What is written into a pipe until it is closed; None where that takes too long."""
    data = b""
    deadline = time.monotonic() + limit
    while select.select([reader], [], [], max(deadline - time.monotonic(), 0))[0]:
        if not (piece := os.read(reader, 1 << 16)):
            return data
        data += piece
    return None


_received: list[int] = []
"""Signals that told this process to end. The exception may be lost, in a test or a finalizer."""


def terminate(number: int, frame: FrameType | None) -> None:
    """Handle a signal that ends the run."""
    _received.append(number)
    raise KeyboardInterrupt(f"signal {number}")


def heed_signals() -> None:
    """End where a signal has asked for it, also if its exception was lost."""
    if _received:
        raise KeyboardInterrupt(f"signal {_received[0]}")


def signal_quietly(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def signal_main_thread(pid: int, number: signal.Signals) -> None:
    """Send a signal to the main thread of a process that may be gone.

    The kernel gives a signal for the process to any thread that is free, such as a transport's,
    which knows no Python frames; a dump from there misses the stack, or breaks while it moves.
    """
    tgkill = getattr(ctypes.CDLL(None), "tgkill", None)
    if tgkill is None:  # a C library without the wrapper
        signal_quietly(pid, number)
    else:
        tgkill(pid, pid, int(number))


def reap(known: frozenset[int]) -> list[tuple[int, str]]:
    """End and reap children of this process that are not `known`.

    Adopted orphans come in waves: ending one may hand its own children to this process.
    Returns (pid, command) of those that were still alive.
    """
    alive: list[tuple[int, str]] = []
    deadline = time.monotonic() + 5
    while strangers := [p for p in children(os.getpid()) if p not in known]:
        for pid in strangers:
            if state(pid) not in {"Z", ""}:
                alive.append((pid, command(pid)))
                signal_quietly(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        if time.monotonic() > deadline:
            raise RuntimeError(f"children that cannot be ended: {strangers}")
    return alive


def wait_for(pid: int) -> None:
    """Return when a process, which need not be a child, has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        select.select([descriptor], [], [])
    finally:
        os.close(descriptor)


def listens(pid: int, port: int) -> bool:
    """Whether a process of this user listens on a TCP port."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == _TCP_LISTEN and int(local.rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{rest[5]}]")
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(descriptor) in inodes:
                return True
    return False
