"""FSDP's chunks as ShardedTensor: what a sharded state dict holds without ``_use_dtensor``.

A tensor that tensor parallelism has sharded becomes a ShardedTensor over its own group whose one
local shard is the ShardedTensor of FSDP's chunks. Nothing here communicates: the metadata follow
from sizes and groups, which every rank knows.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import (
    ShardedTensorMetadata,
    TensorProperties,
)
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec, ShardingSpec
from torch.distributed._shard.sharding_spec.chunk_sharding_spec import ChunkShardingSpec
from torch.distributed.remote_device import _remote_device
from torch.distributed.tensor import DTensor

from shardproof._core.tensors.properties import is_ordinary
from shardproof._core.tensors.subclasses import copy_by_class, has_own_operations, unwrap_pending
from shardproof._core.tensors.values import bits
from shardproof.tensor.parallel._subclasses import piece
from shardproof.tensor.parallel.fsdp.boxes import (
    _create_shard_md_from_dt,
    _create_sharded_tensor_md_from_dt,
    _get_dt_pg,
    remote_device,
    sharded_dim,
)

__all__ = ["_chunk_tensor", "_pre_load_state_dict", "_rewrite_spec_if_needed"]


def _rewrite_spec_if_needed(spec: ShardingSpec, tensor: Tensor, rank: int) -> ShardingSpec:
    """The sharding of ``spec`` with this rank's shards on the device of ``tensor``.

    FSDP moves optimizer state to the CPU, and ShardedTensor refuses a shard that is elsewhere
    than its placement says.

    Args:
        spec: a ``ChunkShardingSpec`` or ``EnumerableShardingSpec``; it is not changed.
        tensor: what the shards of this rank hold.
        rank: this rank as ``spec`` calls it, that is, the global rank.

    Returns:
        A copy where a placement differs; ``spec`` itself where none does, and for every other
        kind of spec.

    Local: no collective runs.

    """
    if isinstance(spec, ChunkShardingSpec):
        found = [_on_device(p, tensor.device, rank) for p in spec.placements]
        if all(new is old for new, old in zip(found, spec.placements, strict=True)):
            return spec
        return ChunkShardingSpec(dim=spec.dim, placements=found)
    if isinstance(spec, EnumerableShardingSpec):
        placements = [_on_device(shard.placement, tensor.device, rank) for shard in spec.shards]
        if all(new is s.placement for new, s in zip(placements, spec.shards, strict=True)):
            return spec
        return EnumerableShardingSpec(
            [
                ShardMetadata(list(s.shard_offsets), list(s.shard_sizes), placement)
                for s, placement in zip(spec.shards, placements, strict=True)
            ]
        )
    return spec


def _on_device(placement: Any, device: torch.device, rank: int) -> Any:
    if placement is None or placement.rank() != rank or placement.device() == device:
        return placement
    return _remote_device(f"rank:{rank}/{device}")


def _chunk_tensor(
    tensor: Tensor,
    rank: int,
    world_size: int,
    num_devices_per_node: int,
    pg: dist.ProcessGroup,
) -> Tensor:
    """FSDP's chunk of a tensor that every rank of ``pg`` holds, as ShardedTensor.

    Args:
        tensor: of any dtype and strides. A plain tensor; a ShardedTensor with one shard on each
            rank of its group; or a DTensor on a mesh with one dimension, placed as Shard or
            Replicate. It is not changed.
        rank: this rank in ``pg``.
        world_size: the size of ``pg``.
        num_devices_per_node: names the devices of other ranks; 0 where there is no accelerator.
        pg: FSDP's group.

    Returns:
        A ShardedTensor over ``pg``, chunked along the first dimension as ``torch.chunk`` does:
        a rank has one shard, or none where no chunk is left for it. What tensor parallelism has
        sharded becomes a ShardedTensor over its own group around such a one, which then has a
        shard, maybe an empty one, on every rank, for the checkpoint planner looks into it. A
        replicated DTensor is chunked as the plain tensor that it is. The chunks are contiguous
        copies without ``requires_grad``; the metadata name global ranks and are the same on
        every rank of the group.

    Raises:
        NotImplementedError: a DTensor on another mesh or with another placement.
        ValueError: ``rank`` or ``world_size`` is not that of ``pg``, the ShardedTensor has not
            one plain shard on each rank, or the DTensor's local tensor is not what its placement
            gives to this rank.

    Local: no collective runs, but all ranks of the groups need the result.

    """
    if (rank, world_size) != (dist.get_rank(pg), dist.get_world_size(pg)):
        raise ValueError(
            f"rank {rank} of {world_size}, expected rank {dist.get_rank(pg)} of "
            f"{dist.get_world_size(pg)} as in the group"
        )
    if isinstance(tensor, ShardedTensor):
        return _chunk_sharded(tensor, num_devices_per_node, pg)
    if not isinstance(tensor, DTensor):
        return _chunk_rows(unwrap_pending(tensor), num_devices_per_node, pg)
    local = unwrap_pending(tensor._local_tensor)
    # Its metadata name one owner, but FSDP needs the values of this rank's own group: it can
    # only get them from chunks that do not hang below the owner's shard.
    if sharded_dim(tensor) is None:
        return _chunk_rows(local, num_devices_per_node, pg)
    shard = _create_shard_md_from_dt(tensor, dist.get_rank())
    group = _get_dt_pg(tensor)
    return _wrap_chunk(
        _chunk_rows(local, num_devices_per_node, pg, everywhere=True),
        shard,
        _create_sharded_tensor_md_from_dt(tensor, group),
        group,
    )


def _chunk_sharded(
    tensor: ShardedTensor, num_devices_per_node: int, pg: dist.ProcessGroup
) -> ShardedTensor:
    group = tensor._process_group
    metadata = tensor.metadata()
    owners = [shard.placement and shard.placement.rank() for shard in metadata.shards_metadata]
    # Judged by what all ranks know: then all of them refuse, or none.
    if sorted(map(str, owners)) != sorted(map(str, dist.get_process_group_ranks(group))):
        raise ValueError(
            f"the ShardedTensor has shards on ranks {owners}, expected one on each of "
            f"{dist.get_process_group_ranks(group)}"
        )
    shard = tensor.local_shards()[0]
    if isinstance(shard.tensor, ShardedTensor):
        raise ValueError("the shards of the ShardedTensor are sharded already")
    return _wrap_chunk(
        _chunk_rows(unwrap_pending(shard.tensor), num_devices_per_node, pg, everywhere=True),
        copy.deepcopy(shard.metadata),
        copy.deepcopy(metadata),
        group,
    )


def _wrap_chunk(
    inner: ShardedTensor,
    shard: ShardMetadata,
    metadata: ShardedTensorMetadata,
    group: dist.ProcessGroup,
) -> ShardedTensor:
    """The ShardedTensor over ``group`` whose local shard is ``inner``."""
    metadata.tensor_properties.requires_grad = False
    metadata.tensor_properties.pin_memory = False
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        [Shard(inner, shard)], metadata, process_group=group, init_rrefs=False
    )


def _chunk_rows(
    tensor: Tensor,
    num_devices_per_node: int,
    pg: dist.ProcessGroup,
    everywhere: bool = False,
) -> ShardedTensor:
    """Chunks along the first dimension; ``everywhere`` lists the empty ones too."""
    me, ranks = dist.get_rank(pg), dist.get_process_group_ranks(pg)
    # A scalar cannot be cut: the first rank holds it.
    rows = int(tensor.size(0)) if tensor.dim() else 1
    step = -(-rows // len(ranks))
    shards: list[ShardMetadata] = []
    local: list[Shard] = []
    for index, owner in enumerate(ranks):
        start = min(index * step, rows)
        stop = min(start + step, rows)
        if start == stop and rows and not (everywhere and tensor.dim()):
            continue
        offsets = [start, *([0] * (tensor.dim() - 1))] if tensor.dim() else []
        sizes = [stop - start, *tensor.shape[1:]] if tensor.dim() else []
        placement = remote_device(owner, tensor.device, num_devices_per_node)
        shards.append(ShardMetadata(offsets, sizes, placement))
        if index == me:
            here = ShardMetadata(list(offsets), list(sizes), f"rank:{owner}/{tensor.device}")
            local.append(Shard(_row_chunk(tensor, len(ranks), me, start, stop), here))
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        local,
        ShardedTensorMetadata(
            shards_metadata=shards,
            size=tensor.size(),
            # The chunk is in ordinary memory, also where the tensor is pinned.
            tensor_properties=TensorProperties(
                dtype=tensor.dtype,
                layout=tensor.layout,
                requires_grad=False,
                memory_format=torch.contiguous_format,
                pin_memory=False,
            ),
        ),
        process_group=pg,
        init_rrefs=False,
    )


def _row_chunk(tensor: Tensor, parts: int, index: int, start: int, stop: int) -> Tensor:
    if has_own_operations(tensor):
        with torch.no_grad():
            return copy_by_class(piece(tensor, 0, parts, index) if tensor.dim() else tensor)
    part = tensor.detach()
    return _compact(part[start:stop] if tensor.dim() else part)


def _compact(part: Tensor) -> Tensor:
    """A contiguous copy, bit for bit."""
    if not is_ordinary(part):
        return part.clone(memory_format=torch.contiguous_format)
    return bits(part).clone(memory_format=torch.contiguous_format).view(part.dtype)


def _pre_load_state_dict(tensor: Tensor) -> tuple[Tensor, list[Shard]]:
    """What FSDP loads from a ShardedTensor.

    Args:
        tensor: a ShardedTensor, nested or not, as :func:`_chunk_tensor` makes it.

    Returns:
        (the innermost ShardedTensor, its shards on this rank).

    Raises:
        TypeError: ``tensor`` is no ShardedTensor.

    Local: no collective runs.

    """
    # Asking for the very type first: a miss of an instance check costs more than all the rest.
    if type(tensor) is not ShardedTensor and not isinstance(tensor, ShardedTensor):
        raise TypeError(f"expected a ShardedTensor, got a {type(tensor).__name__}")
    try:
        # What local_shards() gives; the call would be a quarter of this one.
        (shard,) = tensor._local_shards
    except ValueError:  # none, or several
        return tensor, tensor._local_shards.copy()
    inner = shard.tensor
    if type(inner) is Tensor or not isinstance(inner, ShardedTensor):
        return tensor, [shard]
    return _pre_load_state_dict(inner)
