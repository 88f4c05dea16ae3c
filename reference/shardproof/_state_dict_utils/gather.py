"""From a sharded state dict to a whole one, gathered in buckets.

Leaves that differ over the same dimensions of the same ranks travel together as one byte stream.
A single destination gets the bytes alone; the other ranks only send.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from shardproof._core.gathering.agree_on_leaves import agree_on_leaves
from shardproof._core.gathering.destinations import find_destinations
from shardproof._core.gathering.local_copies import LocalCopies
from shardproof._core.gathering.sharded_leaves import find_sharded_leaves
from shardproof._core.gathering.simulated import gather_simulated
from shardproof._core.gathering.whole_tensors import gather_whole_tensors
from shardproof._core.sharding.simulated_ranks import simulates_ranks
from shardproof._core.tensors.inference_mode import outside_inference_mode


@outside_inference_mode
@torch.no_grad()
def _gather_state_dict(
    state_dict: dict[str, Any],
    *,
    pg: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
    cpu_offload: bool = False,
    ranks_only: tuple[int, ...] = (),
    type_check: bool = True,
) -> dict[str, Any]:
    """Make every sharded leaf whole.

    Args:
        state_dict: nested containers of leaves of any dtype and layout. Not changed.
        pg: the group over which the ranks agree and ShardedTensors are gathered; without it each
            uses the group of its own. A DTensor is always gathered over its mesh.
        device: where the bytes of ShardedTensors travel from, for groups with several backends.
        cpu_offload: results in CPU memory.
        ranks_only: the ranks that want the result, in the numbering of ``pg`` or, without it, of
            the default group; empty means all. Where every leaf is on other ranks, on a mesh that
            is no slice of one with a taker, the mesh's first rank takes them: nobody else could.
        type_check: refuse leaves that no checkpoint can hold; otherwise they are deep-copied.

    Returns:
        The same containers around plain tensors in memory of their own, without an autograd
        graph, on the device of the rank's part or on the CPU. Gathered tensors do not require
        grad; plain ones keep Parameter-ness and ``requires_grad``. Ties survive, and travel once.
        Pending reductions are carried out. Shards are put together as ``full_tensor()`` does, by
        the number of their rank in the group of each mesh dimension. Outside ``ranks_only`` ``{}``.
        A rank outside a DTensor's mesh gets that leaf as the local tensor that it has.

    Raises:
        ValueError, TypeError, KeyError, RuntimeError: the same on every rank that shares a group
            with the rank concerned; names it. Raised before any tensor travels.

    All ranks of ``pg``, and of the meshes and groups of the leaves, have to call it; the order of
    keys is free. Collectives: one per mesh dimension to agree, two where ranks differ, and where a
    rank belongs to several meshes one more per dimension for each mesh that lies between two ranks,
    since errors are heard of from mesh to mesh; then per bucket one per sharded dimension, even and
    uneven shards in buckets apart; a tensor of a 16th of a bucket or more that is cut evenly along
    its first dimension has one of its own, and needs no bucket (on Gloo, which needs room for what
    it receives, one per half a bucket). Tensors that are replicated everywhere do not travel. What
    wraps other tensors (``__tensor_flatten__``) is
    gathered by its own operations, each such DTensor for itself. pytorch#150928.

    """
    if simulates_ranks():
        return gather_simulated(state_dict, pg, cpu_offload, ranks_only, type_check)
    found = find_sharded_leaves(state_dict, pg, device, type_check)
    destinations = find_destinations(ranks_only, pg, found)
    agreed = agree_on_leaves(found, pg, device, cpu_offload)
    copies = LocalCopies(found, cpu_offload)
    gathered = gather_whole_tensors(found, destinations, agreed, copies)
    if destinations is not None and dist.get_rank() not in destinations:
        return found.walk.nothing()
    return copies.rebuild_around(gathered)


@outside_inference_mode
@torch.no_grad()
def _all_gather_sharded_tensor(
    sharded_tensor: ShardedTensor,
    pg: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Gather one ShardedTensor on every rank of its group.

    Args:
        sharded_tensor: any sharding: chunks in any rank order and dimension, several shards on a
            rank or none, empty and uneven ones.
        pg: the group; without it the tensor's own.
        device: where the bytes travel and the result is; without it the group's device.

    Returns:
        The full tensor, detached, in memory of its own.

    Raises:
        ValueError: the same on every rank of the group: metadata differ between ranks, a shard is
            on a rank outside the group, or is not where the metadata say.

    All ranks of the group have to call it. Collectives: one to agree, one per bucket.
    pytorch#150928.

    """
    found = find_sharded_leaves({"sharded_tensor": sharded_tensor}, pg, device, type_check=False)
    agreed = agree_on_leaves(found, pg, device, cpu_offload=False)
    leaf = found.leaves["sharded_tensor"]
    assert leaf.layout.domain is not None
    target = leaf.layout.domain.device if device is None else device
    gathered = gather_whole_tensors(found, None, agreed, LocalCopies(found, cpu_offload=False))
    return gathered["sharded_tensor"].to(target)
