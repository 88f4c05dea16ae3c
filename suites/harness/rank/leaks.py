"""What must not outlive a check on a rank: seen before, seen after, the difference named.

How each thing is told apart from the neighbours' is what makes the blame right: descriptors,
threads, variables and children are the process's own; temporary files are looked for in the rank's
own TMPDIR; a shared-memory segment counts when this rank was seen to make it (audit hook) or when
its name carries the rank's pid, because other runs may use /dev/shm at the same time.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from harness.system import processes

_SHM = Path("/dev/shm")
_DRIVERS = ("/dev/nvidia", "/dev/kfd", "/dev/dri/")
"""Device files that a GPU's driver opens for the process, many, and as it comes to need them."""
_OWN_VARIABLES = frozenset({"PYTEST_CURRENT_TEST"})

_WATCHED = re.compile(r"^tfd:\s*(\d+)", re.MULTILINE)

_created_segments: set[str] = set()
_watching = False


def watch_segments() -> None:
    """Note every shared-memory segment that this process makes from now on."""
    global _watching
    if _watching:
        return
    _watching = True

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str) and args[0].startswith("/dev/shm/"):
            _created_segments.add(args[0].removeprefix("/dev/shm/"))

    sys.addaudithook(audit)
    # CPython raises no audit event for shm_open.
    import _posixshmem  # type: ignore[import-not-found]

    original = _posixshmem.shm_open

    def shm_open(path: str, *args: Any, **kwargs: Any) -> int:
        _created_segments.add(path.lstrip("/"))
        return original(path, *args, **kwargs)

    _posixshmem.shm_open = shm_open


class Snapshot:
    """What a rank held before the check's body."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.environment = dict(os.environ)
        self.threads = {id(thread) for thread in threading.enumerate()}
        self.descriptors = dict(_descriptors())
        self.segments = set(os.listdir(_SHM))
        self.children = set(processes.children(os.getpid()))

    def leaks(self) -> list[str]:
        """What is there now and was not before, one line each."""
        return [
            *self._children(),
            *self._threads(),
            *self._environment(),
            *self.new_descriptors(),
            *self._segments(),
            *self._files(),
        ]

    def _children(self) -> Iterator[str]:
        known = self.children | tracker()
        for pid in processes.children(os.getpid()):
            if pid not in known:
                yield f"child process {pid} ({processes.command(pid)})"

    def _threads(self) -> Iterator[str]:
        for thread in threading.enumerate():
            if id(thread) not in self.threads:
                yield f"thread {thread.name!r}"

    def _environment(self) -> Iterator[str]:
        now = dict(os.environ)
        for name in sorted((now.keys() | self.environment.keys()) - _OWN_VARIABLES):
            if now.get(name) != self.environment.get(name):
                yield (
                    f"environment variable {name}: was {self.environment.get(name)!r}, "
                    f"is {now.get(name)!r}"
                )

    def new_descriptors(self) -> Iterator[str]:
        """Descriptors that were not there before."""
        for number, target in _descriptors():
            if self.descriptors.get(number) != target:
                yield f"file descriptor {number} ({target})"

    def _segments(self) -> Iterator[str]:
        for name in sorted(set(os.listdir(_SHM)) - self.segments):
            if name in _created_segments or _carries(name, os.getpid()):
                (_SHM / name).unlink(missing_ok=True)  # it would outlive the machine's next runs
                yield f"shared-memory segment /dev/shm/{name}"

    def _files(self) -> Iterator[str]:
        for path in sorted(self.tmp.iterdir()) if self.tmp.is_dir() else []:
            yield f"temporary file {path.name} (in the rank's TMPDIR)"


def tracker() -> frozenset[int]:
    """The process of multiprocessing's tracker: one a process, which ends it when it ends."""
    pid = getattr(resource_tracker._resource_tracker, "_pid", None)
    return frozenset({pid} if pid else ())


def remove_segments(before: frozenset[str], pids: set[int]) -> list[str]:
    """Remove segments whose name carries one of the pids; for ranks that could not do it."""
    removed = []
    for name in sorted(set(os.listdir(_SHM)) - before):
        if any(_carries(name, pid) for pid in pids):
            (_SHM / name).unlink(missing_ok=True)
            removed.append(name)
    return removed


def _carries(name: str, pid: int) -> bool:
    return str(pid) in name.replace("-", "_").split("_")


def _descriptors() -> Iterator[tuple[int, str]]:
    """Descriptors that a check can be blamed for.

    Transports keep sockets, epoll and event descriptors for the life of the process, and Gloo a
    pipe for each group, told by its being watched by an epoll instance. A GPU's driver opens its
    device files whenever the process does something for the first time.
    """
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    watched: set[str] = set()
    for number, target in found.items():
        if target == "anon_inode:[eventpoll]":
            info = Path(f"/proc/self/fdinfo/{number}").read_text()
            watched |= {found.get(int(t), "") for t in _WATCHED.findall(info)}
    for number, target in found.items():
        kept = ("socket:", "anon_inode:", *_DRIVERS)
        if target not in watched and not target.startswith(kept):
            yield number, target
