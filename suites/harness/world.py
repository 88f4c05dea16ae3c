"""The parent's side of a world: start the ranks, watch all of them at once, end them.

Every wait has a deadline and looks at every rank: at its messages and at its process. A rank that
raises, exits, is killed, hangs or answers nothing is seen where it happens, not where another
rank suffers from it.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest

from harness import leaks, processes, rank, spawned, stacks
from harness.channel import Frame, ParentEnd, pair
from harness.options import GRACE, START_LIMIT, Settings
from harness.requirements import WorldSpec
from harness.verdicts import Fate, RankRecord

END_LIMIT = 10.0
"""Seconds for ranks that have passed to close their process group and leave."""
TERM_GRACE = 0.5
_POLL = 0.1
_EXIT_GRACE = 2.0
"""Seconds between a rank's closing its channel and its exit that are taken for one event."""


@dataclass
class Member:
    """One rank, as the parent sees it."""

    seat: rank.Seat
    process: Any
    channel: ParentEnd
    record: RankRecord
    ready: bool = False
    answered: bool = False
    left: bool = False
    """It said what it leaked, which is the last thing that a rank says of a check."""
    leaks: list[str] = field(default_factory=list)
    failing: Frame | None = None
    """What it said when its body raised; the report, with the details, takes longer."""
    closed_at: float = 0.0

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    @property
    def gone(self) -> bool:
        return self.record.exitcode is not None

    @property
    def failed(self) -> bool:
        return self.record.fate not in {Fate.SILENT, Fate.PASSED}

    def look(self) -> None:
        """Take in what has come from the rank since the last look."""
        exitcode = self.process.exitcode  # before the frames: what it sent last is still read
        for frame in self.channel.frames():
            self._take(frame)
        if self.channel.garbage and not self.failed:
            self._end(Fate.DIED, "wrote into the harness's own channel")
        if exitcode is not None and self.record.exitcode is None:
            self.record.exitcode = exitcode
            if not self.failed and not (self.left and exitcode == 0):
                self._end(Fate.DIED, _death(exitcode, self))
        elif self.channel.closed and exitcode is None and not self.failed and not self.left:
            # Either it is on its way out, and its exit code will tell, or the check has closed
            # descriptors that it does not own.
            self.closed_at = self.closed_at or time.monotonic()
            if time.monotonic() - self.closed_at > _EXIT_GRACE:
                self._end(Fate.DIED, "closed the channel to the harness without an answer")

    def _end(self, fate: Fate, message: str, at: float | None = None, details: str = "") -> None:
        self.record.fate = fate
        self.record.message = message
        self.record.details = details
        self.record.at = at or time.monotonic()

    def _take(self, frame: Frame) -> None:
        kind = frame["kind"]
        if kind == "ready":
            self.ready = True
        elif kind == "phase":
            self.record.phase = frame["phase"]
        elif kind == "broken":
            self._end(Fate.BROKEN, frame["message"], frame["at"], frame["details"])
        elif kind == "leaks":
            self.left = True
            self.leaks = frame["leaks"]
            if self.leaks and not self.failed:
                self._end(Fate.LEAKED, "left behind: " + "; ".join(self.leaks), frame["at"])
        elif kind == "failing":
            self.failing = frame
        elif kind == "answer":
            self.answered = True
            self.record.seconds = frame["seconds"]
            self.record.extra["mesh"] = frame.get("mesh", "")
            self._answer(frame)

    def settle_without_report(self) -> None:
        """Take what the rank said when it raised, where its report did not come in time."""
        if self.failing is not None and self.record.fate is Fate.SILENT:
            self._answer(self.failing)

    def _answer(self, frame: Frame) -> None:
        if frame["outcome"] == "passed":
            self.record.fate, self.record.phase = Fate.PASSED, "parked"
            self.record.at = frame["at"]
            return
        fate = Fate.RAISED if frame["outcome"] == "raised" else Fate.BROKEN
        error = frame.get("kind_of_error", "error")
        if error in {Fate.PEER_LOST, Fate.COLLECTIVE_TIMEOUT}:
            fate = Fate(error)
        self._end(fate, frame["message"], frame["failed_at"], frame.get("details", ""))
        self.record.phase = frame.get("phase", self.record.phase)
        self.record.waiting_in = frame.get("waiting_in", "")
        self.record.extra["sections"] = frame.get("sections", [])

    def next_check(self) -> None:
        """Forget the last check, in a world that is used again."""
        self.record = RankRecord(self.record.rank)
        self.answered = self.left = False
        self.failing = None
        self.leaks = []


def _death(exitcode: int, member: Member) -> str:
    when = {
        "start": "before it was ready",
        "parked": "after its body had passed",
    }.get(member.record.phase, f"in {member.record.phase}, without an answer")
    if exitcode < 0:
        try:
            name = signal.Signals(-exitcode).name
        except ValueError:
            name = f"signal {-exitcode}"
        return f"killed by {name} {when}"
    return f"exited with {exitcode} {when}"


class World:
    """A set of ranks, from start to end; a failed world is ended, never used again."""

    def __init__(
        self,
        spec: WorldSpec,
        settings: Settings,
        config: pytest.Config,
        find: Callable[[str], pytest.Item],
        beside: World | None = None,
    ) -> None:
        """`beside` is a world that runs its check while this one starts."""
        self.spec = spec
        self.settings = settings
        self._config = config
        self.members: list[Member] = []
        self.usable = False
        self._find = find
        self._folder = Path(tempfile.mkdtemp(prefix="shardproof-"))
        self._beside = beside
        # What the other world's check may have orphaned by now is not known, but that world's.
        self._known: frozenset[int] = (
            beside._known if beside else frozenset(processes.children(os.getpid()))
        )
        self._segments: frozenset[str] = (
            beside._segments if beside else frozenset(os.listdir("/dev/shm"))
        )
        self._group = 0

    @property
    def pids(self) -> frozenset[int]:
        """The processes of its ranks."""
        return frozenset(m.pid for m in self.members)

    def launch(self) -> None:
        """Start all ranks, which then join their process group by themselves."""
        import torch.multiprocessing

        method = self.settings.start_method
        context: Any = torch.multiprocessing.get_context(method)
        for number in range(self.spec.size):
            ours, theirs = pair()
            seat = rank.Seat(
                self.spec, number, self._group, os.getpid(), str(self._folder), self.settings.seed
            )
            seat.home.mkdir()
            if method == "fork":
                others = self._beside.members if self._beside else []
                inherited = [ours, *(m.channel for m in [*self.members, *others])]
                process = context.Process(
                    target=_forked, args=(seat, theirs, self._config, self._find, inherited)
                )
            else:
                process = context.Process(
                    target=spawned.main, args=(seat, theirs, self._config.invocation_params.args)
                )
            process.start()
            theirs.close()
            if number == 0:
                self._group = process.pid
                # The child does it, too: whoever comes first.
                try:
                    os.setpgid(process.pid, process.pid)
                except (PermissionError, ProcessLookupError):
                    processes.state(process.pid)  # it went on to exec, in its group already
            self.members.append(Member(seat, process, ours, RankRecord(number)))

    def gather(self) -> None:
        """Wait until each rank has joined the process group."""
        self._beside = None
        method = self.settings.start_method
        self._until(lambda: all(m.ready for m in self.members), START_LIMIT[method])
        self.usable = all(m.ready for m in self.members)
        if not self.usable:
            for member in self.members:
                if not member.failed and not member.ready:
                    member.record.message = "never became ready"
            self._close_case()

    def run(
        self, item: pytest.Item, keep: bool, meanwhile: Callable[[], None] = lambda: None
    ) -> list[RankRecord]:
        """Run one check on all ranks; `keep` leaves the world usable when all have passed.

        The parent does something else `meanwhile`, shorter than any clock.
        """
        for member in self.members:
            member.channel.send("run", id=item.nodeid)
        meanwhile()
        self._until(lambda: all(m.answered for m in self.members), self.spec.limit)
        ending = all(m.record.fate is Fate.PASSED for m in self.members)
        if ending:
            for member in self.members:
                member.record.phase = "end"
                member.channel.send("end", keep=keep)
            # What one rank left behind keeps no other from leaving in order.
            self._until(
                lambda: all(m.gone or (keep and m.left) for m in self.members),
                END_LIMIT,
                hasten=False,
            )
            for member in self.members:
                if member.record.fate is Fate.PASSED and not member.left:
                    member.record.fate = Fate.SILENT
        self._close_case()
        self.usable = keep and all(m.record.fate is Fate.PASSED for m in self.members)
        return [m.record for m in self.members]

    def _close_case(self) -> None:
        for member in self.members:
            member.settle_without_report()
        silent = [m for m in self.members if m.record.fate is Fate.SILENT]
        found = stacks.ask({m.pid: m.seat.stack for m in silent}) if silent else {}
        for member in silent:
            state, dump = found[member.pid]
            member.record.details = dump
            member.record.waiting_in = stacks.collective_of_dump(dump)
            member.record.message = member.record.message or _silence(member.record, state)
            member.record.at = time.monotonic()
        for member in self.members:
            if member.record.fate is Fate.DIED and not member.record.details:
                # What faulthandler wrote when the fatal signal came.
                member.record.details = _read(member.seat.stack)
            member.record.output_tail = _read(member.seat.log)[-4000:]

    def _until(self, done: Callable[[], bool], limit: float, *, hasten: bool = True) -> None:
        """Watch all ranks until done or, to `hasten`, until the grace after a failure is over."""
        deadline = time.monotonic() + limit
        failing = False
        while True:
            for member in self.members:
                member.look()
            if done():
                return
            failed = [m for m in self.members if m.failed and hasten]
            if failed and not failing:
                failing = True
                deadline = min(deadline, time.monotonic() + GRACE)
            for member in failed:
                # It goes at once, so that its peers' collectives fail instead of waiting for it.
                if member.answered and not member.left:
                    member.left = True
                    member.channel.send("leave")
            if failing and all(m.failed or m.record.fate is Fate.PASSED for m in self.members):
                return
            left = deadline - time.monotonic()
            if left <= 0:
                return
            sources: list[Any] = [m.channel for m in self.members if not m.channel.closed]
            sources += [m.process.sentinel for m in self.members if m.record.exitcode is None]
            wait(sources, timeout=min(_POLL, left))

    def end(self, spare: frozenset[int] = frozenset()) -> list[str]:
        """End whatever is left of the world; returns what had to be ended besides its ranks.

        `spare`: processes of a world that has started beside it.
        """
        ranks = set(self.pids)
        if self._group:
            self._kill_group()
        for member in self.members:
            member.process.join()
            member.channel.close()
        strays = processes.reap(self._known | self._tracker() | spare)
        segments = leaks.remove_segments(self._segments, ranks)
        shutil.rmtree(self._folder, ignore_errors=True)
        self.usable = False
        named = {leak for m in self.members for leak in m.leaks}
        found = [f"process {pid} ({command})" for pid, command in strays if pid not in ranks]
        found += [f"shared-memory segment /dev/shm/{name}" for name in segments]
        return [f for f in found if not any(_same(f, n) for n in named)]

    def _tracker(self) -> frozenset[int]:
        from multiprocessing import resource_tracker

        # Spawning starts one tracker for the parent's whole life.
        pid = getattr(resource_tracker._resource_tracker, "_pid", None)
        return frozenset({pid} if pid else set())

    def _kill_group(self) -> None:
        alive = [m for m in self.members if m.process.exitcode is None]
        if not alive and not processes.group_members(self._group):
            return
        self._signal_group(signal.SIGTERM)
        deadline = time.monotonic() + TERM_GRACE
        while time.monotonic() < deadline and processes.group_members(self._group):
            for member in alive:
                member.process.join(0)
            time.sleep(0.005)
        if processes.group_members(self._group):
            self._signal_group(signal.SIGKILL)
        for member in alive:  # a rank that had not yet joined the group
            processes.signal_quietly(member.pid, signal.SIGKILL)

    def _signal_group(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._group, number)
        except ProcessLookupError:
            self._group = 0

    @contextmanager
    def ended(self) -> Iterator[World]:
        """The world, ended whatever happens inside."""
        try:
            yield self
        finally:
            self.end()

    def save_logs(self, folder: Path, run_dir: Path) -> None:
        """Keep each rank's output and stack, where it has any, under the run's folder."""
        for member in self.members:
            parts = [("output", _read(member.seat.log)), ("stack", _read(member.seat.stack))]
            if member.failed or member.record.fate is Fate.SILENT:
                parts.append(("failure", member.record.details))
            text = "".join(f"--- {name} ---\n{body}\n" for name, body in parts if body)
            if text:
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f"rank-{member.record.rank}.log"
                path.write_text(text, errors="backslashreplace")
                member.record.log = str(path.relative_to(run_dir))


def _forked(
    seat: rank.Seat,
    sock: Any,
    config: pytest.Config,
    find: Callable[[str], pytest.Item],
    inherited: list[ParentEnd],
) -> None:
    for channel in inherited:
        channel.close()
    rank.settle(seat)
    rank.leave_the_parent(config)
    rank.occupy(seat, sock, find)


def _silence(record: RankRecord, state: str) -> str:
    where = f"never answered; last phase: {record.phase}"
    if state == "T":
        return f"{where}; it was stopped (SIGSTOP)"
    if record.waiting_in:
        return f"{where}; waiting in {record.waiting_in}"
    return where


def _same(found: str, named: str) -> bool:
    return any(word in named.split() for word in found.split() if word.isdigit() or "/" in word)


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
