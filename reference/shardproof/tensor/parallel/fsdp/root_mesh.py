"""FSDP's and tensor parallelism's dimensions of the root mesh, and the placements of a chunk.

FSDP cuts what tensor parallelism has left on a rank. DTensor reads placements from left to right,
so FSDP, which is to the left of tensor parallelism, seems to cut first. Where both cut the same
tensor dimension, ``_StridedShard`` tells the order, but it tells it right for some sizes only.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from itertools import product
from weakref import WeakKeyDictionary

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import (
    Placement,
    Replicate,
    Shard,
    _StridedShard,
)

from shardproof._core.sharding.blocks import Cut, block_at
from shardproof._core.sharding.ranks import coordinates_along, mesh_ranks, my_coordinate, root_of
from shardproof._core.sharding.simulated_ranks import with_real_ranks

__all__ = ["chunk_placements", "fsdp_dims", "mesh_name", "root_dims", "root_mesh"]


def mesh_name(mesh: DeviceMesh | None) -> str:
    """How an error message calls a mesh."""
    if mesh is None:
        return "no mesh"
    names = mesh.mesh_dim_names
    return f"the mesh {names or ''}{tuple(mesh.shape)} of ranks {mesh_ranks(mesh)}"


def root_mesh(mesh: DeviceMesh | None) -> DeviceMesh:
    """The mesh that FSDP's mesh was sliced from.

    Raises:
        RuntimeError: there is none, or it has no dimension beside FSDP's.

    """
    if mesh is None:
        raise RuntimeError("FSDP has no device mesh, expected one that was sliced from a root mesh")
    root = root_of(mesh)
    if root.ndim < 2:
        raise RuntimeError(
            f"{mesh_name(root)} is FSDP's root mesh, expected one with at least two dimensions"
        )
    return root


# Finding them takes a step for each rank, and FSDP asks for every parameter. Weak: a mesh holds
# process groups.
_ROOT_DIMS: WeakKeyDictionary[
    DeviceMesh, WeakKeyDictionary[DeviceMesh, dict[Hashable, tuple[tuple[int, ...], ...]]]
] = WeakKeyDictionary()


def root_dims(root: DeviceMesh, mesh: DeviceMesh) -> tuple[tuple[int, ...], ...]:
    """The dimensions of ``root`` that make up each dimension of ``mesh``.

    Raises:
        ValueError: ``mesh`` is not this rank's part of ``root`` along some of its dimensions.

    """
    with with_real_ranks():
        here, there = my_coordinate(root), my_coordinate(mesh)
    if here is None or there is None:
        raise ValueError(f"this rank is not on {mesh_name(root)} and {mesh_name(mesh)} both")
    known = _ROOT_DIMS.setdefault(root, WeakKeyDictionary()).setdefault(mesh, {})
    dims = known.get((here, there))
    if dims is None:
        dims = known[here, there] = tuple(_root_dims(root, mesh, here))
    return dims


def _root_dims(root: DeviceMesh, mesh: DeviceMesh, here: tuple[int, ...]) -> list[tuple[int, ...]]:
    members = mesh_ranks(root)
    coordinates = dict(zip(members, product(*map(range, root.shape)), strict=True))
    ranks = mesh_ranks(mesh)
    found: list[tuple[int, ...]] = []
    names = root.mesh_dim_names or ()
    for dim, size in enumerate(mesh.shape):
        name = mesh.mesh_dim_names[dim] if mesh.mesh_dim_names else None
        if name in names and root.shape[names.index(name)] == size:
            found.append((names.index(name),))
            continue
        # A flattened mesh, or one that was built on its own: the ranks tell.
        step = math.prod(tuple(mesh.shape)[dim + 1 :])
        line = [coordinates.get(rank) for rank in ranks[: step * size : step]]
        found.append(
            tuple(d for d in range(root.ndim) if len({p[d] for p in line if p is not None}) > 1)
        )
    free = [d for dims in found for d in dims]
    expected = coordinates_along(here, free, root.shape)
    if len(set(free)) != len(free) or expected != [coordinates.get(rank) for rank in ranks]:
        raise ValueError(f"{mesh_name(mesh)} is not a part of {mesh_name(root)}")
    return found


def fsdp_dims(root: DeviceMesh, mesh: DeviceMesh) -> tuple[int, ...]:
    """The dimensions of ``root`` that FSDP shards over: the last one of its mesh.

    None where it takes the last dimension of ``root``, as of ``("pp", "dp")``: what gathers the
    chunks leaves that one as it is, since it is tensor parallelism's where there is one.
    """
    dims = root_dims(root, mesh)
    return () if any(root.ndim - 1 in part for part in dims) else dims[-1]


def chunk_placements(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    held: Mapping[int, Placement],
    dims: Sequence[int],
) -> tuple[tuple[Placement, ...], int | None, Sequence[int]]:
    """How a tensor is placed when FSDP has cut what each rank held of it.

    Args:
        shape: the global shape.
        mesh_shape: of the root mesh.
        held: root dimension -> placement, of what FSDP cuts.
        dims: the root dimensions that FSDP cuts over.

    Returns:
        (the placements, the tensor dimension that is cut, the root dimensions it is cut over).
        It is the first one wherever a placement can tell the truth about it, otherwise the
        largest one that nothing else cuts, otherwise none: then the ranks of FSDP go on holding
        the same.

    """
    placements = [held.get(d, Replicate()) for d in range(len(mesh_shape))]
    cutting = {d: _cut_dim(p) for d, p in held.items() if _cut_dim(p) is not None}
    others = [d for d in range(1, len(shape)) if d not in cutting.values() and shape[d] > 1]
    others.sort(key=lambda d: -shape[d])
    # A flattened mesh is cut over one of its dimensions where it cannot be over all.
    singles = [(d,) for d in sorted(dims, key=lambda d: -mesh_shape[d])] if len(dims) > 1 else []
    for over in [tuple(dims), *singles] if dims else []:
        for tensor_dim in [0, *others] if shape else []:
            inner = [d for d, cut in cutting.items() if cut == tensor_dim and mesh_shape[d] > 1]
            size = int(shape[tensor_dim])
            placement = _placement(tensor_dim, size, mesh_shape, held, inner, over)
            if placement is not None:
                for dim in over:
                    placements[dim] = placement
                return tuple(placements), tensor_dim, over
    return tuple(placements), None, ()


def _placement(
    tensor_dim: int,
    size: int,
    mesh_shape: Sequence[int],
    held: Mapping[int, Placement],
    inner: Sequence[int],
    dims: Sequence[int],
) -> Placement | None:
    """What FSDP's mesh dimensions say of a tensor dimension that ``inner`` ones cut first."""
    plainly: Placement = Shard(tensor_dim)
    # DTensor gathers neighbouring dimensions as one, which is right for even shards only.
    if len(dims) > 1 and size % math.prod(mesh_shape[d] for d in dims):
        return None
    if not inner:
        return plainly
    plain = all(not isinstance(held[d], _StridedShard) for d in inner)
    if not plain or len(dims) != 1 or len(inner) != 1:
        return None
    outer, cut = dims[0], inner[0]
    if cut < outer:
        return plainly
    if not _strided_shard_describes(size, int(mesh_shape[cut]), int(mesh_shape[outer])):
        return None
    return _StridedShard(tensor_dim, split_factor=int(mesh_shape[cut]))


@lru_cache(maxsize=4096)
def _strided_shard_describes(size: int, inner: int, outer: int) -> bool:
    """Whether ``[_StridedShard, Shard]`` describes shards of shards of a dimension.

    Read from left to right it concatenates piece ``i`` of every inner shard and cuts the result
    evenly. The cuts have to be where the pieces meet, which uneven sizes may prevent.
    """
    if size % (inner * outer) == 0:
        return True
    shard, mesh_shape = (size,), (outer, inner)
    of_outer, of_inner = Cut(0, 0, 1), Cut(0, 1, 1)
    described = Cut(0, 0, inner), of_inner
    return all(
        block_at(shard, mesh_shape, described, at)
        == block_at(shard, mesh_shape, (of_inner, of_outer), at)
        for at in product(range(outer), range(inner))
    )


def _cut_dim(placement: Placement) -> int | None:
    if isinstance(placement, (Shard, _StridedShard)):
        return int(placement.dim)
    return None
