"""One rank as the world that judges it sees it: from updates and frames to a record."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from typing import Any

from harness.parent.local_ranks import Evidence, NodeRanks, RankUpdate
from harness.records.call_ring import Calls
from harness.records.verdicts import Fate, RankRecord
from harness.system.channel import Frame
from harness.system.stacks import cause_in, collective_of_dump, crash_of, last_words

_EXIT_GRACE = 2.0
"""Seconds between a rank's closing its channel and its exit that are taken for one event."""


@dataclass
class RankState:
    """One rank of a world."""

    part: NodeRanks
    record: RankRecord
    ready: bool = False
    answered: bool = False
    left: bool = False
    """It said what it leaked, which is the last thing that a rank says of a check."""
    leaks: list[str] = field(default_factory=list)
    failing: Frame | None = None
    """What it said when its body raised; the report, with the details, takes longer."""
    evidence: Evidence = field(default_factory=Evidence)
    closed_at: float = 0.0

    @property
    def gone(self) -> bool:
        return self.record.exitcode is not None

    @property
    def failed(self) -> bool:
        return self.record.fate not in {Fate.SILENT, Fate.PASSED}

    def send(self, kind: str, **payload: Any) -> None:
        """Say something to the rank."""
        self.part.send(self.record.rank, kind, **payload)

    def take(self, update: RankUpdate) -> None:
        """Take in what is new about the rank."""
        for frame in update.frames:
            self._take_frame(frame)
        if update.garbage and not self.failed:
            self._end(Fate.DIED, "wrote into the harness's own channel")
        if update.exitcode is not None and self.record.exitcode is None:
            self.record.exitcode = update.exitcode
            if not self.failed and not (self.left and update.exitcode == 0):
                self._end(Fate.DIED, self._death(update.exitcode))
        elif update.closed and update.exitcode is None and not self.failed and not self.left:
            # Either it is on its way out, and its exit code will tell, or the check has closed
            # descriptors that it does not own.
            self.closed_at = self.closed_at or time.monotonic()
            if time.monotonic() - self.closed_at > _EXIT_GRACE:
                self._end(Fate.DIED, "closed the channel to the harness without an answer")

    def lose(self, why: str) -> None:
        """Its machine is lost: the environment's doing, unless the rank had failed before."""
        if not self.failed and not (self.left and self.gone):
            self._end(Fate.BROKEN, why)

    def settle_without_report(self) -> None:
        """Take what the rank said when it raised, where its report did not come in time."""
        if self.failing is not None and self.record.fate is Fate.SILENT:
            self._answer(self.failing)

    def close_case(self, evidence: Evidence) -> None:
        """Complete the record from what the rank's machine can tell."""
        record = self.record
        self.evidence = evidence
        record.calls = Calls.from_json(evidence.calls, evidence.clock)
        if record.fate is Fate.SILENT:
            record.details = evidence.stack
            record.waiting_in = collective_of_dump(evidence.stack)
            record.message = record.message or _silence(record, evidence.state)
            record.at = time.monotonic()
        if record.fate is Fate.DIED and not record.details:
            words = last_words(evidence.log)
            told = [crash_of(evidence.stack), *(["it wrote last:", *words] if words else [])]
            record.details = "\n".join(part for part in told if part)
            if (record.exitcode or 0) < 0 and (cause := cause_in(words)):
                record.message += f": {cause}"
            if record.exitcode == -signal.SIGKILL and evidence.starved:
                record.message += "; the kernel ended a process for want of memory"
        record.output_tail = evidence.log[-4000:]

    def next_check(self) -> None:
        """Forget the last check, in a world that is used again."""
        old = self.record
        self.record = RankRecord(old.rank, old.node, old.host, old.local_rank, old.where)
        self.answered = self.left = False
        self.failing = None
        self.leaks = []

    def _end(self, fate: Fate, message: str, at: float | None = None, details: str = "") -> None:
        self.record.fate = fate
        self.record.message = message
        self.record.details = details
        self.record.at = at or time.monotonic()

    def _take_frame(self, frame: Frame) -> None:
        kind = frame["kind"]
        if kind == "ready":
            self.ready = True
            self.record.phase = "ready"
        elif kind == "phase":
            self.record.phase = frame["phase"]
        elif kind == "broken":
            if not self.failed:
                said = f", in {self.record.phase}, outside of the check" if self.ready else ""
                self._end(_fate_of(frame), frame["message"] + said, frame["at"], frame["details"])
                self.record.waiting_in = frame["waiting_in"]
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
            self.record.extra["warnings"] = frame.get("warnings", [])
            self._answer(frame)

    def _answer(self, frame: Frame) -> None:
        if frame["outcome"] == "passed":
            self.record.fate, self.record.phase = Fate.PASSED, "parked"
            self.record.at = frame["at"]
            return
        self._end(_fate_of(frame), frame["message"], frame["failed_at"], frame.get("details", ""))
        self.record.phase = frame.get("phase", self.record.phase)
        self.record.waiting_in = frame.get("waiting_in", "")
        self.record.extra["sections"] = frame.get("sections", [])

    def _death(self, exitcode: int) -> str:
        phase = self.record.phase
        when = {
            "start": "before it was ready",
            "ready": "before its check began",
            "parked": "after its body had passed",
        }.get(phase, f"in {phase}, without an answer")
        if self.failing is not None:
            when += f", after it had raised {self.failing['message'].partition(chr(10))[0]}"
        if exitcode < 0:
            try:
                name = signal.Signals(-exitcode).name
            except ValueError:
                name = f"signal {-exitcode}"
            return f"killed by {name} {when}"
        return f"exited with {exitcode} {when}"


def _fate_of(frame: Frame) -> Fate:
    """What an error says of the rank that raised it."""
    error = frame.get("kind_of_error", "error")
    if error in {Fate.PEER_LOST, Fate.COLLECTIVE_TIMEOUT, Fate.BROKEN}:
        return Fate(error)
    return Fate.RAISED if frame.get("outcome") == "raised" else Fate.BROKEN


def _silence(record: RankRecord, state: str) -> str:
    where = f"never answered; last phase: {record.phase}"
    if record.phase == "start":
        where = "never became ready"
    if state == "T":
        return f"{where}; it was stopped (SIGSTOP)"
    if record.waiting_in:
        return f"{where}; waiting in {record.waiting_in}"
    return where
