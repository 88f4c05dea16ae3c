"""Sharded -> whole: every distributed leaf of a state dict, gathered in buckets.

Leaves that differ over the same dimensions of the same ranks travel together as one byte stream.
A single destination gets the bytes alone; the other ranks only send.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor, Replicate

from shardproof._core.comms.agreement import (
    Agreed,
    Entries,
    Failure,
    agree_on_entries,
    agree_on_failure,
    entries_of,
)
from shardproof._core.comms.collectives import Domain, backend_of, group_domain
from shardproof._core.gathering.local_copies import LocalCopies
from shardproof._core.gathering.mesh_gather import Line, needs_bucket, result_device
from shardproof._core.gathering.sharded_leaves import Found, Leaf, find
from shardproof._core.loading.simulated import gather_simulated, simulates_ranks
from shardproof._core.sharding.blocks import mesh_ranks, root_of
from shardproof._core.tensors.subclasses import settled_result


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
        Pending reductions are carried out. Outside ``ranks_only`` ``{}``. A rank outside a
        DTensor's mesh gets that leaf as the local tensor that it has.

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
    found = find(state_dict, pg, device, type_check)
    wanted = _destinations(ranks_only, pg, found)
    agreed = _agree(found, pg, device, cpu_offload)
    copies = LocalCopies(found, cpu_offload)
    gathered = _gather(found, wanted, agreed, copies)
    if wanted is not None and dist.get_rank() not in wanted:
        return {}
    return copies.around(gathered)


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
    assert leaf.layout.domain is not None
    target = leaf.layout.domain.device if device is None else device
    gathered = _gather(found, None, agreed, LocalCopies(found, cpu_offload=False))
    return gathered["sharded_tensor"].to(target)


def _destinations(
    ranks_only: tuple[int, ...], pg: dist.ProcessGroup | None, found: Found
) -> frozenset[int] | None:
    """The global ranks that want results; None for all."""
    if not ranks_only:
        return None
    size = dist.get_world_size(pg)
    takers = [rank for rank in ranks_only if 0 <= rank < size]
    if not takers:
        found.fail(ValueError(f"ranks_only is {ranks_only}, expected ranks of a group of {size}"))
        return None
    if pg is not None:
        takers = [dist.get_global_rank(pg, rank) for rank in takers]
    leaves = list(found.leaves.values())
    lost = [leaf for leaf in leaves if _is_lost(leaf, takers)]
    first = {leaf.layout.members[0] for leaf in lost}
    if lost and len(lost) == len(leaves) and len(first) == 1:
        # A model that lies on other ranks: the caller means the first of these.
        return frozenset(first)
    if lost:
        leaf = lost[0]
        found.fail(
            ValueError(
                f"{leaf.path!r} is on ranks {leaf.layout.members}, and none of them gets a result: "
                f"the takers are ranks {takers} (ranks_only={ranks_only}); expected a taker that "
                "holds a part, or pg, the group whose own ranks ranks_only counts"
            )
        )
    return frozenset(takers)


def _is_lost(leaf: Leaf, takers: Sequence[int]) -> bool:
    """Whether nobody who could know of a leaf gets it.

    Where its mesh is a slice of one that has a taker, that one may hold the like: a replica.
    """
    if leaf.layout.domain is None or not set(takers).isdisjoint(leaf.layout.members):
        return False
    if isinstance(leaf.tensor, DTensor):
        return set(takers).isdisjoint(mesh_ranks(root_of(leaf.tensor.device_mesh)))
    return True


def _agree(
    found: Found, pg: dist.ProcessGroup | None, device: torch.device | None, cpu_offload: bool
) -> Agreed:
    domains = _widest(found.domains)
    if pg is not None and dist.get_rank(pg) >= 0:
        whole = group_domain(pg, device)
        # The group hears of everything, so a mesh inside it need not be asked again.
        inside = set(whole.members)
        domains = [d for d in domains if not inside.issuperset(d.members)]
        domains = sorted([*domains, whole], key=lambda domain: domain.key)
    layouts = dict.fromkeys(map(attrgetter("layout"), found.leaves.values()))
    large = {layout for layout in layouts if layout.large and layout.travels}
    own_way = any(layout.own_way is not None and layout.travels for layout in layouts)
    limited = bool(large) and any(
        leaf.layout in large and needs_bucket(leaf, cpu_offload) for leaf in found.leaves.values()
    )
    agreed = agree_on_entries(domains, found.columns(), found.failure, limited, own_way)
    if agreed.failure is not None:
        raise agreed.failure.error()
    return agreed


def _widest(domains: Sequence[Domain]) -> list[Domain]:
    """The domains to agree in: none whose ranks are all in another, which hears of everything.

    Where a rank has one more than the others, on a mesh that is wrong, it would ask there alone.
    """
    chosen: dict[frozenset[int], Domain] = {}
    for domain in sorted(domains, key=_plainest):
        ranks = frozenset(domain.members)
        if not any(ranks <= others for others in chosen):
            chosen[ranks] = domain
    return sorted(chosen.values(), key=attrgetter("key"))


def _plainest(domain: Domain) -> tuple[Any, ...]:
    unsorted = domain.members != tuple(sorted(domain.members))
    return -len(domain.members), len(domain.shape), unsorted, domain.key


def _tied(found: Found, details: Mapping[Domain, Sequence[Entries]]) -> dict[str, str]:
    """Path -> the first path that is tied to it, another one; the same on every rank.

    A rank whose part of a tensor is empty cannot tell whether it is tied, so the others decide.
    """
    columns = found.columns()
    if not details and all(
        tie is None or tie == path for path, tie in zip(columns.paths, columns.ties, strict=True)
    ):
        return {}
    first: dict[Hashable, str] = {}
    tied: dict[str, str] = {}
    for path, entry in entries_of(columns).items():
        ties: list[str | None] = [entry.tie]
        for told in details.values() if entry.peers else ():
            ties += [e[path].tie for e in told if path in e and e[path].members == entry.members]
        if any(tie is not None for tie in ties):
            key = (entry.summary, entry.members, tuple(ties))
            leader = first.setdefault(key, path)
            if leader != path:
                tied[path] = leader
    return tied


def _gather(
    found: Found,
    wanted: frozenset[int] | None,
    agreed: Agreed,
    copies: LocalCopies,
) -> dict[str, torch.Tensor]:
    """Path -> the whole tensor, for the leaves that this rank wants."""
    tied = _tied(found, agreed.details)
    columns = found.columns()
    kinds: list[list[Leaf]] = [[] for _ in columns.kinds]
    for path, number in zip(columns.paths, columns.numbers, strict=True):
        if path not in tied:
            kinds[number].append(found.leaves[path])
    here = wanted is None or dist.get_rank() in wanted
    cpu_offload = copies.cpu_offload
    results: dict[str, torch.Tensor] = {}
    staying: list[Leaf] = []
    wrapped: list[Leaf] = []
    streams: dict[Any, list[list[Leaf]]] = defaultdict(list)
    for kind in kinds:
        layout = kind[0].layout
        if layout.travels:
            if layout.own_way is not None:
                wrapped += kind
            else:
                streams[layout.stream].append(kind)
        elif here:
            staying += kind
    results.update(copies.of(staying))
    for key in sorted(streams):
        Line(streams[key], wanted, agreed, cpu_offload).gather(results)
    failure = None
    for leaf in sorted(wrapped, key=attrgetter("path")):
        if wanted is None or not wanted.isdisjoint(leaf.layout.members):
            try:
                results[leaf.path] = _by_its_own_operations(leaf, cpu_offload)
            except Exception as error:
                # Other ranks may wait in what comes next: all hear of it when it is through.
                said = f"{leaf.path!r}, {leaf.layout.summary}: {type(error).__name__}: {error}"
                failure = failure or Failure("RuntimeError", said)
    failure = agree_on_failure(agreed.own_way, failure)
    if failure is not None:
        raise failure.error()
    if not here:
        return {}
    results.update({path: results[leader] for path, leader in tied.items()})
    return results


def _by_its_own_operations(leaf: Leaf, cpu_offload: bool) -> torch.Tensor:
    """The whole tensor of a DTensor, gathered as the class of what it holds or of its partial does.

    What a wrapper holds differs in shape and number from its elements, and a norm is no sum.
    """
    assert isinstance(leaf.tensor, DTensor)
    device = leaf.tensor._local_tensor.device
    groups = leaf.tensor.device_mesh.get_all_groups()
    if device.type != "cpu" and any(backend_of(g, device) == "gloo" for g in groups):
        # Not reached on a CPU: elsewhere the process would end, pytorch#152645.
        raise NotImplementedError(f"Gloo cannot gather it on {device.type}")
    # What full_tensor() does besides asks for one operation more, a view.
    placements = [Replicate()] * leaf.tensor.device_mesh.ndim
    full = settled_result(leaf.tensor.redistribute(placements=placements).to_local())
    to = result_device(leaf.layout, cpu_offload)
    return full if full.device == to else full.to(to)
