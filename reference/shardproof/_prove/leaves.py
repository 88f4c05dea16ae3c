"""From a tensor of any class to the plain tensors with its bits on this rank, and their claims."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from shardproof._prove.placements import Part, part_of, whole

_QUANTIZED = {torch.qint8: torch.int8, torch.qint32: torch.int32}


@dataclass(frozen=True)
class Leaf:
    """A plain tensor on this rank, and what it claims to be of a whole one."""

    tensor: torch.Tensor
    part: Part
    layout: str
    """Placement and mesh, for people."""
    inner: str = ""
    """Which tensor of a tensor subclass."""
    ranks: tuple[int, ...] = ()
    """Of the mesh, all of which must have one."""
    contradiction: str = ""
    """How the local tensor contradicts its own placements."""


def leaves_of(tensor: torch.Tensor, rank: int) -> Iterator[Leaf]:
    """The plain tensors of one tensor; none of a DTensor on a rank outside of its mesh."""
    if isinstance(tensor, DTensor):
        yield from _of_dtensor(tensor, rank)
    elif hasattr(tensor, "local_shards") and hasattr(tensor, "metadata"):
        yield from _of_sharded_tensor(tensor)
    elif is_traceable_wrapper_subclass(tensor):
        for name, inner in inner_of(tensor):
            for leaf in leaves_of(inner, rank):
                yield replace(leaf, inner=_join(name, leaf.inner))
    elif tensor.is_quantized:  # nothing else reads its bits in place
        raw = torch.empty(0, dtype=_QUANTIZED.get(tensor.dtype, torch.uint8), device=tensor.device)
        raw.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
        yield Leaf(raw, whole(tensor.shape), "plain")
    elif tensor.layout is not torch.strided:
        for name, inner in sparse_parts(tensor):
            part = replace(whole(inner.shape), own="a sparse tensor")
            yield Leaf(inner, part, str(tensor.layout), name)
    else:
        yield Leaf(tensor.detach(), whole(tensor.shape), "plain")


def inner_of(tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The tensors of which a wrapper subclass is made."""
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [(str(name), getattr(tensor, name)) for name in names]


def sparse_parts(tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The tensors of which a sparse one is made."""
    with torch.no_grad():
        if tensor.layout is torch.sparse_coo:
            return [("indices", tensor._indices()), ("values", tensor._values())]
        if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
            names = ("crow_indices", "col_indices", "values")
        elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
            names = ("ccol_indices", "row_indices", "values")
        else:
            return []
        return [(name, getattr(tensor.detach(), name)()) for name in names]


def mesh_coordinates(mesh: Any, rank: int) -> tuple[int, ...] | None:
    """Which shard this rank has along each dimension of the mesh; None outside.

    Where a mesh lists its ranks out of order, torch trains and gathers by the rank's number in the
    group of the dimension, whose ranks it has sorted, not by the coordinate.
    """
    found = (mesh.mesh == rank).nonzero()
    if not len(found):
        return None
    return tuple(
        dist.get_group_rank(mesh.get_group(dim), rank) if size > 1 else 0
        for dim, size in enumerate(mesh.mesh.shape)
    )


def describe_mesh(mesh: Any) -> str:
    """Names and sizes of the mesh's dimensions, and its ranks."""
    names = mesh.mesh_dim_names or [f"dim{i}" for i in range(mesh.mesh.ndim)]
    sizes = " x ".join(f"{name} {size}" for name, size in zip(names, mesh.mesh.shape, strict=True))
    return f"({sizes}) of ranks {mesh.mesh.flatten().tolist()}"


def _of_dtensor(tensor: DTensor, rank: int) -> Iterator[Leaf]:
    mesh = tensor.device_mesh
    at = mesh_coordinates(mesh, rank)
    if at is None:
        return
    local = tensor._local_tensor
    placements = tensor.placements
    part = part_of(tensor.shape, placements, mesh.mesh.shape, at)
    layout = f"{', '.join(map(str, placements))} on {describe_mesh(mesh)}"
    ranks = tuple(mesh.mesh.flatten().tolist())
    if type(local) is torch.Tensor or isinstance(local, torch.nn.Parameter):
        said = ""
        if tuple(local.shape) != part.local_shape:
            said = (
                f"its local tensor has the shape {list(local.shape)}, its placements say "
                f"{list(part.local_shape)}"
            )
        if hasattr(local, "wait"):  # a collective still writes it
            local = local.wait()
        yield Leaf(local.detach(), part, layout, ranks=ranks, contradiction=said)
        return
    if hasattr(local, "local_shards") and hasattr(local, "local_offsets"):
        shards = zip(local.local_shards(), local.local_offsets(), strict=True)
        for number, (shard, offsets) in enumerate(shards):
            yield Leaf(
                shard.detach(),
                _box(tensor.shape, offsets, shard.shape),
                layout,
                f"shard {number}",
                ranks,
            )
        return
    if hasattr(local, "trigger_wait"):
        yield Leaf(local.trigger_wait().detach(), part, layout, ranks=ranks)
        return
    replicated = all(placement.is_replicate() for placement in placements)
    for leaf in leaves_of(local, rank):
        inner = leaf.part if replicated else replace(leaf.part, own="inside a tensor subclass")
        yield replace(leaf, part=inner, layout=layout, ranks=ranks)


def _of_sharded_tensor(tensor: Any) -> Iterator[Leaf]:
    shape = tuple(tensor.metadata().size)
    for number, shard in enumerate(tensor.local_shards()):
        meta = shard.metadata
        said = ""
        if tuple(shard.tensor.shape) != tuple(meta.shard_sizes):
            said = (
                f"a local shard has the shape {list(shard.tensor.shape)}, its metadata says "
                f"{list(meta.shard_sizes)}"
            )
        yield Leaf(
            shard.tensor.detach(),
            _box(shape, meta.shard_offsets, meta.shard_sizes),
            "ShardedTensor",
            f"shard {number}" if number else "",
            contradiction=said,
        )


def _box(shape: Any, offsets: Any, sizes: Any) -> Part:
    runs = tuple(((int(o), int(o) + int(n)),) for o, n in zip(offsets, sizes, strict=True))
    return Part(tuple(int(n) for n in shape), runs)


def _join(outer: str, inner: str) -> str:
    return f"{outer}.{inner}" if inner else outer
