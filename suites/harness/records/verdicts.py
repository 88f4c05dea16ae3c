"""The words for what can happen: verdicts of a check, and what is known of one rank."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from harness.records.call_ring import Calls


class Verdict(enum.StrEnum):
    """What a run says of one check."""

    PASS = "pass"
    FAIL = "fail"
    ERROR = "error"  # the harness, a fixture or the environment, not the subject
    TIMEOUT = "timeout"
    CRASH = "crash"
    PRECONDITION = "precondition"  # a function or hardware that is not there
    XFAIL = "xfail"
    XPASS = "xpass"


UNEXPECTED = frozenset({Verdict.FAIL, Verdict.ERROR, Verdict.TIMEOUT, Verdict.CRASH, Verdict.XPASS})


class Fate(enum.StrEnum):
    """How one rank's part in a check ended, from best to worst evidence."""

    PASSED = "passed"
    RAISED = "raised"  # the body raised, or an assert did not hold
    BROKEN = "broken"  # set-up or tear-down on the rank raised, or the rank tried to skip
    LEAKED = "leaked"
    PEER_LOST = "peer lost"  # a collective failed because another rank went away
    COLLECTIVE_TIMEOUT = "collective timeout"
    DIED = "died"
    SILENT = "silent"  # never answered: ended by the harness


@dataclass
class RankRecord:
    """What the parent knows of one rank at the end of a check."""

    rank: int
    node: int = 0
    host: str = ""
    local_rank: int = 0
    where: str = ""
    """The rank's machine in words, in a world over several."""
    fate: Fate = Fate.SILENT
    at: float = 0.0
    """Monotonic clock at which the fate was sealed; comparable between processes of one machine."""
    phase: str = "start"
    """The last that it announced: start, ready, setup, call, teardown, report, parked, end."""
    message: str = ""
    """One line: what a person must read first."""
    details: str = ""
    """Traceback or stack; may be long."""
    waiting_in: str = ""
    """The collective that the rank was last seen in, from its traceback or stack."""
    seconds: float = 0.0
    exitcode: int | None = None
    log: str = ""
    """Path of the rank's output, relative to the run's folder; empty when it wrote nothing."""
    output_tail: str = ""
    calls: Calls | None = None
    """Its last collectives; None where there is no record, or nobody asked for it."""
    extra: dict[str, Any] = field(default_factory=dict)

    def as_json(self, limit: int = 16_000) -> dict[str, Any]:
        """The record for results.json, long texts cut to `limit` characters."""
        told = {} if self.calls is None else {"collectives": self.calls.as_json()}
        return told | {
            "rank": self.rank,
            "node": self.node,
            "host": self.host,
            "local_rank": self.local_rank,
            "fate": str(self.fate),
            "phase": self.phase,
            "seconds": round(self.seconds, 4),
            "message": cut(self.message, limit // 8),
            "details": cut(self.details, limit),
            "waiting_in": self.waiting_in,
            "exitcode": self.exitcode,
            "log": self.log,
        }


@dataclass
class Judgement:
    """One verdict on one check, with the text that explains it."""

    verdict: Verdict
    message: str = ""
    text: str = ""
    ranks: list[RankRecord] = field(default_factory=list)
    seconds: float = 0.0
    repeat: list[str] = field(default_factory=list)
    """Checks that must run, too, for this verdict to be seen again."""


def cut(text: str, limit: int) -> str:
    """The text, with its middle taken out where it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    head, tail = limit * 2 // 3, limit // 3
    missing = len(text) - head - tail
    return f"{text[:head]}\n[... {missing:,} characters cut here ...]\n{text[-tail:]}"
