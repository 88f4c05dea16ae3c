"""Where torchrun has put this process: which node of how many, and where they meet.

torchrun starts `--nproc-per-node` workers on each node. The first of them is the node's warm
parent, which forks the ranks of every world itself; the others only count, and wait for its end.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.system import processes

VARIABLES = ("GROUP_RANK", "GROUP_WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
RENDEZVOUS_PORT = "SHARDPROOF_RENDEZVOUS_PORT"
"""Set by harness.nodes.launch for its workers."""


@dataclass(frozen=True)
class TorchrunEnv:
    """One node of a run under torchrun."""

    group_rank: int
    """The number that torchrun gave this node."""
    count: int
    ranks: int
    """The most ranks that a node gives to a world: --nproc-per-node."""
    master: str
    port: int
    """Of the store that torchrun's agents share."""
    run_id: str
    leads: bool
    """Whether this node collects the verdicts. Under harness.nodes.launch it is the one whose agent
    serves the rendezvous: no agent outlives it, while any other may die and be reported."""

    def index(self, leader: int) -> int:
        """The node's number in reports, the leader's 0."""
        if self.group_rank == leader:
            return 0
        return self.group_rank + (self.group_rank < leader)


def of(environment: Mapping[str, str]) -> TorchrunEnv | None:
    """What torchrun's variables say; None where torchrun has not started this."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    group_rank, count, _, ranks = (int(environment[name]) for name in VARIABLES)
    rendezvous = environment.get(RENDEZVOUS_PORT)
    return TorchrunEnv(
        group_rank,
        count,
        ranks,
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        environment["TORCHELASTIC_RUN_ID"] + "/" + environment["TORCHELASTIC_RESTART_COUNT"],
        processes.listens(os.getppid(), int(rendezvous)) if rendezvous else group_rank == 0,
    )


def host() -> str:
    """This machine's name, as reports call it."""
    return socket.gethostname()


def wait_for_the_first_worker() -> None:
    """Return when the worker of this node that does the work has ended."""
    for pid in processes.children(os.getppid()):
        try:
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if b"LOCAL_RANK=0" in words:
            processes.wait_for(pid)


def digest(paths: list[Path]) -> str:
    """A short hash of the Python files under some folders, for comparing machines."""
    found = hashlib.sha256()
    for folder in paths:
        for path in sorted(folder.rglob("*.py")):
            found.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]
