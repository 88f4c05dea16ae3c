"""The world of measurements: the harness's ranks, with a measurement in place of a check."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Never

from benchmarks.run.malloc_settings import keep_memory
from benchmarks.run.rounds import measure
from harness.parent.blame import judge, not_started
from harness.parent.local_ranks import LocalRanks, Node, WorldOrder, forking
from harness.parent.rank_state import RankState
from harness.parent.world import World
from harness.rank import rank_process
from harness.rank.reporter import one_line, raised
from harness.records.verdicts import Fate
from harness.settings.options import START_LIMIT
from harness.settings.requirements import WorldSpec
from harness.system import torchrun_env
from harness.system.channel import Frame, RankEnd

if TYPE_CHECKING:
    from benchmarks.run.task import Task


class WorldError(Exception):
    """The measurement gave nothing: a rank failed, died or hung; the text names it."""


@dataclass
class Answering(RankState):
    """A rank whose answer carries what it measured."""

    result: dict[str, Any] = field(default_factory=dict)

    def _take_frame(self, frame: Frame) -> None:
        super()._take_frame(frame)
        if frame["kind"] == "answer":
            self.result = frame.get("result", {})


class Sampler(rank_process.Rank):
    """A rank that measures instead of running checks."""

    def __init__(
        self, rank_spec: rank_process.RankSpec, channel: RankEnd, tasks: Sequence[Task]
    ) -> None:
        super().__init__(rank_spec, channel, _no_checks)
        self._tasks = tasks

    def _join(self) -> None:
        if not self._tasks[0].benchmark.fake:
            super()._join()
            return
        import torch.distributed as dist
        from torch.testing._internal.distributed.fake_pg import FakeStore

        store = FakeStore()
        dist.init_process_group("fake", store=store, rank=0, world_size=self._tasks[0].size)

    def serve(self) -> int:
        """Join, measure what the parent asks for, answer; the parent ends the process."""
        try:
            keep_memory(max(task.largest for task in self._tasks))
            self._join()
        except BaseException as error:
            self._channel.send("broken", message=one_line(error), details=traceback.format_exc())
            return 1
        self._channel.send("ready", pid=os.getpid())
        while (order := self._channel.receive()) is not None and order["kind"] == "run":
            self._channel.send("phase", phase="call")
            self._channel.send("answer", **self._measured(self._tasks[order["task"]]))
        return 0

    def _measured(self, task: Task) -> dict[str, Any]:
        begin = time.monotonic()
        try:
            result = measure(task, self.rank, self.device)
        except BaseException as error:
            return raised(error, time.monotonic() - begin)
        return {"outcome": "passed", "seconds": time.monotonic() - begin, "result": result}


def _no_checks(name: str) -> Never:
    raise LookupError(name)


class MeasuredWorld(World):
    """Ranks forked from the warm parent for the measurements of `tasks`, all of one size.

    A fake world has one, which stands for rank 0.
    """

    def __init__(self, spec: WorldSpec, seed: int, tasks: Sequence[Task]) -> None:
        ranks = tuple(range(1 if tasks[0].benchmark.fake else spec.size))
        order = WorldOrder(0, spec, ranks, Node(0, torchrun_env.host()), seed, None)
        ranks_here = LocalRanks(order, forking(partial(_measure, tasks)))
        super().__init__(spec, [ranks_here], "fork", Answering)

    def gather(self) -> None:
        """Wait until all ranks have joined; raises `WorldError`."""
        self._until(lambda: all(m.ready for m in self.members), START_LIMIT["fork"])
        if not all(m.ready for m in self.members):
            self._close_case()
            raise WorldError(not_started([m.record for m in self.members]).message)

    def measured(self, number: int, abandoned: Callable[[], None]) -> list[dict[str, Any]]:
        """What each rank measured for that task; raises `WorldError` when one has nothing to say.

        `abandoned` is called while the parent waits, and raises when nobody wants the answer.
        """
        for member in self.members:
            member.next_check()
            member.send("run", task=number)

        def done() -> bool:
            abandoned()
            return all(m.answered for m in self.members)

        self._until(done, self.spec.limit)
        self._close_case()
        records = [m.record for m in self.members]
        if any(r.fate is not Fate.PASSED for r in records):
            judged = judge(records, len(records))
            raise WorldError(f"{judged.message}\n{judged.text}")
        return [m.result for m in self.members if isinstance(m, Answering)]


def _measure(tasks: Sequence[Task], rank_spec: rank_process.RankSpec, sock: socket.socket) -> None:
    code = 1
    try:
        code = Sampler(rank_spec, RankEnd(sock), tasks).serve()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
