"""DTensors whose local tensor is torch's ``LocalShardsWrapper``: the shards of a sharded table.

The wrapper's own dtype and device say nothing (a rank may hold no shard at all), its shards' do.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from shardproof._state_dict_utils.layout import Block


def first_shard(tensor: torch.Tensor) -> torch.Tensor | None:
    """A shard of this rank, where ``tensor`` wraps any."""
    shards = tensor.local_shards() if isinstance(tensor, LocalShardsWrapper) else []
    return shards[0] if shards else None


def joined(wrapper: LocalShardsWrapper, block: Block, dtype: torch.dtype) -> torch.Tensor:
    """The local tensor that the shards of this rank make up: a view where it is one shard.

    Args:
        wrapper: the shards, each with its offset in the global tensor.
        block: what the placements give to this rank.
        dtype: of an empty one.

    Raises:
        ValueError: the shards are not what the placements give to this rank.

    """
    shards = [shard.detach() for shard in wrapper.local_shards()]
    if not shards and not block.numel:
        return torch.empty(block.shape, dtype=dtype)
    if len(shards) == 1 and tuple(shards[0].shape) == block.shape:
        return shards[0]
    if block.starts is not None and len({(s.dtype, s.device) for s in shards}) == 1:
        boxes = [
            [(o - at, o - at + n) for o, n, at in zip(offset, s.shape, block.starts, strict=True)]
            for s, offset in zip(shards, wrapper.local_offsets(), strict=True)
            if s.dim() == len(block.starts) == len(offset)
        ]
        inside = len(boxes) == len(shards) and all(
            0 <= lo <= hi <= size
            for box in boxes
            for (lo, hi), size in zip(box, block.shape, strict=True)
        )
        apart = not any(
            all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(one, other, strict=True))
            for one, other in combinations(boxes, 2)
        )
        if inside and apart and sum(s.numel() for s in shards) == block.numel:
            whole = shards[0].new_empty(block.shape)
            for box, shard in zip(boxes, shards, strict=True):
                whole[tuple(slice(lo, hi) for lo, hi in box)] = shard
            return whole
        # Rows of which nobody said where they belong follow each other.
        if (
            sum(s.shape[0] for s in shards) == block.shape[0]
            and len({s.shape[1:] for s in shards} | {block.shape[1:]}) == 1
        ):
            return torch.cat(shards)
    held = [
        (tuple(o), tuple(s.shape)) for o, s in zip(wrapper.local_offsets(), shards, strict=False)
    ]
    raise ValueError(
        f"this rank has shards (offset, shape) {held}, expected shards that make up "
        f"{block.shape} at {block.starts}"
    )
