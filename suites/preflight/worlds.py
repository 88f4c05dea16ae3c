"""The checks of the trial world: the backend joins all ranks and moves exact data.

Not named test_*: `preflight.trial` runs this file, the project's own tests do not.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from harness.rank.fixtures import World

NUMBERS = 1 << 20


@pytest.mark.world
def test_sums_are_exact(world: World, rank: int, device: torch.device) -> None:
    """An all-reduce of 4 MiB of whole numbers leaves the same sum on every rank."""
    values = torch.arange(NUMBERS, dtype=torch.int32, device=device) * (rank + 1)
    dist.all_reduce(values)
    total = world.size * (world.size + 1) // 2
    wanted = torch.arange(NUMBERS, dtype=torch.int32, device=device) * total
    assert torch.equal(values, wanted)


@pytest.mark.world
def test_every_rank_hears_every_other(world: World, rank: int, device: torch.device) -> None:
    """An all-gather brings each rank's own bytes, in the order of ranks."""
    mine = torch.full((NUMBERS,), rank + 1, dtype=torch.uint8, device=device)
    got = [torch.zeros_like(mine) for _ in range(world.size)]
    dist.all_gather(got, mine)
    assert [int(t[0]) for t in got] == list(range(1, world.size + 1))
    assert all(bool((t == t[0]).all()) for t in got)
