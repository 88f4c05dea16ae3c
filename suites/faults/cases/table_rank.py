"""A suite in which one rank meets the faults of faults/table.py; run by test_fault_table.py.

A world's limit tells its ranks which cell they are to play, for a world may start before its check
is named. After each cell follows a check that is in order.
"""

from __future__ import annotations

import itertools
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from faults.own_disk import fill, mount_small
from faults.table import BY_NAME, LIMIT, Cell
from harness.rank import rank_process as ranks
from harness.settings import options
from harness.system import channel

FAULTY = int(os.environ["FAULT_RANK"])
CELLS = [BY_NAME[name] for name in os.environ["FAULT_CELLS"].splitlines()]
IN_ORDER = {"collective": 25.0, "limit": 50.0}
EARLY = ("start", "rendezvous")
NEVER = 10_000

options.START_LIMIT["fork"] = LIMIT
held: list[Any] = []
rank_specs: list[ranks.RankSpec] = []
if any(cell.kind == "disk full" for cell in CELLS):
    mount_small(Path(os.environ["TMPDIR"]))


# --- the faults -------------------------------------------------------------------------------


def raises(phase: str) -> None:
    raise ValueError("planted")


def exhaust_memory(phase: str) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    held.append(bytearray(1 << 30))


def be_ended_by_the_kernel(phase: str) -> None:
    Path(os.environ["FAULT_MEMORY"], "cgroup.procs").write_text(str(os.getpid()))
    held.append(bytearray(1 << 30))


def fill_the_disk(phase: str) -> None:
    fill(Path(rank_specs[-1].folder))
    if phase in {"body", "teardown"}:
        Path(os.environ["TMPDIR"], "checkpoint").write_bytes(bytes(1 << 16))


def exhaust_descriptors(phase: str) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    while True:
        held.append(os.open(os.devnull, os.O_RDONLY))


def take_the_port(phase: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        dist.TCPStore("127.0.0.1", port, is_master=True)  # type: ignore[attr-defined]


def corrupt_the_store(phase: str) -> None:
    Path(rank_specs[-1].folder, "store").write_bytes(os.urandom(4096))


def jump(phase: str) -> None:
    real = time.time
    days = itertools.cycle([86400.0, -86400.0])
    time.time = lambda: real() + next(days)


FAULTS: dict[str, Callable[[str], Any]] = {
    "raise": raises,
    "exit": lambda _: os._exit(3),
    "SIGKILL": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSTOP": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "slow": lambda _: time.sleep(1),
    "too slow": lambda _: time.sleep(NEVER),
    "out of memory": exhaust_memory,
    "ended by the kernel": be_ended_by_the_kernel,
    "disk full": fill_the_disk,
    "no descriptors": exhaust_descriptors,
    "port taken": take_the_port,
    "corrupt store": corrupt_the_store,
    "clock jump": jump,
}


# --- the phases -------------------------------------------------------------------------------


def played() -> Cell | None:
    """The cell that the world of this rank plays; None in order, and in the parent."""
    if not rank_specs:
        return None
    number = round((rank_specs[-1].spec.limit - LIMIT) * 1000) - 1
    return CELLS[number] if 0 <= number < len(CELLS) else None


def plant(phase: str) -> None:
    if (cell := played()) is None or cell.phase != phase:
        return
    # Ranks share the disk: the one that comes first needs a page of the store for all.
    if rank_specs[-1].rank == FAULTY or (cell.kind == "disk full" and phase in EARLY):
        FAULTS[cell.kind](phase)


def become_rank(
    rank_spec: ranks.RankSpec, original: Callable[[ranks.RankSpec], None] = ranks.become_rank
) -> None:
    rank_specs.append(rank_spec)
    plant("start")
    original(rank_spec)


def join(*args: Any, original: Callable[..., None] = dist.init_process_group, **kw: Any) -> None:
    plant("rendezvous")
    if (cell := played()) is not None and cell.name == "disk full, rendezvous":
        kw["store"].set("large", "x" * (1 << 16))  # two addresses fit into the page that it has
    original(*args, **kw)


def send(
    self: channel.RankEnd,
    kind: str,
    original: Callable[..., None] = channel.RankEnd.send,
    **payload: Any,
) -> None:
    if kind == "answer":
        plant("report")
    original(self, kind, **payload)


ranks.become_rank = become_rank
dist.init_process_group = join
channel.RankEnd.send = send  # type: ignore[method-assign]


@pytest.fixture
def teardown() -> Iterator[None]:
    yield
    plant("teardown")


def planned() -> list[Any]:
    found = []
    for number, cell in enumerate(CELLS, 1):
        if cell.phase in EARLY:  # after a test of the parent's own, no world starts ahead
            found.append(pytest.param("", id=f"before {cell.name}"))
        limit = LIMIT + number / 1000
        found.append(pytest.param(cell.name, id=cell.name, marks=pytest.mark.world(limit=limit)))
        name = f"after {cell.name}"
        found.append(pytest.param(name, id=name, marks=pytest.mark.world(**IN_ORDER)))
    return found


@pytest.mark.parametrize("name", planned())
def test_cell(name: str, teardown: None) -> None:
    if not name:
        return
    dist.barrier()
    plant("body")
    if (cell := played()) is not None and cell.kind == "corrupt store" and cell.phase == "body":
        dist.new_group()
    dist.barrier()
