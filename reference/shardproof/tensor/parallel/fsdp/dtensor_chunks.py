"""FSDP's chunk of a tensor as a DTensor over the root mesh. Nothing communicates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard

from shardproof._core.sharding.blocks import local_shape
from shardproof._core.sharding.dtensors import build_dtensor
from shardproof._core.sharding.simulated_ranks import for_each_rank
from shardproof._core.tensors.subclasses import has_own_operations, unwrap_pending
from shardproof._core.tensors.values import fresh_copy
from shardproof.tensor.parallel._subclasses import alias, piece
from shardproof.tensor.parallel.fsdp.root_mesh import (
    chunk_placements,
    fsdp_dims,
    mesh_name,
    root_dims,
    root_mesh,
)


@torch.no_grad()
def _chunk_dtensor(
    tensor: torch.Tensor,
    rank: int,  # noqa: ARG001
    device_mesh: DeviceMesh,
) -> DTensor:
    """FSDP's chunk of a tensor that every rank of FSDP's mesh holds, as DTensor.

    Args:
        tensor: of any shape, dtype and strides: a plain tensor, or the DTensor of tensor
            parallelism. It is not changed.
        rank: this rank in FSDP's group; the mesh tells it as well, and is what counts.
        device_mesh: FSDP's mesh, sliced from the root mesh: 1-D, or 2-D for hybrid sharding,
            which shards over the last dimension. Tensor parallelism, where there is one, has the
            last dimension of the root mesh.

    Returns:
        A DTensor over the root mesh, without ``requires_grad``, whose local tensor is a copy of
        the chunk alone. The placement is that of ``tensor`` in the dimensions of tensor
        parallelism, ``Replicate`` in those that neither cuts, and ``Shard(0)`` in FSDP's, as
        ``torch.chunk`` cuts what this rank holds. Where tensor parallelism cuts dimension 0 too
        it is ``_StridedShard(0)``, since FSDP cuts second, as ``fully_shard`` has it. torch's own
        says ``Shard(0)`` there, and moves rows between ranks until that is true: ``is_shard()``
        tells the two apart, a reader of the tensor or of its checkpoint does not. Sizes so uneven
        that this placement would name elements that the rank does not hold are cut along another
        dimension, and left whole where there is none; so is a scalar, and a tensor that FSDP shards
        over the last dimension of the root mesh, which ``_all_gather_dtensor`` would not gather.

    Raises:
        RuntimeError: there is no root mesh, or it has one dimension.
        TypeError: ``tensor`` is a ShardedTensor.
        ValueError: the meshes do not belong together, FSDP's mesh is not outside of the tensor
            parallelism of ``tensor``, or the local tensor is not what the placement gives to this
            rank.

    Local: no collective runs, but all ranks of the root mesh need the result. In compiled code it
    is traced, as a redistribution from the TP-local tensors. pytorch#118639.

    """
    root = root_mesh(device_mesh)
    if torch.compiler.is_compiling():
        return _chunk_in_a_graph(tensor, root, device_mesh)
    if isinstance(tensor, ShardedTensor):
        raise TypeError("expected a tensor or a DTensor to chunk, got a ShardedTensor")
    dims = fsdp_dims(root, device_mesh)
    held = _placements_on(root, tensor, dims) if isinstance(tensor, DTensor) else {}
    local = alias(unwrap_pending(tensor._local_tensor if isinstance(tensor, DTensor) else tensor))
    mesh_shape = tuple(int(size) for size in root.shape)
    placements, tensor_dim, over = chunk_placements(tuple(tensor.shape), mesh_shape, held, dims)
    if tensor_dim is not None:
        # Not as numbers: where one process plays all ranks each stands for several.
        coordinate = root.get_coordinate()
        assert coordinate is not None
        local = _chunk(local, tensor_dim, [(mesh_shape[d], coordinate[d]) for d in over])
    copied = fresh_copy(local, local.device)
    meta = TensorMeta(torch.Size(tensor.shape), _dense_stride(tensor), tensor.dtype)
    return build_dtensor(copied, DTensorSpec(root, placements, tensor_meta=meta))


def _chunk_in_a_graph(tensor: torch.Tensor, root: DeviceMesh, mesh: DeviceMesh) -> DTensor:
    """The same in operations that the compiler knows; what TP cuts by rows, too, moves."""
    held = tensor.placements[-1] if isinstance(tensor, DTensor) else Replicate()
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    outer = [Replicate()] * (root.ndim - 2)
    whole: Any = DTensor.from_local(
        local.detach().clone(), root, [*outer, Replicate(), held], run_check=False
    )
    if (root.mesh_dim_names or "0")[-1:] == (mesh.mesh_dim_names or "1")[-1:]:
        return whole
    chunk: DTensor = whole.redistribute(placements=[*outer, Shard(0), held])
    return chunk


def _placements_on(root: DeviceMesh, tensor: DTensor, dims: Sequence[int]) -> dict[int, Placement]:
    """The placements of tensor parallelism by root dimension, once the tensor was checked."""
    expected = local_shape(tensor._spec)
    if tuple(tensor._local_tensor.shape) != expected:
        raise ValueError(
            f"the local tensor has shape {tuple(tensor._local_tensor.shape)}, expected {expected} "
            f"of {tuple(tensor.shape)} with {tuple(tensor.placements)}"
        )
    held: dict[int, Placement] = {}
    for part, placement in zip(root_dims(root, tensor.device_mesh), tensor.placements, strict=True):
        if isinstance(placement, Replicate) or not part:
            continue
        if len(part) != 1 or part[0] in dims:
            raise ValueError(
                f"the tensor has {placement} on {mesh_name(tensor.device_mesh)}, expected a "
                f"dimension of {mesh_name(root)} that is not FSDP's"
            )
        held[part[0]] = placement
    if held and not dims:
        raise ValueError(
            f"the tensor has {tuple(tensor.placements)} on {mesh_name(tensor.device_mesh)}, and "
            f"FSDP takes the innermost dimension of {mesh_name(root)}; expected FSDP outside of "
            "tensor parallelism"
        )
    return held


@for_each_rank
def _chunk(local: torch.Tensor, dim: int, cuts: Sequence[tuple[int, int]]) -> torch.Tensor:
    """A view of the piece that ``torch.chunk`` gives to each (parts, index) in turn."""
    for parts, index in cuts:
        if has_own_operations(local):
            local = piece(local, dim, parts, index)
            continue
        size = local.size(dim)
        step = -(-size // parts)
        start = min(index * step, size)
        local = local.narrow(dim, start, min(step, size - start))
    return local


def _dense_stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides of a tensor of this memory format that has no gaps."""
    if isinstance(tensor, DTensor):
        return tuple(tensor._spec.stride)
    ghost = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.uint8, device="meta")
    return tuple(torch.empty_like(ghost).stride())
