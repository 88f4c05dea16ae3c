"""The global ranks of device meshes, their coordinates, and in which order they hold shards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def wants_result_here(ranks_only: tuple[int, ...], pg: dist.ProcessGroup | None) -> bool:
    """Whether the caller wants a result here; ``ranks_only`` counts in the numbering of ``pg``."""
    return not ranks_only or dist.get_rank(pg) in ranks_only


# A mesh builds its tensor of ranks anew each time it is asked. Weak: a mesh holds process groups.
_RANKS: WeakKeyDictionary[DeviceMesh, tuple[int, ...]] = WeakKeyDictionary()


def my_coordinate(mesh: DeviceMesh) -> tuple[int, ...] | None:
    """This rank's coordinate on ``mesh``, None where the rank is no part of it."""
    coordinate = mesh.get_coordinate()
    return None if coordinate is None else tuple(int(c) for c in coordinate)


def coordinates_along(
    here: Sequence[int], dims: Sequence[int], shape: Sequence[int]
) -> list[tuple[int, ...]]:
    """The coordinates that differ from ``here`` in ``dims`` alone, the last of which runs fastest.

    ``shape`` is that of the mesh.
    """
    found = []
    for along in product(*(range(shape[dim]) for dim in dims)):
        moved = dict(zip(dims, along, strict=True))
        found.append(tuple([moved.get(dim, at) for dim, at in enumerate(here)]))
    return found


def mesh_ranks(mesh: DeviceMesh) -> tuple[int, ...]:
    """The global ranks of ``mesh``, row-major."""
    ranks = _RANKS.get(mesh)
    if ranks is None:
        ranks = _RANKS[mesh] = tuple(int(rank) for rank in mesh.mesh.flatten().tolist())
    return ranks


_IN_ORDER: WeakKeyDictionary[DeviceMesh, bool] = WeakKeyDictionary()


def group_orders(mesh: DeviceMesh) -> tuple[tuple[int, ...], ...]:
    """The global ranks of this rank's group along each dimension, in the group's order.

    Empty where the ranks rise along each dimension of ``mesh``, as on nearly all. A dimension of
    one rank, and on a mesh that this rank is no part of each dimension, has no group.
    """
    in_order = _IN_ORDER.get(mesh)
    if in_order is None:
        ranks, shape = mesh_ranks(mesh), tuple(map(int, mesh.shape))
        lines = (line for dim in range(len(shape)) for line in _lines(ranks, shape, dim))
        in_order = _IN_ORDER[mesh] = all(line == sorted(line) for line in lines)
    if in_order:
        return ()
    here = mesh.get_coordinate() is not None
    groups = [mesh.get_group(dim) if here and n > 1 else None for dim, n in enumerate(mesh.shape)]
    return tuple([tuple(dist.get_process_group_ranks(group)) if group else () for group in groups])


def shard_numbers(mesh: DeviceMesh, dims: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    """Per rank of ``mesh``, row-major, which shard it holds along each mesh dimension.

    Empty where the coordinate says it, as on all meshes that list their ranks in rising order.
    On others torch's collectives, and with them ``fully_shard`` and ``full_tensor()``, count by
    the rank in the dimension's group, whose ranks ``new_group`` sorts; ``preserve_rank_order=True``
    (torch 2.15) keeps the mesh's order. A rank knows the order of its own groups only, and takes
    the others for made the same way.

    Args:
        mesh: any, also one that this rank is no part of.
        dims: the mesh dimensions that a tensor is sharded over. Along the others the coordinate
            counts. Where two ranks would hold the same shard of several dimensions, and some shard
            none, the coordinate counts along all: there torch's ranks read different tensors.

    """
    orders = group_orders(mesh)
    if not orders:
        return ()
    keeps_order = bool(getattr(mesh, "_preserve_rank_order", False))
    shape = tuple(map(int, mesh.shape))
    return _shard_numbers(mesh_ranks(mesh), shape, tuple(dims), orders, keeps_order)


def my_shard_number(mesh: DeviceMesh, dims: Iterable[int]) -> tuple[int, ...] | None:
    """Which shard this rank holds along each mesh dimension, None where it is no part of it."""
    coordinate = my_coordinate(mesh)
    numbers = shard_numbers(mesh, dims) if coordinate is not None else ()
    return numbers[mesh_ranks(mesh).index(dist.get_rank())] if numbers else coordinate


def _lines(ranks: tuple[int, ...], shape: tuple[int, ...], dim: int) -> list[list[int]]:
    """The ranks that differ in one mesh dimension alone, in the mesh's order."""
    step = math.prod(shape[dim + 1 :])
    span = step * shape[dim]
    starts = (at + offset for at in range(0, len(ranks), span) for offset in range(step))
    return [list(ranks[start : start + span : step]) for start in starts]


@lru_cache(maxsize=256)
def _shard_numbers(
    ranks: tuple[int, ...],
    shape: tuple[int, ...],
    dims: tuple[int, ...],
    orders: tuple[tuple[int, ...], ...],
    keeps_order: bool,
) -> tuple[tuple[int, ...], ...]:
    columns = list(zip(*product(*map(range, shape)), strict=True))
    for dim in dims:
        lines, order = _lines(ranks, shape, dim), list(orders[dim])
        # A group of rising ranks does not tell in which order those of other lines are.
        as_listed = not order or order in lines
        if as_listed and (keeps_order or order != sorted(order)):
            continue
        at = {rank: number for line in lines for number, rank in enumerate(sorted(line))}
        columns[dim] = tuple(map(at.__getitem__, ranks))
    numbers = tuple(zip(*columns, strict=True))
    return numbers if len(set(numbers)) == len(ranks) else ()


def same_ranks(ours: DeviceMesh, theirs: DeviceMesh) -> bool:
    """Whether two meshes have the same ranks in the same places, whatever their names."""
    if ours is theirs or ours == theirs:
        return True
    alike = tuple(ours.shape) == tuple(theirs.shape) and ours.device_type == theirs.device_type
    return alike and mesh_ranks(ours) == mesh_ranks(theirs)


def root_of(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that a mesh was sliced from; itself where it was not."""
    # Private, and not by the same name in every torch.
    find: Any = getattr(mesh, "_get_root_mesh", None)
    root: DeviceMesh = find() if find is not None else getattr(mesh, "_root_mesh", None) or mesh
    return root
