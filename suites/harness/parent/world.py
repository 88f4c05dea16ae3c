"""The parent's side of a world: start the ranks, watch all of them at once, end them.

Every wait has a deadline and looks at every rank: at its messages and at its process. A rank that
raises, exits, is killed, hangs or answers nothing is seen where it happens, not where another
rank suffers from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from harness.parent.local_ranks import Evidence, NodeRanks
from harness.parent.rank_state import RankState
from harness.records.verdicts import Fate, RankRecord
from harness.settings.options import GRACE, START_LIMIT
from harness.settings.requirements import WorldSpec

END_LIMIT = 10.0
"""Seconds for ranks that have passed to close their process group and leave."""
_POLL = 0.1
_APART = {Fate.SILENT, Fate.COLLECTIVE_TIMEOUT, Fate.PEER_LOST, Fate.DIED}


class World:
    """A set of ranks, from start to end; a failed world is ended, never used again."""

    def __init__(
        self,
        spec: WorldSpec,
        parts: Sequence[NodeRanks],
        start_method: str,
        member: type[RankState] = RankState,
    ) -> None:
        self.spec = spec
        self.parts = parts
        self.usable = False
        self._start_limit = START_LIMIT[start_method]
        several = len({part.node for part in parts}) > 1
        self.members = [
            member(
                part,
                RankRecord(
                    number,
                    node=part.node.index,
                    host=part.node.host,
                    local_rank=local_rank,
                    where=str(part.node) if several else "",
                ),
            )
            for part in parts
            for local_rank, number in enumerate(part.ranks)
        ]

    @property
    def lost(self) -> list[str]:
        """The machines that it lost, in words."""
        return [part.lost for part in self.parts if part.lost]

    def launch(self) -> None:
        """Start all ranks, which then join their process group by themselves."""
        for part in self.parts:
            part.launch()

    def gather(self) -> None:
        """Wait until each rank has joined the process group."""
        self._until(lambda: all(m.ready for m in self.members), self._start_limit)
        self.usable = all(m.ready for m in self.members)
        if not self.usable:
            self._close_case()

    def run(
        self,
        item: pytest.Item,
        keep: bool,
        meanwhile: Callable[[], None] = lambda: None,
        tick: Callable[[], None] = lambda: None,
    ) -> list[RankRecord]:
        """Run one check on all ranks; `keep` leaves the world usable when all have passed.

        The parent does something else `meanwhile`, and at each `tick`, shorter than any clock.
        """
        for member in self.members:
            member.send("run", id=item.nodeid)
        meanwhile()
        self._until(lambda: all(m.answered for m in self.members), self.spec.limit, tick=tick)
        ending = all(m.record.fate is Fate.PASSED for m in self.members)
        if ending:
            for member in self.members:
                member.record.phase = "end"
                member.send("end", keep=keep)
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
        silent = {m.record.rank for m in self.members if m.record.fate is Fate.SILENT}
        # What each issued, where one may have missed the others.
        calls = any(m.record.fate in _APART or m.record.waiting_in for m in self.members)
        found: dict[int, Evidence] = {}
        for part in self.parts:
            found |= part.evidence(silent & set(part.ranks), calls)
        for member in self.members:
            if member.part.lost:  # it may have shown only now that it does not answer
                member.lose(member.part.lost)
            member.close_case(found.get(member.record.rank, Evidence()))

    def _until(
        self,
        done: Callable[[], bool],
        limit: float,
        *,
        hasten: bool = True,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Watch all ranks until done or, to `hasten`, until the grace after a failure is over."""
        deadline = time.monotonic() + limit
        failing = False
        of = {m.record.rank: m for m in self.members}
        while True:
            for part in self.parts:
                for update in part.updates():
                    of[update.rank].take(update)
                if part.lost:
                    for number in part.ranks:
                        of[number].lose(part.lost)
            if done():
                return
            tick()
            failed = [m for m in self.members if m.failed and hasten]
            if failed and not failing:
                failing = True
                deadline = min(deadline, time.monotonic() + GRACE)
            for member in failed:
                # It goes at once, so that its peers' collectives fail instead of waiting for it.
                if member.answered and not member.left:
                    member.left = True
                    member.send("leave")
            if failing and all(m.failed or m.record.fate is Fate.PASSED for m in self.members):
                return
            if any(part.lost for part in self.parts) and not hasten:
                return
            left = deadline - time.monotonic()
            if left <= 0:
                return
            wait([s for part in self.parts for s in part.sources()], timeout=min(_POLL, left))

    def end(self) -> list[str]:
        """End whatever is left of the world; returns what had to be ended besides its ranks."""
        found = [stray for part in self.parts for stray in part.end()]
        self.usable = False
        named = {leak for m in self.members for leak in m.leaks}
        return [f for f in found if not any(_same(f, n) for n in named)]

    @contextmanager
    def ended_if_it_breaks(self) -> Iterator[World]:
        """The world, ended where an exception comes out of the block."""
        try:
            yield self
        except BaseException:
            self.end()
            raise

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
            record = member.record
            parts = [("output", member.evidence.log), ("stack", member.evidence.stack)]
            if member.failed or record.fate is Fate.SILENT:
                parts.append(("failure", record.details))
            text = "".join(f"--- {name} ---\n{body}\n" for name, body in parts if body)
            path = folder / f"rank-{record.rank}.log"
            try:
                if text:
                    folder.mkdir(parents=True, exist_ok=True)
                    path.write_text(text, errors="backslashreplace")
                    record.log = str(path.relative_to(run_dir))
            except OSError as error:  # the disk is full: the verdict stands without it
                record.details += f"\nits log is not kept: {error}"


def _same(found: str, named: str) -> bool:
    return any(word in named.split() for word in found.split() if word.isdigit() or "/" in word)
