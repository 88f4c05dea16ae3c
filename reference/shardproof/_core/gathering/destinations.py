"""Which ranks get the result of a gather."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from shardproof._core.gathering.sharded_leaves import FoundLeaves, ShardedLeaf
from shardproof._core.sharding.ranks import mesh_ranks, root_of


def find_destinations(
    ranks_only: tuple[int, ...], pg: dist.ProcessGroup | None, found: FoundLeaves
) -> frozenset[int] | None:
    """The global ranks that want results; None for all."""
    if not ranks_only:
        return None
    size = dist.get_world_size(pg)
    takers = [rank for rank in ranks_only if 0 <= rank < size]
    if not takers:
        found.note_failure(
            ValueError(f"ranks_only is {ranks_only}, expected ranks of a group of {size}")
        )
        return None
    if pg is not None:
        takers = [dist.get_global_rank(pg, rank) for rank in takers]
    leaves = list(found.leaves.values())
    lost = [leaf for leaf in leaves if _has_no_taker(leaf, takers)]
    first = {leaf.layout.members[0] for leaf in lost}
    if lost and len(lost) == len(leaves) and len(first) == 1:
        # A model that lies on other ranks: the caller means the first of these.
        return frozenset(first)
    if lost:
        leaf = lost[0]
        found.note_failure(
            ValueError(
                f"{leaf.path!r} is on ranks {leaf.layout.members}, and none of them gets a result: "
                f"the takers are ranks {takers} (ranks_only={ranks_only}); expected a taker that "
                "holds a part, or pg, the group whose own ranks ranks_only counts"
            )
        )
    return frozenset(takers)


def _has_no_taker(leaf: ShardedLeaf, takers: Sequence[int]) -> bool:
    """Whether nobody who could know of a leaf gets it.

    Where its mesh is a slice of one that has a taker, that one may hold the like: a replica.
    """
    if leaf.layout.domain is None or not set(takers).isdisjoint(leaf.layout.members):
        return False
    if isinstance(leaf.tensor, DTensor):
        return set(takers).isdisjoint(mesh_ranks(root_of(leaf.tensor.device_mesh)))
    return True
