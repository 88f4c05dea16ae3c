"""The ranks of one world on this machine: start them, look at them, end them.

A world has one `LocalRanks` on each machine. Everything that needs a rank's process (its pid, its
files, its signals) happens here. The world that judges the check may be on another machine, and
gets updates.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from harness.rank import leaks, rank_process
from harness.records import call_ring
from harness.settings.requirements import WorldSpec
from harness.system import processes, stacks
from harness.system.channel import Frame, ParentEnd, RankEnd, pair

TERM_GRACE = 0.5
_PREFIX = "shardproof-world-"
_YOUNG = 60.0
"""Seconds in which a folder may have been made, and not locked."""


@dataclass(frozen=True)
class Node:
    """One machine of a run."""

    index: int = 0
    host: str = ""

    def __str__(self) -> str:
        return f"node {self.index} ({self.host})"


@dataclass(frozen=True)
class WorldOrder:
    """What the ranks of a world on one machine are started from; travels as JSON."""

    world: int
    """A number of its own for each world of a run."""
    spec: WorldSpec
    ranks: tuple[int, ...]
    node: Node
    seed: int
    store: rank_process.StoreAddress | None
    """Where ranks on several machines meet; None: in a file of the ranks' own folder."""
    shared: str = ""
    """The folder that all machines see; empty: the ranks' own."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WorldOrder:
        known = dict(data)
        known["spec"] = WorldSpec(**known["spec"])
        known["node"] = Node(**known["node"])
        known["ranks"] = tuple(known["ranks"])
        known["store"] = rank_process.StoreAddress(**known["store"]) if known["store"] else None
        return cls(**known)


@dataclass
class RankUpdate:
    """What is new about one rank, and how its process stands."""

    rank: int
    frames: list[Frame] = field(default_factory=list)
    exitcode: int | None = None
    closed: bool = False
    garbage: bool = False
    """Something other than the harness wrote into the rank's channel."""


@dataclass
class Evidence:
    """What a rank's machine can tell of it: its process state, its stack and its output."""

    state: str = ""
    stack: str = ""
    """For a silent rank the dump that it was asked for; else what faulthandler wrote."""
    log: str = ""
    calls: dict[str, Any] | None = None
    """Its last collectives, as `ring.read` gives them."""
    starved: bool = False
    """Whether the kernel has ended a process of the machine for want of memory."""
    clock: float = 0.0
    """What the clock of its machine is ahead of that of the judging one."""


class NodeRanks(Protocol):
    """The ranks of a world on one machine, this one or another."""

    node: Node
    ranks: tuple[int, ...]

    @property
    def lost(self) -> str:
        """Why the machine is lost, in words; empty while it answers."""

    def launch(self) -> None: ...
    def send(self, rank: int, kind: str, **payload: Any) -> None: ...
    def updates(self) -> list[RankUpdate]: ...
    def sources(self) -> list[Any]: ...
    def evidence(self, silent: Iterable[int], calls: bool) -> dict[int, Evidence]: ...
    def end(self) -> list[str]: ...


Starter = Callable[[rank_process.RankSpec, socket.socket], Any]
"""Starts the process of one rank, and returns it."""

_live: list[LocalRanks] = []
"""Worlds of this process that have not ended: one runs a check, another may be starting."""

connections: list[Any] = []
"""Whatever else a forked rank has no business with, and closes."""


class LocalRanks:
    """The ranks of one world that run on this machine, as children of this process."""

    lost = ""

    def __init__(self, order: WorldOrder, start: Starter) -> None:
        self.order = order
        self.node = order.node
        self.ranks = order.ranks
        self._start = start
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = os.open(self._folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        # What a running check may have orphaned by now is that check's, and not known.
        self._known: frozenset[int] = (
            _live[0]._known if _live else frozenset(processes.children(os.getpid()))
        )
        self._segments: frozenset[str] = (
            _live[0]._segments if _live else frozenset(os.listdir("/dev/shm"))
        )
        self._starved = processes.ended_for_memory()
        self._group = 0
        self._rank_specs: dict[int, rank_process.RankSpec] = {}
        self._processes: dict[int, Any] = {}
        self._channels: dict[int, ParentEnd] = {}
        self._calls: dict[int, int] = {}
        _live.append(self)

    def launch(self) -> None:
        """Start all ranks, which then join their process group by themselves."""
        for local_rank, number in enumerate(self.ranks):
            self._calls[number] = call_ring.create()
            rank_spec = self._rank_spec(number, local_rank)
            rank_spec.home.mkdir()
            self._rank_specs[number] = rank_spec
            self._channels[number], theirs = pair()
            # Python swallows what a signal's handler raises in a callback of fork, and a lock that
            # the callback was to give back stays taken in every process forked later.
            with processes.signals_held_back(), theirs:
                process = self._processes[number] = self._start(rank_spec, theirs)
                if not self._group:
                    self._group = process.pid
                    # The child does it, too: whoever comes first.
                    try:
                        os.setpgid(process.pid, process.pid)
                    except (PermissionError, ProcessLookupError):
                        processes.state(process.pid)  # it went on to exec, in its group already

    def _rank_spec(self, number: int, local_rank: int) -> rank_process.RankSpec:
        return rank_process.RankSpec(
            spec=self.order.spec,
            rank=number,
            local_rank=local_rank,
            local_size=len(self.ranks),
            node=self.node.index,
            group=self._group,
            parent=os.getpid(),
            folder=str(self._folder),
            seed=self.order.seed,
            store=self.order.store,
            shared=self.order.shared,
            # By this way a rank that is no fork gets at it, too.
            calls=f"/proc/{os.getpid()}/fd/{self._calls[number]}",
        )

    @property
    def pids(self) -> frozenset[int]:
        """The processes of its ranks."""
        return frozenset(int(p.pid) for p in self._processes.values())

    def send(self, rank: int, kind: str, **payload: Any) -> None:
        """Say something to one rank."""
        self._channels[rank].send(kind, **payload)

    def updates(self) -> list[RankUpdate]:
        """What has come from each rank since the last update, and how it stands."""
        found = []
        for number, process in self._processes.items():
            channel = self._channels[number]
            exitcode = process.exitcode  # before the frames: what it sent last is still read
            frames = channel.frames()
            found.append(RankUpdate(number, frames, exitcode, channel.closed, channel.garbage))
        return found

    def sources(self) -> list[Any]:
        """What to wait on for the next update."""
        waiting: list[Any] = [c for c in self._channels.values() if not c.closed]
        return waiting + [p.sentinel for p in self._processes.values() if p.exitcode is None]

    def evidence(self, silent: Iterable[int], calls: bool) -> dict[int, Evidence]:
        """Outputs, stacks and `calls`; ranks that never answered must show where they stand."""
        # Before a rank that is stopped goes on, to show its stack.
        called = {r: call_ring.read(descriptor) for r, descriptor in self._calls.items() if calls}
        asked = {int(self._processes[r].pid): r for r in silent}
        dumps = (
            stacks.ask({pid: self._rank_specs[r].stack for pid, r in asked.items()})
            if asked
            else {}
        )
        starved = processes.ended_for_memory() > self._starved
        found = {
            number: Evidence(
                "",
                stacks.read(rank_spec.stack),
                stacks.read(rank_spec.log),
                called.get(number),
                starved,
            )
            for number, rank_spec in self._rank_specs.items()
        }
        for pid, (state, dump) in dumps.items():
            found[asked[pid]].state, found[asked[pid]].stack = state, dump
        return found

    def end(self) -> list[str]:
        """End whatever is left of the ranks; returns what had to be ended besides its ranks."""
        # First, for this process may have no other descriptor left to look at the ranks with.
        for channel in self._channels.values():
            channel.close()
        for descriptor in self._calls.values():
            os.close(descriptor)
        if self._group:
            self._kill_group()
        for process in self._processes.values():
            process.join()
        _live.remove(self)
        spared: frozenset[int] = frozenset().union(*(ranks.pids for ranks in _live))
        ranks = self.pids
        strays = processes.reap(self._known | leaks.tracker() | spared)
        segments = leaks.remove_segments(self._segments, set(ranks))
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)
        found = [f"process {pid} ({command})" for pid, command in strays if pid not in ranks]
        return found + [f"shared-memory segment /dev/shm/{name}" for name in segments]

    def _kill_group(self) -> None:
        alive = [p for p in self._processes.values() if p.exitcode is None]
        if not alive and not processes.group_members(self._group):
            return
        self._signal_group(signal.SIGTERM)
        deadline = time.monotonic() + TERM_GRACE
        while time.monotonic() < deadline and processes.group_members(self._group):
            for process in alive:
                process.join(0)
            time.sleep(0.005)
        if processes.group_members(self._group):
            self._signal_group(signal.SIGKILL)
        for process in alive:  # a rank that had not yet joined the group
            processes.signal_quietly(process.pid, signal.SIGKILL)

    def _signal_group(self, number: signal.Signals) -> None:
        # Never 0, which is this process's own group, and that of whoever started the run.
        assert self._group > 0, f"process group {self._group}, expected that of the ranks"
        with contextlib.suppress(ProcessLookupError):  # all of it has ended meanwhile
            os.killpg(self._group, number)


def remove_abandoned() -> None:
    """Remove the folders of worlds whose run was killed; who runs holds a lock on its own."""
    for folder in Path(tempfile.gettempdir()).glob(_PREFIX + "*"):
        with contextlib.suppress(OSError):  # another user's, or gone
            lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if time.time() - os.fstat(lock).st_mtime > _YOUNG:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def forking(body: Callable[[rank_process.RankSpec, socket.socket], None]) -> Starter:
    """Ranks that are forks of this process, and in which `body` does not return."""

    def start(rank_spec: rank_process.RankSpec, sock: socket.socket) -> Any:
        import torch.multiprocessing

        context: Any = torch.multiprocessing.get_context("fork")
        process = context.Process(target=_forked, args=(rank_spec, sock, body))
        process.start()
        return process

    return start


def _forked(
    rank_spec: rank_process.RankSpec,
    sock: socket.socket,
    body: Callable[[rank_process.RankSpec, socket.socket], None],
) -> None:
    own = RankEnd(sock)
    try:
        for ranks in _live:
            for channel in ranks._channels.values():
                channel.close()
        for connection in connections:
            connection.close()
        rank_process.become_rank(rank_spec)
        body(rank_spec, sock)
    except BaseException as error:
        rank_process.give_up(own, error)
