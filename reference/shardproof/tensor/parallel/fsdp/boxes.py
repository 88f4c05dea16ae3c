"""The offset and size of each shard of a 1-D DTensor, and the metadata that say so.

A box is (offset, size). The boxes of all ranks tile the tensor; a rank without elements has an
empty box at the end of the tensor. Nothing here depends on the rank that asks, except what is
named local, and nothing communicates.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.metadata import (
    ShardedTensorMetadata,
    TensorProperties,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.remote_device import _remote_device
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

from shardproof._core.sharding.ranks import mesh_ranks
from shardproof._core.sharding.simulated_ranks import for_each_rank

__all__ = [
    "_create_shard_md_from_dt",
    "_create_sharded_tensor_md_from_dt",
    "_get_box",
    "_get_box_for",
    "_get_dt_pg",
    "_get_local_box",
    "remote_device",
    "sharded_dim",
]

Box = tuple[torch.Size, torch.Size]


def sharded_dim(tensor: DTensor) -> int | None:
    """The tensor dimension that a 1-D DTensor is sharded over; None where it is replicated.

    Raises:
        NotImplementedError: more than one mesh dimension, or a placement whose shards are not
            one rectangle of the tensor each (``_StridedShard``, ``Partial``).

    """
    _only_mesh_dim(tensor)
    placement = tensor._spec.placements[0]
    # Asking for the very type first: placements have an instance check of their own, in Python.
    kind = type(placement)
    if kind is Replicate or (kind is not Shard and isinstance(placement, Replicate)):
        return None
    if isinstance(placement, Shard) and (kind is Shard or not isinstance(placement, _StridedShard)):
        return int(placement.dim) % max(tensor.dim(), 1)
    raise NotImplementedError(
        f"a shard of placement {placement} has no single (offset, size); expected Shard or "
        "Replicate"
    )


def _only_mesh_dim(tensor: DTensor) -> DeviceMesh:
    mesh = tensor._spec.mesh
    if mesh.ndim != 1:
        raise NotImplementedError(
            f"a DTensor with placements {tuple(tensor.placements)} on a mesh of shape "
            f"{tuple(mesh.shape)}; expected a mesh with one dimension"
        )
    return mesh


# FSDP asks for every parameter, and models have few shapes.
@lru_cache(maxsize=16384)
def _box_at(shape: torch.Size, dim: int | None, count: int, idx: int) -> Box:
    """The (offset, size) of one of ``count`` shards, as ``torch.chunk`` cuts."""
    offsets, sizes = [0] * len(shape), list(shape)
    if dim is not None:
        whole, step = shape[dim], -(-shape[dim] // count)
        offsets[dim] = min(idx * step, whole)
        sizes[dim] = min(step, whole - offsets[dim])
    return torch.Size(offsets), torch.Size(sizes)


def _get_box(tensor: DTensor) -> Box:
    """How far apart the shards are, and the size of this rank's.

    Args:
        tensor: a DTensor on a mesh with one dimension, placed as Shard or Replicate.

    Returns:
        (offset from one shard to the next, size of the local shard). The offset is zero but in
        the sharded dimension. Where the shards are uneven, :func:`_get_box_for` is the truth.

    Raises:
        NotImplementedError: another mesh or placement.
        ValueError: the local tensor is not what the placement gives to this rank.

    Local: any rank of the mesh may call it alone.

    """
    dim = sharded_dim(tensor)
    spec, sizes = tensor._spec, tensor._local_tensor.size()
    coordinate = spec.mesh.get_coordinate()
    if coordinate is not None:
        _, sizes = _local_box(tensor, dim, coordinate[0])
    # They are as far apart as the first two.
    offsets, _ = _box_at(spec.shape, dim, spec.mesh.size(0), 1)
    return offsets, sizes


def _get_box_for(tensor: DTensor, idx: int) -> Box:
    """The (offset, size) of shard ``idx`` in the global tensor, exact for uneven shards.

    Args:
        tensor: a DTensor on a mesh with one dimension, placed as Shard or Replicate.
        idx: a coordinate of the mesh.

    Returns:
        The same on every rank. An empty shard lies at the end of the sharded dimension; a
        replicated tensor is one box for every ``idx``.

    Raises:
        NotImplementedError: another mesh or placement.
        ValueError: no such shard.

    Local: any rank may call it alone.

    """
    dim = sharded_dim(tensor)
    spec = tensor._spec
    count = spec.mesh.size(0)
    if not 0 <= idx < count:
        raise ValueError(f"shard {idx} does not exist, expected one of {count}")
    return _box_at(spec.shape, dim, count, idx)


def _get_local_box(tensor: DTensor) -> Box:
    """The (offset, size) of this rank's shard in the global tensor.

    Args:
        tensor: a DTensor on a mesh with one dimension, placed as Shard or Replicate.

    Raises:
        NotImplementedError: another mesh or placement.
        ValueError: this rank is not on the mesh, or its local tensor is not what the placement
            gives to it.

    Local: any rank of the mesh may call it alone.

    """
    dim = sharded_dim(tensor)
    mesh = tensor._spec.mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(
            f"rank {dist.get_rank()} has no shard: the mesh has ranks {mesh_ranks(mesh)}"
        )
    return _local_box(tensor, dim, coordinate[0])


def _local_box(tensor: DTensor, dim: int | None, coordinate: int) -> Box:
    """The box of this rank's shard, once the local tensor was found to be of its size."""
    spec = tensor._spec
    count = spec.mesh.size(0)
    if type(coordinate) is not int:
        # Where one process plays all ranks it stands for all of them, and has no hash.
        return torch.Size(_offsets(spec.shape, dim, count, coordinate)), tensor._local_tensor.size()
    box = _box_at(spec.shape, dim, count, coordinate)
    if tensor._local_tensor.size() != box[1]:
        raise ValueError(
            f"rank {dist.get_rank()} has a local tensor of shape "
            f"{tuple(tensor._local_tensor.size())}, expected {tuple(box[1])} of "
            f"{tuple(spec.shape)} with {spec.placements[0]}"
        )
    return box


@for_each_rank
def _offsets(shape: torch.Size, dim: int | None, count: int, idx: int) -> tuple[int, ...]:
    return _box_at(shape, dim, count, idx)[0]


def _create_shard_md_from_dt(dt: DTensor, current_rank: int) -> ShardMetadata:
    """Describe this rank's shard.

    Args:
        dt: a DTensor on a mesh with one dimension, placed as Shard or Replicate.
        current_rank: the rank to name as owner. ShardedTensor reads it as a global rank.

    Returns:
        The local box, owned by ``current_rank`` on the device of the local tensor.

    Raises:
        NotImplementedError: another mesh or placement.
        ValueError: this rank is not on the mesh, or its local tensor is not what the placement
            gives to it.

    Local: any rank of the mesh may call it alone.

    """
    offsets, sizes = _get_local_box(dt)
    return ShardMetadata(
        shard_offsets=list(offsets),
        shard_sizes=list(sizes),
        placement=f"rank:{current_rank}/{dt._local_tensor.device}",
    )


def _create_sharded_tensor_md_from_dt(
    dt: DTensor, dt_pg: dist.ProcessGroup
) -> ShardedTensorMetadata:
    """Describe all shards.

    Args:
        dt: a DTensor on a mesh with one dimension, placed as Shard or Replicate.
        dt_pg: the group of the mesh's ranks.

    Returns:
        One entry per rank of a sharded tensor, empty shards included, each owned by the global
        rank that holds it; one entry for a replicated tensor, owned by the first rank of the
        mesh. The entries tile the tensor, and are the same on every rank: the device of another
        rank is the one that its number gives it where each node has the devices that this one
        has.

    Raises:
        NotImplementedError: another mesh or placement.
        ValueError: ``dt_pg`` does not hold the mesh's ranks.

    Local: any rank of the mesh may call it alone.

    """
    dim = sharded_dim(dt)
    shape = dt._spec.shape
    owners = mesh_ranks(dt._spec.mesh)
    held = dist.get_process_group_ranks(dt_pg)
    if tuple(held) != owners and sorted(held) != sorted(owners):
        raise ValueError(f"the group has ranks {held}, expected those of the mesh, {owners}")
    device = dt._local_tensor.device
    devices = _devices_of(device)
    shards = []
    for index, owner in enumerate(owners if dim is not None else owners[:1]):
        offsets, sizes = _box_at(shape, dim, len(owners), index)
        shards.append(
            ShardMetadata(list(offsets), list(sizes), remote_device(owner, device, devices))
        )
    return ShardedTensorMetadata(
        shards_metadata=shards,
        size=dt.size(),
        tensor_properties=TensorProperties(
            dtype=dt.dtype, layout=dt.layout, requires_grad=dt.requires_grad
        ),
    )


def _get_dt_pg(dt: DTensor) -> dist.ProcessGroup:
    """The process group of a DTensor whose mesh has one dimension.

    Raises:
        NotImplementedError: more than one mesh dimension.

    Local: any rank of the mesh may call it alone.

    """
    return _only_mesh_dim(dt).get_group()


def remote_device(rank: int, device: torch.device, devices_per_node: int) -> _remote_device:
    """How metadata name the device of a global rank, alike on every rank that asks.

    A new object each time, for who moves a ShardedTensor writes into those of its metadata.
    """
    fresh = _remote_device.__new__(_remote_device)
    fresh.__dict__.update(_parsed(rank, device, devices_per_node).__dict__)
    return fresh


# Reading its own string is most of what metadata cost.
@lru_cache(maxsize=16384)
def _parsed(rank: int, device: torch.device, devices_per_node: int) -> _remote_device:
    if device.type in ("cpu", "meta") or devices_per_node < 1:
        return _remote_device(f"rank:{rank}/{device.type}")
    return _remote_device(f"rank:{rank}/{device.type}:{rank % devices_per_node}")


def _devices_of(device: torch.device) -> int:
    if device.index is None:
        return 0
    module: Any = getattr(torch, device.type, None)
    count: Any = getattr(module, "device_count", None)
    return int(count()) if count is not None else 0
