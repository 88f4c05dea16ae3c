"""The gather itself: tied leaves once, leaves that are sharded alike together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from shardproof._core.comms.agreement import Failure, agree_on_failure, raise_failure
from shardproof._core.comms.collectives import backend_of
from shardproof._core.gathering.leaf_entries import Agreement, Entries, entries_of
from shardproof._core.gathering.local_copies import LocalCopies
from shardproof._core.gathering.mesh_gather import MeshGather, result_device
from shardproof._core.gathering.sharded_leaves import FoundLeaves, ShardedLeaf
from shardproof._core.sharding.domain import Domain
from shardproof._core.tensors.subclasses import unwrap_pending


def _tied_paths(found: FoundLeaves, details: Mapping[Domain, Sequence[Entries]]) -> dict[str, str]:
    """Path -> the first path that is tied to it, another one; the same on every rank.

    A rank whose part of a tensor is empty cannot tell whether it is tied, so the others decide.
    """
    columns = found.columns
    if not details and all(
        tie is None or tie == path for path, tie in zip(columns.paths, columns.ties, strict=True)
    ):
        return {}
    first: dict[Hashable, str] = {}
    tied: dict[str, str] = {}
    for path, entry in entries_of(columns).items():
        ties: list[str | None] = [entry.tie]
        for entries in details.values() if entry.peers else ():
            ties += [e[path].tie for e in entries if path in e and e[path].members == entry.members]
        if any(tie is not None for tie in ties):
            key = (entry.summary, entry.members, tuple(ties))
            leader = first.setdefault(key, path)
            if leader != path:
                tied[path] = leader
    return tied


def gather_whole_tensors(
    found: FoundLeaves,
    destinations: frozenset[int] | None,
    agreed: Agreement,
    copies: LocalCopies,
) -> dict[str, torch.Tensor]:
    """Path -> the whole tensor, for the leaves that this rank wants."""
    tied = _tied_paths(found, agreed.details)
    columns = found.columns
    kinds: list[list[ShardedLeaf]] = [[] for _ in columns.kinds]
    for path, number in zip(columns.paths, columns.numbers, strict=True):
        if path not in tied:
            kinds[number].append(found.leaves[path])
    here = destinations is None or dist.get_rank() in destinations
    cpu_offload = copies.cpu_offload
    results: dict[str, torch.Tensor] = {}
    staying: list[ShardedLeaf] = []
    wrapped: list[ShardedLeaf] = []
    by_bucket_key: dict[Any, list[list[ShardedLeaf]]] = defaultdict(list)
    for kind in kinds:
        layout = kind[0].layout
        if layout.travels:
            if layout.by_class is not None:
                wrapped += kind
            else:
                by_bucket_key[layout.bucket_key].append(kind)
        elif here:
            staying += kind
    results.update(copies.of(staying))
    for key in sorted(by_bucket_key):
        MeshGather(by_bucket_key[key], destinations, agreed, cpu_offload).gather(results)
    failure = None
    for leaf in sorted(wrapped, key=attrgetter("path")):
        if destinations is None or not destinations.isdisjoint(leaf.layout.members):
            try:
                results[leaf.path] = _gather_by_class(leaf, cpu_offload)
            except Exception as error:
                # Other ranks may wait in what comes next: all hear of it when it is through.
                message = f"{leaf.path!r}, {leaf.layout.summary}: {type(error).__name__}: {error}"
                failure = failure or Failure("RuntimeError", message)
    raise_failure(agree_on_failure(agreed.by_class, failure))
    if not here:
        return {}
    results.update({path: results[leader] for path, leader in tied.items()})
    return results


def _gather_by_class(leaf: ShardedLeaf, cpu_offload: bool) -> torch.Tensor:
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
    full = unwrap_pending(leaf.tensor.redistribute(placements=placements).to_local())
    to = result_device(leaf.layout, cpu_offload)
    return full if full.device == to else full.to(to)
