"""The world of generated cases: the harness's ranks, with a case in place of a check.

One world runs case after case. After a failure of any kind it is ended, and the next case gets a
fresh one.
"""

from __future__ import annotations

import ast
import gc
import os
import socket
import time
import traceback
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Never

from generated import data, rig, telling
from harness.parent.blame import not_started
from harness.parent.local_ranks import LocalRanks, Node, WorldOrder, forking
from harness.parent.rank_state import RankState
from harness.parent.world import World
from harness.rank import rank_process
from harness.rank.reporter import one_line, raised
from harness.records.verdicts import Fate
from harness.settings.options import START_LIMIT
from harness.settings.requirements import WorldSpec
from harness.settings.subjects import Subject
from harness.system import torchrun_env, warm
from harness.system.channel import Frame, RankEnd

CASES_A_WORLD = 150
"""Cases after which a world is replaced: it keeps the meshes and groups of all of them."""
_COLLECTIVE = 60.0
"""Longer than any case: it is the parent who finds that ranks hang."""


class WorldError(Exception):
    """A world could not start, or a case could not be built: no fault of the subject."""


@dataclass
class Told:
    """What one rank told of a case."""

    calls: list[dict[str, Any]]
    """One entry a call that ended."""
    living: list[str]
    """Inputs that outlive the case, though nobody should hold them."""
    end: str = ""
    """Why it told no more: it hangs, or died; empty where it came to the end."""


@dataclass
class Telling(RankState):
    """A rank whose answers are what its calls came to."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    living: list[str] = field(default_factory=list)

    def _take_frame(self, frame: Frame) -> None:
        super()._take_frame(frame)
        if frame["kind"] == "told":
            self.calls.append(ast.literal_eval(frame["outcome"]))
        elif frame["kind"] == "answer":
            self.living = frame.get("living", [])

    def next_check(self) -> None:
        """Forget the last case."""
        super().next_check()
        self.calls, self.living = [], []


class Player(rank_process.Rank):
    """A rank that runs cases instead of checks."""

    def __init__(self, rank_spec: rank_process.RankSpec, channel: RankEnd, subject: str) -> None:
        super().__init__(rank_spec, channel, _no_checks)
        self._subject = Subject(subject)

    def serve(self) -> int:
        """Join, run each case that the parent sends, answer; the parent ends the process."""
        try:
            self._join()
        except BaseException as error:
            self._channel.send("broken", message=one_line(error), details=traceback.format_exc())
            return 1
        self._channel.send("ready", pid=os.getpid())
        while (order := self._channel.receive()) is not None and order["kind"] == "run":
            self._channel.send("phase", phase="call")
            self._channel.send("answer", **self._played(order["source"]))
        return 0

    def _played(self, source: str) -> dict[str, Any]:
        begin = time.monotonic()
        try:
            watch = telling.Watch()
            self._play(source, watch)
            living = watch.living()
        except BaseException as error:
            return raised(error, time.monotonic() - begin)
        return {"outcome": "passed", "seconds": time.monotonic() - begin, "living": living}

    def _play(self, source: str, watch: telling.Watch) -> None:
        self._seed()
        space: dict[str, Any] = {**vars(data), **vars(telling), **vars(rig)}
        exec(compile(source, "<case>", "exec"), space)  # what it runs the parent has made
        teller = telling.Teller()

        def tell(word: str, value: Any, changed: list[str], **given: Any) -> None:
            told = telling.outcome(teller, word, value, changed, given)
            self._channel.send("told", outcome=repr(told))

        space["run"](self.rank, self._subject.function, tell, watch.on)


def _no_checks(name: str) -> Never:
    raise LookupError(name)


def _play(subject: str, rank_spec: rank_process.RankSpec, sock: socket.socket) -> None:
    code = 1
    try:
        gc.disable()  # collected where a case asks who holds its tensors
        code = Player(rank_spec, RankEnd(sock), subject).serve()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class CaseWorld(World):
    """Ranks that run cases, until one fails."""

    def __init__(self, size: int, subject: str, limit: float) -> None:
        spec = WorldSpec(size, "gloo", "cpu", _COLLECTIVE, limit, reuse=True)
        order = WorldOrder(0, spec, tuple(range(size)), Node(0, torchrun_env.host()), 0, None)
        super().__init__(
            spec, [LocalRanks(order, forking(partial(_play, subject)))], "fork", Telling
        )
        self.cases = 0

    def start(self) -> None:
        """Start all ranks and wait until they have joined; raises `WorldError`."""
        self.launch()
        self._until(lambda: all(m.ready for m in self.members), START_LIMIT["fork"])
        if not all(m.ready for m in self.members):
            self._close_case()
            raise WorldError(not_started([m.record for m in self.members]).message)
        self.usable = True

    def play(self, source: str, limit: float, lag: float) -> list[Told]:
        """What each rank told of a case; the world is usable where all came to its end.

        `limit`: seconds for the case; `lag`: seconds that a rank may take longer than the first.
        """
        self.cases += 1
        for member in self.members:
            member.next_check()
            member.send("run", source=source)
        first = 0.0

        def done() -> bool:
            nonlocal first
            answered = [m.answered for m in self.members]
            if any(answered) and not first:
                first = time.monotonic()
            return all(answered) or bool(first and time.monotonic() - first > lag)

        self._until(done, limit)
        self.usable = all(m.record.fate is Fate.PASSED for m in self.members)
        if not self.usable:
            self._close_case()
        return [_told(m) for m in self.members if isinstance(m, Telling)]


def _told(member: Telling) -> Told:
    record = member.record
    if record.fate is Fate.PASSED:
        return Told(member.calls, member.living)
    if record.fate is Fate.RAISED:
        raise WorldError(f"rank {record.rank}: {record.message}\n{record.details}")
    if record.fate is Fate.SILENT:
        return Told(
            member.calls, [], f"hangs{' in ' + record.waiting_in if record.waiting_in else ''}"
        )
    return Told(member.calls, [], record.message)


class Stage:
    """Runs cases, each in a world of its size that may have run others before."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.started = 0
        self._worlds: dict[int, CaseWorld] = {}

    def play(
        self, size: int, source: str, *, limit: float, lag: float, fresh: bool = False
    ) -> list[Told]:
        """What each rank told of the case."""
        world = self._worlds.get(size)
        if world is not None and (fresh or world.cases >= CASES_A_WORLD):
            self._drop(size)
            world = None
        if world is None:
            if reason := warm.unfit():
                raise WorldError(reason)
            world = self._worlds[size] = CaseWorld(size, self.subject, limit)
            self.started += 1
            try:
                world.start()
            except BaseException:
                self._drop(size)
                raise
        try:
            return world.play(source, limit, lag)
        finally:
            if not world.usable:
                self._drop(size)

    def close(self) -> None:
        """End all worlds."""
        for size in list(self._worlds):
            self._drop(size)

    def _drop(self, size: int) -> None:
        self._worlds.pop(size).end()
