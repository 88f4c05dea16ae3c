"""The distributed leaves of a state dict: found, checked on this rank, and described to others."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from shardproof._state_dict_utils.agreement import Entries, Entry, Failure
from shardproof._state_dict_utils.containers import Path, leaf_name
from shardproof._state_dict_utils.layout import (
    Block,
    Cut,
    block_at,
    box_block,
    cuts_of,
    mesh_ranks,
    my_coordinate,
    partial_dims,
)
from shardproof._state_dict_utils.reduction import check_reductions
from shardproof._state_dict_utils.tensors import dtype_of, local_of, settled, shape_of, tie_key
from shardproof._state_dict_utils.traverse import check_leaf_type, map_leaves
from shardproof._state_dict_utils.wire import Domain, group_domain, mesh_domain


@dataclass
class Leaf:
    """One distributed tensor as this rank sees it.

    Attributes:
        path: where it is first met.
        tensor: the DTensor or ShardedTensor.
        domain: the ranks that share it; None where this rank is none of them.
        dims: the domain's dimensions over which its data differs.
        reductions: dimension -> pending reduction.
        cuts: how a DTensor is sharded.
        local: this rank's parts, detached, in the order of its blocks.

    """

    path: str
    tensor: torch.Tensor
    domain: Domain | None
    dims: tuple[int, ...] = ()
    reductions: dict[int, str] = field(default_factory=dict)
    cuts: tuple[Cut, ...] = ()
    local: list[torch.Tensor] = field(default_factory=list)

    def blocks_at(self, coordinate: Sequence[int]) -> list[Block]:
        """What the member at a coordinate of the domain holds."""
        if isinstance(self.tensor, DTensor):
            assert self.domain is not None
            shape = tuple(self.tensor._spec.shape)
            return [block_at(shape, self.domain.shape, self.cuts, tuple(coordinate))]
        assert isinstance(self.tensor, ShardedTensor)
        assert self.domain is not None
        rank = self.domain.members[coordinate[0]]
        return [block for owner, block in _shards(self.tensor) if owner == rank]


class Found:
    """What a walk over a state dict found.

    Attributes:
        leaves: path -> leaf, every path of a tied leaf included.
        domains: those of the leaves, in the order in which all ranks visit them.
        failure: the first thing that is wrong on this rank.

    """

    def __init__(self) -> None:
        self.leaves: dict[str, Leaf] = {}
        self.domains: list[Domain] = []
        self.failure: Failure | None = None
        self._entries: Entries | None = None

    def fail(self, error: Exception) -> None:
        """Remember the first error: it is raised only after all ranks were told."""
        if self.failure is None:
            self.failure = Failure.of(error)

    def entries(self) -> Entries:
        """What this rank tells the others."""
        if self._entries is None:
            self._entries = self._describe()
        return self._entries

    def _describe(self) -> Entries:
        first: dict[Hashable, str] = {}
        found: dict[str, Entry] = {}
        for path in sorted(self.leaves):
            leaf = self.leaves[path]
            tie: str | None = None
            if any(part.numel() for part in leaf.local):
                tie = first.setdefault(tie_key(leaf.tensor), path)
            members: tuple[int, ...] = ()
            if leaf.domain is not None:
                members = leaf.domain.members
            elif isinstance(leaf.tensor, DTensor):
                members = mesh_ranks(leaf.tensor.device_mesh)
            found[path] = Entry(members, summary(leaf.tensor), tie)
        return found


def find(
    state_dict: Any,
    pg: dist.ProcessGroup | None,
    device: torch.device | None,
    type_check: bool,
) -> Found:
    """Find the distributed leaves of a state dict. Raises nothing, communicates nothing."""
    found = Found()
    domains: dict[Any, Domain] = {}

    def add(path: Path, value: Any, _: Any) -> None:
        if type_check:
            try:
                check_leaf_type(path, value)
            except ValueError as error:
                found.fail(error)
        if not isinstance(value, (DTensor, ShardedTensor)):
            return
        leaf = Leaf(leaf_name(path), value, None)
        found.leaves[leaf.path] = leaf
        try:
            key, domain = _domain_of(value, pg, device, domains)
            leaf.domain = None if domain is None else domains.setdefault(key, domain)
            _examine(leaf)
        except (ValueError, RuntimeError) as error:
            found.fail(type(error)(f"{leaf.path!r}: {error}"))

    map_leaves(state_dict, add, refuse=found.fail)
    unique = {domain.key: domain for domain in domains.values()}
    found.domains = [unique[key] for key in sorted(unique)]
    for leaf in found.leaves.values():
        if leaf.domain is not None:
            leaf.domain = unique[leaf.domain.key]
    return found


def summary(tensor: torch.Tensor) -> str:
    """Kind, shape, dtype and sharding in words, equal on all ranks that share the tensor."""
    head = f"of shape {shape_of(tensor)}, {dtype_of(tensor)}"
    if isinstance(tensor, DTensor):
        mesh = tuple(tensor.device_mesh.shape)
        try:
            order = [cut.mesh_dim for cut in cuts_of(tensor._spec)]
        except ValueError:
            order = []
        cuts = "left to right" if order == sorted(order) else f"in the order {order}"
        text = f"a DTensor {head}, {tuple(tensor.placements)} on mesh {mesh}, {cuts}"
    elif isinstance(tensor, ShardedTensor):
        shards = [
            (tuple(m.shard_offsets), tuple(m.shard_sizes), m.placement and m.placement.rank())
            for m in tensor.metadata().shards_metadata
        ]
        text = f"a ShardedTensor {head}, shards (offsets, sizes, rank) {shards}"
    else:
        text = f"a tensor {head}"
    return text + (", on meta" if is_meta(tensor) else "")


def is_meta(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no data."""
    if isinstance(tensor, DTensor):
        return tensor._local_tensor.is_meta
    return not isinstance(tensor, ShardedTensor) and tensor.is_meta


def _domain_of(
    tensor: DTensor | ShardedTensor,
    pg: dist.ProcessGroup | None,
    device: torch.device | None,
    known: dict[Any, Domain],
) -> tuple[Any, Domain | None]:
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        key: Any = ("mesh", mesh)
        if key in known:
            return key, known[key]
        return key, None if my_coordinate(mesh) is None else mesh_domain(mesh)
    group = pg if pg is not None else tensor._process_group
    key = ("group", group)
    if key in known:
        return key, known[key]
    if dist.get_rank(group) < 0:
        return key, None
    return key, group_domain(group, device)


def _shards(tensor: ShardedTensor) -> list[tuple[int, Block]]:
    """(global rank, block) of each shard, in the metadata's order."""
    found: list[tuple[int, Block]] = []
    for meta in tensor.metadata().shards_metadata:
        rank = None if meta.placement is None else meta.placement.rank()
        if rank is None:
            raise ValueError(f"the shard at {meta.shard_offsets} names no rank: {meta.placement}")
        found.append((int(rank), box_block(meta.shard_offsets, meta.shard_sizes)))
    return found


def _examine(leaf: Leaf) -> None:
    """Check the leaf on this rank and fill in what the transport needs."""
    domain, tensor = leaf.domain, leaf.tensor
    if domain is None:
        return
    if isinstance(tensor, DTensor):
        spec = tensor._spec
        reductions = partial_dims(spec.placements)
        leaf.cuts = cuts_of(spec)
        split = {cut.mesh_dim for cut in leaf.cuts} | set(reductions)
        leaf.dims = tuple(d for d in sorted(split) if domain.shape[d] > 1)
        leaf.reductions = {d: op for d, op in reductions.items() if domain.shape[d] > 1}
        check_reductions(list(leaf.reductions.values()))
        leaf.local = [local_of(tensor)]
        shapes = [block.shape for block in leaf.blocks_at(domain.coordinate(domain.index()))]
    else:
        assert isinstance(tensor, ShardedTensor)
        shards = _shards(tensor)
        strangers = sorted({rank for rank, _ in shards} - set(domain.members))
        if strangers:
            raise ValueError(f"shards on global ranks {strangers}, expected {domain.members}")
        leaf.dims = (0,) if len(domain.members) > 1 else ()
        mine = [block for rank, block in shards if rank == dist.get_rank()]
        held = {
            (tuple(s.metadata.shard_offsets), tuple(s.metadata.shard_sizes)): s.tensor
            for s in tensor.local_shards()
        }
        for block in mine:
            part = held.get((block.starts or (), block.shape))
            if part is None:
                raise ValueError(f"the metadata has a shard at {block.starts} that is not here")
            leaf.local.append(settled(part).detach())
        shapes = [block.shape for block in mine]
    got = [tuple(part.shape) for part in leaf.local]
    if got != shapes:
        raise ValueError(f"local shape {got[0]} on this rank, expected {shapes[0]}")
    dtype = dtype_of(tensor)
    wrong = [part.dtype for part in leaf.local if part.dtype != dtype]
    if wrong:
        raise ValueError(f"local dtype {wrong[0]} on this rank, expected {dtype}")
