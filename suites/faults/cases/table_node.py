"""A suite over two nodes, in which a rank of the second waits in a phase; test_fault_network.py."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from harness.rank import rank_process as ranks
from harness.system import channel

PHASE = os.environ.get("FAULT_PHASE")
HERE = Path(__file__).parent
PLAYED = 55.0
"""The limit that tells the ranks of a world that its check is to meet the fault."""


def wait(phase: str) -> None:
    here = ranks.current
    if here is not None and here.rank == 1 and phase == PHASE and here.spec.limit == PLAYED:
        (HERE / "waiting").touch()
        time.sleep(40)


def join(*args: Any, original: Callable[..., None] = dist.init_process_group, **kw: Any) -> None:
    wait("rendezvous")
    original(*args, **kw)


def send(
    self: channel.RankEnd,
    kind: str,
    original: Callable[..., None] = channel.RankEnd.send,
    **payload: Any,
) -> None:
    if kind == "answer":
        wait("report")
    original(self, kind, **payload)


dist.init_process_group = join
channel.RankEnd.send = send  # type: ignore[method-assign]


@pytest.fixture
def teardown() -> Iterator[None]:
    yield
    wait("teardown")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.world(collective=50, limit=limit))
        for name, limit in (("before", 56), ("planted", PLAYED), ("after", 56))
    ],
)
def test_cell(name: str, teardown: None) -> None:
    total = torch.arange(100_000)
    dist.all_reduce(total)
    wait("body")
    dist.barrier()
    assert torch.equal(total, 2 * torch.arange(100_000))
