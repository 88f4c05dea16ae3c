"""Sharded -> whole: every distributed leaf of a state dict, gathered in buckets.

Leaves that differ over the same dimensions of the same ranks travel together as one byte stream.
A single destination gets the bytes alone; the other ranks only send.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from shardproof._state_dict_utils.agreement import Entries, agree_on_entries
from shardproof._state_dict_utils.containers import Path, leaf_name
from shardproof._state_dict_utils.leaves import Found, Leaf, find
from shardproof._state_dict_utils.line import (
    Agreed,
    Line,
    carried_view,
    needs_bucket,
    write,
)
from shardproof._state_dict_utils.stream import (
    Piece,
    deliver,
    elements,
)
from shardproof._state_dict_utils.tensors import (
    CPU,
    allocate,
    dress_like,
    fresh_copy,
    geometry,
)
from shardproof._state_dict_utils.traverse import copy_leaf_value, map_leaves, on_this_rank
from shardproof._state_dict_utils.wire import (
    Domain,
    group_domain,
)


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
            the default group; empty means all.
        type_check: refuse leaves that no checkpoint can hold; otherwise they are deep-copied.

    Returns:
        The same containers around plain tensors in memory of their own, without an autograd
        graph, on the device of the rank's part or on the CPU. Gathered tensors do not require
        grad; plain ones keep Parameter-ness and ``requires_grad``. Ties survive, and travel once.
        Pending reductions are carried out. Outside ``ranks_only`` ``{}``. A rank outside a
        DTensor's mesh gets that leaf as the local tensor that it has.

    Raises:
        ValueError, TypeError, KeyError, RuntimeError: the same on every rank that shares a group
            with the rank concerned; names it. Raised before any tensor travels.

    All ranks of ``pg``, and of the meshes and groups of the leaves, have to call it; the order of
    keys is free. Collectives: one per mesh dimension to agree, two where ranks differ, and
    one more per dimension where a rank belongs to several meshes; then per bucket one per
    sharded dimension, even and uneven shards in buckets apart; a tensor of a 16th of a bucket
    or more that is cut evenly along its first dimension has one of its own, and needs no bucket
    (on Gloo, which needs room for what it receives, one per half a bucket). Tensors that are
    replicated everywhere do not travel. pytorch#150928.

    """
    found = find(state_dict, pg, device, type_check)
    wanted = _destinations(ranks_only, pg, found)
    agreed = _agree(found, pg, device, cpu_offload)
    gathered = _gather(found, wanted, agreed, cpu_offload)
    if not on_this_rank(ranks_only, pg):
        return {}
    return _rebuild(state_dict, gathered, cpu_offload)


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
    found = find({"sharded_tensor": sharded_tensor}, pg, device, type_check=False)
    agreed = _agree(found, pg, device, cpu_offload=False)
    leaf = found.leaves["sharded_tensor"]
    target = device
    if target is None:
        target = leaf.layout.domain.device if leaf.layout.domain is not None else CPU
    gathered = _gather(found, None, agreed, cpu_offload=False)
    return gathered["sharded_tensor"].to(target)


def _destinations(
    ranks_only: tuple[int, ...], pg: dist.ProcessGroup | None, found: Found
) -> frozenset[int] | None:
    """The global ranks that want results; None for all."""
    if not ranks_only:
        return None
    size = dist.get_world_size(pg)
    wrong = [rank for rank in ranks_only if not 0 <= rank < size]
    if wrong:
        found.fail(ValueError(f"ranks_only has {wrong}, expected ranks of a group of {size}"))
        return None
    if pg is None:
        return frozenset(ranks_only)
    return frozenset(dist.get_global_rank(pg, rank) for rank in ranks_only)


def _agree(
    found: Found, pg: dist.ProcessGroup | None, device: torch.device | None, cpu_offload: bool
) -> Agreed:
    domains = found.domains
    if pg is not None and dist.get_rank(pg) >= 0:
        whole = group_domain(pg, device)
        # The group hears of everything, so a mesh inside it need not be asked again.
        inside = set(whole.members)
        domains = [d for d in domains if not inside.issuperset(d.members)]
        domains = sorted([*domains, whole], key=lambda domain: domain.key)
    limited = any(leaf.layout.large and needs_bucket(leaf, cpu_offload) for leaf in found)
    failure, details, flagged = agree_on_entries(domains, found.entries(), found.failure, limited)
    if failure is not None:
        raise failure.error()
    return Agreed(details, flagged)


def _tie_classes(found: Found, details: Mapping[Domain, Sequence[Entries]]) -> dict[str, str]:
    """Path -> the first path that is tied to it, the same on every rank.

    A rank whose part of a tensor is empty cannot tell whether it is tied, so the others decide.
    """
    own = found.entries()
    first: dict[Hashable, str] = {}
    classes: dict[str, str] = {}
    for path, entry in own.items():
        ties: list[str | None] = [entry.tie]
        for told in details.values():
            ties += [e[path].tie for e in told if path in e and e[path].members == entry.members]
        if all(tie is None for tie in ties):
            classes[path] = path
            continue
        key = (entry.summary, entry.members, tuple(ties))
        classes[path] = first.setdefault(key, path)
    return classes


def _gather(
    found: Found,
    wanted: frozenset[int] | None,
    agreed: Agreed,
    cpu_offload: bool,
) -> dict[str, torch.Tensor]:
    """Path -> the whole tensor, for the leaves that this rank wants."""
    classes = _tie_classes(found, agreed.details)
    here = wanted is None or dist.get_rank() in wanted
    results: dict[str, torch.Tensor] = {}
    streams: dict[Any, list[Leaf]] = defaultdict(list)
    keys: dict[int, Hashable] = {}
    for path, first in classes.items():
        if first != path:
            continue
        leaf = found.leaves[path]
        layout = leaf.layout
        if layout.domain is not None and layout.dims and not layout.meta:
            key = keys.get(id(layout))
            if key is None:
                key = keys[id(layout)] = layout.stream
            streams[key].append(leaf)
        if here:
            results[path] = _result_for(leaf, cpu_offload)
    for key in sorted(streams):
        Line(streams[key], wanted, agreed).gather(results)
    return {path: results[first] for path, first in classes.items()} if here else {}


def _result_for(leaf: Leaf, cpu_offload: bool) -> torch.Tensor:
    """The tensor that takes the values; already filled where nothing has to travel."""
    tensor, layout = leaf.tensor, leaf.layout
    if isinstance(tensor, DTensor):
        target = CPU if cpu_offload else tensor._local_tensor.device
        if layout.domain is None or (not layout.dims and not layout.meta):
            return fresh_copy(tensor._local_tensor, target)
    else:
        target = leaf.local[0].device if leaf.local and not cpu_offload else CPU
    full = allocate(layout.shape, layout.dtype, target, layout.stride)
    if not layout.dims and layout.domain is not None and not layout.meta:
        writer = partial(write, carried_view(full))
        for block, part in zip(layout.here, leaf.local, strict=True):
            if block.numel:
                data = torch.cat(elements(part, 0, block.numel))
                deliver(data, block, Piece(0, 0, 0, block.numel, 0, 0), writer)
    return full


def _rebuild(
    state_dict: Any, gathered: Mapping[str, torch.Tensor], cpu_offload: bool
) -> dict[str, Any]:
    """The containers of the state dict around the results; plain leaves are copied."""
    copied: dict[Hashable, torch.Tensor] = {}
    dressed: dict[Hashable, torch.Tensor] = {}

    def leaf(path: Path, value: Any, _: Any) -> Any:
        if isinstance(value, (DTensor, ShardedTensor)):
            return gathered[leaf_name(path)]
        if not isinstance(value, torch.Tensor):
            return copy_leaf_value(value)
        key = geometry(value)
        if key not in copied:
            copied[key] = fresh_copy(value, CPU if cpu_offload else value.device)
        dress = (key, type(value), value.requires_grad)
        if dress not in dressed:
            dressed[dress] = dress_like(copied[key].detach(), value)
        return dressed[dress]

    result: dict[str, Any] = map_leaves(state_dict, leaf)
    return result
