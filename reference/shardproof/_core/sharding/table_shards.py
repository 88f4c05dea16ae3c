"""DTensors whose local tensor wraps the shards of a sharded embedding table.

The wrapper's own dtype and device say nothing (a rank may hold no shard at all), its shards' do.
"""

from __future__ import annotations

import math
from itertools import accumulate, combinations
from typing import Any, cast

import torch

from shardproof._core.sharding.blocks import Block
from shardproof._core.tensors.subclasses import shards_of


def shards_in(wrapper: torch.Tensor, block: Block) -> list[tuple[torch.Tensor, tuple[slice, ...]]]:
    """The shards of this rank, detached, each with its region of the local tensor.

    Args:
        wrapper: the shards, each with its offset in the global tensor.
        block: what the placements give to this rank.

    Raises:
        ValueError: the shards are not what the placements give to this rank.

    """
    shards = [shard.detach() for shard in shards_of(wrapper)]
    if not shards and not block.numel:
        return []
    if len(shards) == 1 and tuple(shards[0].shape) == block.shape:
        return [(shards[0], tuple(map(slice, block.shape)))]
    offsets: list[Any] = cast(Any, wrapper).local_offsets()
    if block.starts is not None and all(
        s.dim() == len(o) == len(block.shape) for s, o in zip(shards, offsets, strict=True)
    ):
        boxes = [
            [(o - at, o - at + n) for o, n, at in zip(offset, s.shape, block.starts, strict=True)]
            for s, offset in zip(shards, offsets, strict=True)
        ]
        if not _tile(boxes, block):
            # Rows of which nobody said where they belong follow each other.
            ends = list(accumulate(s.shape[0] for s in shards))
            boxes = [
                [(end - s.shape[0], end), *((0, n) for n in s.shape[1:])]
                for s, end in zip(shards, ends, strict=True)
            ]
        if _tile(boxes, block):
            regions = [tuple(slice(lo, hi) for lo, hi in box) for box in boxes]
            return list(zip(shards, regions, strict=True))
    held = [(tuple(o), tuple(s.shape)) for o, s in zip(offsets, shards, strict=False)]
    raise ValueError(
        f"this rank has shards (offset, shape) {held}, expected shards that make up "
        f"{block.shape} at {block.starts}"
    )


def _tile(boxes: list[list[tuple[int, int]]], block: Block) -> bool:
    """Whether boxes of the local tensor lie in it, apart from each other, and fill it."""
    inside = all(
        0 <= lo <= hi <= size
        for box in boxes
        for (lo, hi), size in zip(box, block.shape, strict=True)
    )
    apart = not any(
        all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(one, other, strict=True))
        for one, other in combinations(boxes, 2)
    )
    filled = sum(math.prod(hi - lo for lo, hi in box) for box in boxes)
    return inside and apart and filled == block.numel


def joined(wrapper: torch.Tensor, block: Block, dtype: torch.dtype) -> torch.Tensor:
    """The local tensor that the shards of this rank make up: a view where it is one shard.

    Args:
        wrapper: the shards, each with its offset in the global tensor.
        block: what the placements give to this rank.
        dtype: of an empty one.

    Raises:
        ValueError: the shards are not what the placements give to this rank.

    """
    parts = shards_in(wrapper, block)
    if not parts:
        return torch.empty(block.shape, dtype=dtype, device="cpu")
    if len(parts) == 1:
        return parts[0][0]
    whole = parts[0][0].new_empty(block.shape)
    for shard, region in parts:
        whole[region] = shard
    return whole
