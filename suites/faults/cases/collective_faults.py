"""A small suite whose ranks do not issue the same collectives; run by test_collective_faults.py.

Each check states in its name what rank 1 does, unless it says another.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.world(3)
FOREVER = 10_000


def gather(rows: int = 4, dtype: torch.dtype = torch.float32) -> None:
    tensor = torch.ones(rows, 3, dtype=dtype)
    dist.all_gather([torch.empty_like(tensor) for _ in range(3)], tensor)


def reduce(count: int = 5, group: Any = None) -> None:
    dist.all_reduce(torch.ones(count), group=group)


class TestDiffering:
    """Ranks that issue different collectives as the same one of a group."""

    def test_skips_one(self, rank: int) -> None:
        for step in range(4):
            gather()
            if (step, rank) != (2, 1):
                reduce()

    def test_issues_one_more(self, rank: int) -> None:
        gather()
        if rank == 1:
            dist.barrier()
        gather()

    def test_another_order(self, rank: int) -> None:
        for step in (0, 1):
            if step == (rank == 1):
                gather()
            else:
                reduce()

    def test_another_root(self, rank: int) -> None:
        dist.broadcast(torch.ones(2), src=0)
        dist.broadcast(torch.ones(2), src=1 if rank == 1 else 2)

    def test_another_shape(self, rank: int) -> None:
        dist.barrier()
        gather(5 if rank == 1 else 4)

    def test_another_dtype(self, rank: int) -> None:
        dist.barrier()
        gather(dtype=torch.float64 if rank == 1 else torch.float32)

    def test_differ_long_before(self, rank: int) -> None:
        group = dist.new_group([0, 1])
        if rank < 2:
            dist.broadcast(torch.ones(1, dtype=torch.int32 if rank else torch.float32), 0, group)
        dist.barrier()
        if rank == 1:
            time.sleep(FOREVER)
        dist.barrier()


class TestMissing:
    """Ranks that never issue what others wait in."""

    def test_skips_the_last(self, rank: int) -> None:
        gather()
        if rank != 1:
            gather()

    def test_issues_one_more_at_the_end(self, rank: int) -> None:
        gather()
        if rank == 1:
            dist.barrier()

    def test_sleeps(self, rank: int) -> None:
        dist.barrier()
        if rank == 1:
            time.sleep(FOREVER)
        gather()

    def test_is_stopped(self, rank: int) -> None:
        gather()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        gather()

    def test_is_killed(self, rank: int) -> None:
        gather()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        gather()

    def test_another_group(self, rank: int) -> None:
        everyone, others = dist.new_group([0, 1, 2]), dist.new_group([0, 1])
        dist.barrier()
        reduce(group=others if rank == 1 else everyone)

    def test_groups_in_another_order(self, rank: int) -> None:
        groups = [dist.new_group([0, 1]), dist.new_group([0, 1])]
        if rank < 2:
            for group in reversed(groups) if rank == 1 else groups:
                reduce(group=group)

    def test_stands_behind_one_that_sleeps(self, rank: int) -> None:
        group = dist.new_group([1, 2])
        if rank == 2:
            time.sleep(FOREVER)
        if rank == 1:
            reduce(group=group)
        dist.barrier()

    def test_groups_made_in_another_order(self, rank: int) -> None:
        members = [[0, 1], [0, 2]] if rank == 1 else [[0, 2], [0, 1]]
        groups = {tuple(ranks): dist.new_group(ranks) for ranks in members}
        if rank < 2:
            reduce(group=groups[0, 1])


class TestElse:
    """Late ranks, sends and receives, and what no record tells."""

    def test_is_late(self, rank: int) -> None:
        dist.barrier()
        if rank == 1:
            time.sleep(4.5)
        gather()

    def test_sends_nothing(self, rank: int) -> None:
        dist.barrier()
        if rank == 0:
            dist.recv(torch.ones(3), src=1)

    def test_leaves_a_gather_of_objects(self, rank: int) -> None:
        if rank != 1:
            dist.all_gather_object([None] * 3, {"rank": rank})

    def test_every_rank_issued_it(self, rank: int) -> None:
        gather()
        if rank == 1:
            # Issued, and never carried out: the peers of its connections have nobody to hear.
            dist.all_reduce(torch.ones(1 << 22), async_op=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            dist.all_reduce(torch.ones(1 << 22))

    def test_in_order(self) -> None:
        for _ in range(300):
            reduce()
