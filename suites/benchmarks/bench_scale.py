"""Rank 0 of worlds up to 16,384: what a call costs besides its communication, and how it grows.

Torch's fake process group moves nothing, so one process stands for rank 0 of a world of any size.
Each benchmark states how its counts grow with the world; `ci/bench --check` holds them to it. The
model is the same in every world: 20 matrices of 1 MiB, sharded by row over all ranks. Results are
checked as far as there are any: nothing arrives from other ranks.
"""

from __future__ import annotations

from typing import ClassVar

from benchmarks import bench_broadcast, bench_fsdp, bench_gather, bench_tensor_parallel
from benchmarks.base import CONSTANT, LINEAR, SCALE, Measured

FLAT = {"collectives": CONSTANT, "calls": CONSTANT, "peak": CONSTANT}
LINES = {"collectives": CONSTANT, "calls": LINEAR, "peak": LINEAR}
LISTS = {"collectives": CONSTANT, "calls": LINEAR, "peak": CONSTANT}


class _AtScale(Measured):
    """What these have in common: rank 0 of a fake world, and counts alone."""

    fake = True
    regimes: ClassVar[tuple[str, ...]] = ("scale",)
    sizes: ClassVar[tuple[int, ...]] = (8, 64, 512, 4096, 16384)
    tracks = SCALE


class GatherAtScale(_AtScale, bench_gather.GatherStateDict):
    """Rank 0's part of a gather; floor: one all-gather's buffers, filled by one copy each."""

    growth = LINES


class BroadcastAtScale(_AtScale, bench_broadcast.BroadcastStateDict):
    """Rank 0's part of a broadcast, which reads and packs the whole model; floor: a scatter."""

    growth = LINES


class DistributeAtScale(_AtScale, bench_broadcast.DistributeStateDict):
    """A rank cuts its part out of its own whole state dict; floor: one copy of the part."""

    growth = LISTS


class BoxesAtScale(_AtScale, bench_fsdp.Boxes):
    """Where each weight's shard lies; floor: by hand in a loop."""

    growth = FLAT


class ShardMetadataAtScale(_AtScale, bench_fsdp.ShardMetadataOf):
    """Each weight described in ShardedTensor's terms, which list every rank; floor: boxes."""

    growth = LISTS


class LocalizeAtScale(_AtScale, bench_tensor_parallel.LocalizeDtensor):
    """Weights become local Parameters, for the first time; floor: one setattr each."""

    growth = FLAT


class ReconstructAtScale(_AtScale, bench_tensor_parallel.ReconstructDtensor):
    """Local Parameters give way to DTensors, as before a forward; floor: one setattr each."""

    growth = FLAT
