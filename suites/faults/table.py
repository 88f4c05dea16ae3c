"""The faults that a run of checks must survive and report: each fault in each phase, as one list.

test_fault_table.py plants every cell and holds the harness to it; `ci/faults` writes the page.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

COLLECTIVE, LIMIT = 2.0, 5.0
"""Seconds of the clocks that the cells are run with; that of the start is as long as a check's."""

PHASES = {
    "start": "a rank has been forked, and has not looked for the others",
    "rendezvous": "ranks meet in the store, and connect",
    "body": "the check runs, its fixtures' set-up included",
    "teardown": "its fixtures are torn down",
    "report": "the rank answers, the group is closed, results.json is written",
}
KINDS = {
    "raise": "an exception",
    "exit": "`os._exit(3)`",
    "SIGKILL": "a signal that ends the process",
    "SIGSTOP": "a signal that stops it",
    "slow": "late by a second, within every limit",
    "too slow": "never comes",
    "out of memory": "`RLIMIT_AS`: an allocation is refused",
    "ended by the kernel": "a memory cgroup's limit: its out-of-memory killer comes",
    "disk full": "a tmpfs without room",
    "no descriptors": "`RLIMIT_NOFILE` is reached",
    "port taken": "a TCP store's port is another's",
    "corrupt store": "the store's file is overwritten with random bytes",
    "clock jump": "the wall clock goes to and fro by a day at each look",
    "network cut": "two nodes in network namespaces; all packets between them are dropped",
    "network loss": "of the packets between two nodes each eighth is dropped",
}
RANK, PARENT, NODE = "a rank", "the parent", "a node"
CLOCKS = {
    "at once": 0.0,
    "collective limit": COLLECTIVE,
    "check limit": LIMIT,
    "start limit": LIMIT,
    "10 s of silence": 10.0,
    "join limit": 10.0,
}
SLACK = 8.0
"""Seconds: the grace of 2 that other ranks have, their stacks, and the load of the machine."""


@dataclass(frozen=True)
class Cell:
    """One fault in one phase."""

    kind: str
    phase: str
    verdict: str
    said: str = ""
    """What the message says, after who is named."""
    clock: str = "at once"
    """What has to run out before the verdict comes."""
    where: str = RANK
    who: str = RANK
    how: str = ""
    """How it is planted, where the kind does not say it."""

    @property
    def thorough(self) -> bool:
        """Whether it waits for what another cell waits for on the same way."""
        return self.where == RANK and self.phase not in _USUAL.get(self.kind, PHASES)

    @property
    def name(self) -> str:
        """For ids and messages."""
        return f"{self.kind}, {self.phase}" + ("" if self.where == RANK else f", {self.where}")

    @property
    def within(self) -> float:
        """Seconds to the verdict, with the clocks above."""
        return CLOCKS[self.clock] + SLACK


_USUAL = {
    "exit": ("body",),
    "too slow": ("body", "teardown"),
    "slow": ("start", "body"),
    "out of memory": ("body", "report"),
    "ended by the kernel": ("body",),
    "no descriptors": ("start", "body", "report"),
    "port taken": ("body",),
    "corrupt store": ("rendezvous", "teardown"),
    "clock jump": ("rendezvous", "body"),
}
"""Of some kinds the phases that every run plants; the others are thorough."""


def _on_a_rank() -> Iterator[Cell]:
    early, late = ("start", "rendezvous"), ("body", "teardown", "report")
    phases = {"body": "call", "teardown": "teardown", "report": "report"}
    for kind, said in (
        ("raise", "ValueError: planted"),
        ("out of memory", "MemoryError"),
        ("no descriptors", "OSError: [Errno 24] Too many open files"),
    ):
        for phase in (*early, *late):
            verdict = "fail" if phase == "body" else "error"
            yield Cell(kind, phase, verdict, said)
    for kind, said in (
        ("exit", "exited with 3 "),
        ("SIGKILL", "killed by SIGKILL "),
        ("ended by the kernel", "killed by SIGKILL "),
    ):
        why = "; the kernel ended a process for want of memory" if "kernel" in kind else ""
        for phase in early:
            yield Cell(kind, phase, "error", f"{said}before it was ready{why}")
        for phase in late:
            yield Cell(kind, phase, "crash", f"{said}in {phases[phase]}, without an answer{why}")
    for kind, why in (("SIGSTOP", "; it was stopped (SIGSTOP)"), ("too slow", "")):
        for phase in early:
            yield Cell(kind, phase, "error", f"never became ready{why}", "start limit")
        for phase in late:
            said = f"never answered; last phase: {phases[phase]}{why}"
            yield Cell(kind, phase, "timeout", said, "check limit")
    for kind in ("slow", "clock jump"):
        for phase in (*early, *late):
            yield Cell(kind, phase, "pass", who="nobody")
    no_room = "[Errno 28] No space left on device"
    yield Cell("disk full", "start", "error", "No space left on device", who="any rank")
    yield Cell("disk full", "rendezvous", "error", "No space left on device", who="any rank")
    yield Cell("disk full", "body", "error", no_room, how="the check writes a file")
    yield Cell("disk full", "teardown", "error", no_room, how="a fixture writes a file")
    yield Cell("disk full", "report", "pass", who="nobody", how="an answer needs no file")
    for phase, verdict in (("body", "fail"), ("teardown", "error")):
        how = "the check opens a TCP store there"
        yield Cell("port taken", phase, verdict, "DistNetworkError: The server socket has", how=how)
    for phase in early:
        yield Cell("corrupt store", phase, "error", "", "start limit", who="any rank")
    how = "then all make a group"
    yield Cell("corrupt store", "body", "timeout", "", "check limit", who="any rank", how=how)
    for phase in ("teardown", "report"):
        yield Cell("corrupt store", phase, "pass", who="nobody", how="nothing reads it any more")


def _in_the_parent() -> Iterator[Cell]:
    nobody, cannot = "nobody", "the world could not be started: OSError: [Errno 24]"
    yield Cell("no descriptors", "start", "error", cannot, where=PARENT, who=nobody)
    yield Cell("disk full", "start", "error", "No space left", where=PARENT, who="any rank")
    how = "for longer than the check's limit, then continued"
    yield Cell("SIGSTOP", "body", "pass", "", "check limit", where=PARENT, who=nobody, how=how)
    how = "the verdicts so far stand in results.json"
    yield Cell("SIGKILL", "body", "", where=PARENT, who=nobody, how=how)
    how = "in the middle of writing results.json, which stays as it was"
    yield Cell("SIGKILL", "report", "", where=PARENT, who=nobody, how=how)
    how = "for logs and results: said, ends with 3; results.json, if any, stays as it was"
    yield Cell("disk full", "report", "fail", where=PARENT, who=nobody, how=how)
    yield Cell("clock jump", "report", "pass", where=PARENT, who=nobody)
    how = "a plugin of pytest's raises: ends with 3, results.json has the verdicts so far"
    yield Cell("raise", "report", "", where=PARENT, who=nobody, how=how)


def _on_a_node() -> Iterator[Cell]:
    how = "from the beginning: the nodes end with 3 and say who did not come"
    yield Cell("network cut", "start", "", "", "join limit", where=NODE, who="nobody", how=how)
    for phase in ("rendezvous", "body", "teardown", "report"):
        said = "is lost: no sign of life for 1"
        yield Cell("network cut", phase, "error", said, "10 s of silence", where=NODE, who=NODE)
    for phase in PHASES:
        yield Cell("network loss", phase, "pass", where=NODE, who="nobody")
    how = "at the address of --rendezvous listens another program: both end with 3 and say so"
    yield Cell("port taken", "rendezvous", "", "", "join limit", where=NODE, who="nobody", how=how)


CELLS = [*_on_a_rank(), *_in_the_parent(), *_on_a_node()]
BY_NAME = {cell.name: cell for cell in CELLS}

SENSELESS = {
    ("port taken", "start"): "a rank opens no port before it meets the others",
    ("port taken", "rendezvous"): (
        "on one machine ranks meet in a file, and the backend takes any free port; see: a node"
    ),
    ("port taken", "report"): "nothing opens a port any more",
}
"""What is not planted on a rank, and why."""
