"""The distributed leaves of a state dict: found, checked on this rank, and described to others."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardproof._state_dict_utils import stream
from shardproof._state_dict_utils.agreement import Columns, Failure
from shardproof._state_dict_utils.containers import LEAF_TYPES, leaf_name
from shardproof._state_dict_utils.layout import (
    Block,
    block_at,
    box_block,
    cuts_of,
    mesh_ranks,
    my_coordinate,
    partial_dims,
)
from shardproof._state_dict_utils.reduction import check_reductions
from shardproof._state_dict_utils.tensors import (
    dtype_of,
    is_row_major,
    local_of,
    settled,
    shape_of,
    tie_key,
)
from shardproof._state_dict_utils.ties import maybe_tied
from shardproof._state_dict_utils.traverse import check_leaf_types
from shardproof._state_dict_utils.walk import Walk
from shardproof._state_dict_utils.wire import Domain, group_domain, mesh_domain


@dataclass(slots=True)
class Layout:
    """How tensors are spread over ranks. Leaves of one call that are spread alike share it.

    Attributes:
        domain: the ranks that share the tensors; None where this rank is none of them.
        members: the global ranks that have to know of them.
        shape: the global shape.
        dtype: of the elements.
        stride: the global strides where they are not row-major.
        meta: whether the tensors have no data.
        summary: all of it in words.
        dims: the domain's dimensions over which the data differs.
        reductions: dimension -> pending reduction.
        blocks: coordinate of the domain -> what the member there holds.
        here: what this rank holds.
        nbytes: of a whole tensor.
        held: whether this rank holds any element.

    """

    domain: Domain | None
    members: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...] | None
    meta: bool
    summary: str
    dims: tuple[int, ...] = ()
    reductions: dict[int, str] = field(default_factory=dict)
    blocks: Callable[[tuple[int, ...]], list[Block]] = field(default=lambda _: [])
    here: list[Block] = field(default_factory=list)
    nbytes: int = 0
    held: bool = False

    @property
    def large(self) -> bool:
        """Whether such a tensor is worth collectives of its own."""
        return self.nbytes >= stream.alone_bytes()

    @property
    def stream(self) -> Hashable:
        """Equal for leaves that travel together, and sorted the same way on every rank."""
        assert self.domain is not None
        return self.domain.key, self.dims, tuple(sorted(self.reductions.items()))


@dataclass(slots=True)
class Leaf:
    """One distributed tensor as this rank sees it.

    Attributes:
        path: where it is first met.
        tensor: the DTensor or ShardedTensor.
        layout: how it is spread.
        local: this rank's parts, detached, in the order of its blocks.

    """

    path: str
    tensor: torch.Tensor
    layout: Layout
    local: list[torch.Tensor]


class Found:
    """What a walk over a state dict found.

    Attributes:
        walk: over all leaves.
        names: of all leaves, in the order of the walk.
        leaves: name -> distributed leaf, every one of those that are tied included.
        domains: those of the leaves, in the order in which all ranks visit them.
        failure: the first thing that is wrong on this rank.

    """

    def __init__(self) -> None:
        self.walk: Walk
        self.names: list[str] = []
        self.leaves: dict[str, Leaf] = {}
        self.domains: list[Domain] = []
        self.failure: Failure | None = None
        self._columns: Columns | None = None

    def fail(self, error: Exception) -> None:
        """Remember the first error: it is raised only after all ranks were told."""
        if self.failure is None:
            self.failure = Failure.of(error)

    def columns(self) -> Columns:
        """What this rank tells the others of its distributed leaves."""
        if self._columns is None:
            self._columns = self._describe()
        return self._columns

    def _describe(self) -> Columns:
        paths = sorted(self.leaves)
        leaves = list(map(self.leaves.__getitem__, paths))
        kinds: dict[tuple[str, tuple[int, ...]], int] = {}
        known: dict[int, int] = {}
        numbers: list[int] = []
        for leaf in leaves:
            layout = leaf.layout
            number = known.get(id(layout))
            if number is None:
                number = kinds.setdefault((layout.summary, layout.members), len(kinds))
                known[id(layout)] = number
            numbers.append(number)
        first: dict[Hashable, str] = {}
        ties: list[str | None] = []
        tied = maybe_tied([leaf.tensor for leaf in leaves])
        for path, leaf, ask in zip(paths, leaves, tied, strict=False):
            tie: str | None = None
            if leaf.layout.held:
                tie = first.setdefault(tie_key(leaf.tensor), path) if ask else path
            ties.append(tie)
        return Columns(paths, list(kinds), numbers, ties)


def find(
    state_dict: Any,
    pg: dist.ProcessGroup | None,
    device: torch.device | None,
    type_check: bool,
) -> Found:
    """Find the distributed leaves of a state dict. Raises nothing, communicates nothing."""
    found = Found()
    found.walk = Walk(state_dict, refuse=found.fail)
    found.names = found.walk.names(leaf_name)
    if type_check:
        try:
            check_leaf_types(found.walk)
        except ValueError as error:
            found.fail(error)
    domains = _Domains(pg, device)
    layouts: dict[Hashable, Layout] = {}
    for name, value in zip(found.names, found.walk.leaves, strict=True):
        if type(value) in _NOT_DISTRIBUTED or not isinstance(value, (DTensor, ShardedTensor)):
            continue
        try:
            key: Hashable = id(value)
            if isinstance(value, DTensor):
                key = _likeness(value)
            layout = layouts.get(key)
            if layout is None:
                layout = layouts[key] = _layout_of(value, domains)
            leaf = found.leaves[name] = Leaf(name, value, layout, [])
            if layout.domain is not None:
                leaf.local = _parts(value, layout)
                _check_parts(leaf)
        except (ValueError, RuntimeError) as error:
            found.fail(type(error)(f"{name!r}: {error}"))
    found.domains = domains.in_order()
    return found


_NOT_DISTRIBUTED = LEAF_TYPES - {DTensor, ShardedTensor}


def _likeness(tensor: DTensor) -> Hashable:
    """Equal for DTensors of one layout."""
    spec, local = tensor._spec, tensor._local_tensor
    order = getattr(spec, "shard_order", None)
    # Meshes by identity: asking them whether they are equal costs more than a second layout does.
    return id(spec.mesh), spec.placements, spec.tensor_meta, order, local.dtype, local.is_meta


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


class _Domains:
    """The domains of a call, one object for each set of ranks."""

    def __init__(self, pg: dist.ProcessGroup | None, device: torch.device | None) -> None:
        self._pg, self._device = pg, device
        self._by_key: dict[Any, Domain] = {}
        self._by_mesh: dict[DeviceMesh, Domain | None] = {}

    def of(self, tensor: DTensor | ShardedTensor) -> Domain | None:
        """The ranks that share a tensor; None where this rank is none of them."""
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            if mesh not in self._by_mesh:
                domain = None if my_coordinate(mesh) is None else mesh_domain(mesh)
                self._by_mesh[mesh] = self._shared(domain)
            return self._by_mesh[mesh]
        group = self._pg if self._pg is not None else tensor._process_group
        return self._shared(None if dist.get_rank(group) < 0 else group_domain(group, self._device))

    def _shared(self, domain: Domain | None) -> Domain | None:
        return None if domain is None else self._by_key.setdefault(domain.key, domain)

    def in_order(self) -> list[Domain]:
        """Those met, in the order in which all ranks visit them."""
        return [self._by_key[key] for key in sorted(self._by_key)]


def _shards(tensor: ShardedTensor) -> list[tuple[int, Block]]:
    """(global rank, block) of each shard, in the metadata's order."""
    found: list[tuple[int, Block]] = []
    for meta in tensor.metadata().shards_metadata:
        rank = None if meta.placement is None else meta.placement.rank()
        if rank is None:
            raise ValueError(f"the shard at {meta.shard_offsets} names no rank: {meta.placement}")
        found.append((int(rank), box_block(meta.shard_offsets, meta.shard_sizes)))
    return found


def _layout_of(tensor: DTensor | ShardedTensor, domains: _Domains) -> Layout:
    domain = domains.of(tensor)
    members: tuple[int, ...] = ()
    if domain is not None:
        members = domain.members
    elif isinstance(tensor, DTensor):
        members = mesh_ranks(tensor.device_mesh)
    whole, dtype = shape_of(tensor), dtype_of(tensor)
    stride = tuple(tensor._spec.stride) if isinstance(tensor, DTensor) else None
    if stride is not None and is_row_major(whole, stride):
        stride = None
    layout = Layout(domain, members, whole, dtype, stride, is_meta(tensor), summary(tensor))
    layout.nbytes = math.prod(whole) * dtype.itemsize
    if domain is None:
        return layout
    if isinstance(tensor, DTensor):
        spec = tensor._spec
        reductions = partial_dims(spec.placements)
        cuts, shape, mesh_shape = cuts_of(spec), tuple(spec.shape), domain.shape
        split = {cut.mesh_dim for cut in cuts} | set(reductions)
        layout.dims = tuple(d for d in sorted(split) if domain.shape[d] > 1)
        layout.reductions = {d: op for d, op in reductions.items() if domain.shape[d] > 1}
        check_reductions(list(layout.reductions.values()))
        layout.blocks = lambda coordinate: [block_at(shape, mesh_shape, cuts, coordinate)]
    else:
        shards = _shards(tensor)
        ranks = domain.members
        strangers = sorted({rank for rank, _ in shards} - set(ranks))
        if strangers:
            raise ValueError(f"shards on global ranks {strangers}, expected {ranks}")
        layout.dims = (0,) if len(ranks) > 1 else ()
        layout.blocks = lambda coordinate: [
            block for rank, block in shards if rank == ranks[coordinate[0]]
        ]
    layout.here = layout.blocks(domain.here)
    layout.held = any(block.numel for block in layout.here)
    return layout


def _parts(tensor: DTensor | ShardedTensor, layout: Layout) -> list[torch.Tensor]:
    """This rank's parts, detached, in the order of its blocks."""
    if isinstance(tensor, DTensor):
        return [local_of(tensor)]
    held = {
        (tuple(s.metadata.shard_offsets), tuple(s.metadata.shard_sizes)): s.tensor
        for s in tensor.local_shards()
    }
    parts: list[torch.Tensor] = []
    for block in layout.here:
        part = held.get((block.starts or (), block.shape))
        if part is None:
            raise ValueError(f"the metadata has a shard at {block.starts} that is not here")
        parts.append(settled(part).detach())
    return parts


def _check_parts(leaf: Leaf) -> None:
    """Refuse parts of another shape or dtype than the layout says."""
    dtype = leaf.layout.dtype
    for part, block in zip(leaf.local, leaf.layout.here, strict=True):
        if part.shape != block.shape:
            raise ValueError(
                f"local shape {tuple(part.shape)} on this rank, expected {block.shape}"
            )
        if part.dtype != dtype:
            raise ValueError(f"local dtype {part.dtype} on this rank, expected {dtype}")
