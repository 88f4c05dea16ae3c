"""The global ranks of device meshes, this rank's coordinate, and whether it wants a result."""

from __future__ import annotations

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


def mesh_ranks(mesh: DeviceMesh) -> tuple[int, ...]:
    """The global ranks of ``mesh``, row-major."""
    ranks = _RANKS.get(mesh)
    if ranks is None:
        ranks = _RANKS[mesh] = tuple(int(rank) for rank in mesh.mesh.flatten().tolist())
    return ranks


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
