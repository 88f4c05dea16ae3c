"""A ShardedTensor of the same sharding around other local shards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard as TensorShard


def with_shards(
    like: ShardedTensor,
    change: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    requires_grad: bool = False,
) -> ShardedTensor:
    """The ShardedTensor of ``like``'s sharding around changed shards. No collective runs."""
    metadata = copy.deepcopy(like.metadata())
    sharding = copy.deepcopy(like.sharding_spec())
    placements = [shard.placement for shard in metadata.shards_metadata]
    placements += getattr(sharding, "placements", [])
    placements += [shard.placement for shard in getattr(sharding, "shards", [])]
    for placement in placements:
        if placement is not None:
            placement._device = device
    properties = metadata.tensor_properties
    properties.requires_grad = requires_grad
    fresh: ShardedTensor = ShardedTensor.__new__(
        ShardedTensor,
        sharding,
        metadata.size,
        dtype=properties.dtype,
        layout=properties.layout,
        pin_memory=False,
        requires_grad=requires_grad,
    )
    prepare: Any = fresh._prepare_init
    prepare(process_group=like._process_group, init_rrefs=False)
    fresh._metadata = metadata
    for shard in like.local_shards():
        shard_metadata = copy.deepcopy(shard.metadata)
        if shard_metadata.placement is not None:
            shard_metadata.placement._device = device
        fresh._local_shards.append(TensorShard(change(shard.tensor), shard_metadata))
    return fresh
