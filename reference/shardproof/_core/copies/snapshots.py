"""Copies of tensor leaves in new memory: a DTensor stays a DTensor, tied leaves stay tied."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from shardproof._core.sharding.dtensors import with_local
from shardproof._core.sharding.sharded_tensors import with_shards
from shardproof._core.tensors.overlapping_copies import OverlappingCopies
from shardproof._core.tensors.properties import CPU, local_of, requires_grad_of
from shardproof._core.tensors.ties import parameter_tie_key
from shardproof._core.tensors.values import as_parameter_like, copy_of_any, fresh_copy


def snapshot(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of any tensor leaf in new memory, Parameter-ness and ``requires_grad`` kept."""
    return snapshot_by(tensor, partial(fresh_copy, device=device), device)


def snapshot_by(
    tensor: torch.Tensor,
    copied: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device = CPU,
    made: torch.Tensor | None = None,
) -> torch.Tensor:
    """As :func:`snapshot`; ``copied`` copies plain memory, ``made`` is a copy that is there."""
    if isinstance(tensor, DTensor):
        local = copied(local_of(tensor)) if made is None else made
        return as_parameter_like(with_local(tensor, local), tensor)
    if isinstance(tensor, ShardedTensor):
        return with_shards(tensor, copied, device, requires_grad_of(tensor))
    fresh = copied(tensor) if made is None else made
    return fresh if fresh is tensor else as_parameter_like(fresh, tensor)


cpu_copy = partial(fresh_copy, device=CPU)


def snapshots_of_tied(leaves: Sequence[Any], tied: Sequence[bool]) -> Callable[[Any], torch.Tensor]:
    """What gives the CPU snapshots of tied leaves: the same object for the same tensor."""
    together = OverlappingCopies(
        (leaf for leaf, ask in zip(leaves, tied, strict=True) if ask),
        partial(copy_of_any, device=CPU),
    )
    known: dict[Hashable, torch.Tensor] = {}

    def of(value: torch.Tensor) -> torch.Tensor:
        key = parameter_tie_key(value)
        if key not in known:
            known[key] = snapshot_by(value, together.of)
        return known[key]

    return of
