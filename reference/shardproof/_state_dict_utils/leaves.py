"""The distributed leaves of a state dict: found, checked on this rank, and described to others."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardproof._state_dict_utils import stream
from shardproof._state_dict_utils.agreement import Columns, Failure
from shardproof._state_dict_utils.containers import LEAF_TYPES, leaf_name
from shardproof._state_dict_utils.grid import Grid, grid_of, line_of
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
from shardproof._state_dict_utils.tensors import (
    CPU,
    dtype_of,
    is_row_major,
    local_of,
    settled,
    shape_of,
    tie_key,
)
from shardproof._state_dict_utils.traverse import check_leaf_types
from shardproof._state_dict_utils.walk import Walk
from shardproof._state_dict_utils.wire import Domain, group_domain, mesh_domain


@dataclass(slots=True, eq=False)
class Layout:
    """How tensors are spread over ranks. Leaves of one call that are spread alike share it.

    Attributes:
        domain: the ranks that share the tensors; None where this rank is none of them.
        members: the global ranks that have to know of them.
        shape: the global shape.
        dtype: of the elements.
        stride: the global strides where they are not row-major.
        device: of what this rank holds.
        summary: all of it in words.
        dims: the domain's dimensions over which the data differs.
        reductions: dimension -> pending reduction.
        cuts: how a DTensor is sharded; None for a ShardedTensor.
        shards: (global rank, block) of each shard of a ShardedTensor.
        here: what this rank holds.
        nbytes: of a whole tensor.
        held: whether this rank holds any element.

    """

    domain: Domain | None
    members: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...] | None
    device: torch.device
    summary: str
    nbytes: int
    dims: tuple[int, ...] = ()
    reductions: dict[int, str] = field(default_factory=dict)
    cuts: tuple[Cut, ...] | None = None
    shards: list[tuple[int, Block]] = field(default_factory=list)
    here: list[Block] = field(default_factory=list)
    held: bool = False

    def line(
        self, coordinates: tuple[tuple[int, ...], ...]
    ) -> tuple[list[list[Block]], Grid | None]:
        """What the members at these coordinates hold, and the grid that this makes, if any."""
        assert self.domain is not None
        if self.cuts is not None:
            return line_of(self.shape, self.domain.shape, self.cuts, coordinates)
        ranks = [self.domain.members[c[0]] for c in coordinates]
        held = [[block for rank, block in self.shards if rank == r] for r in ranks]
        return held, grid_of(self.shape, held)

    @property
    def meta(self) -> bool:
        """Whether the tensors have no data."""
        return self.device.type == "meta"

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
        known: dict[Layout, int] = {}
        numbers: list[int] = []
        for leaf in leaves:
            layout = leaf.layout
            number = known.get(layout)
            if number is None:
                number = kinds.setdefault((layout.summary, layout.members), len(kinds))
                known[layout] = number
            numbers.append(number)
        ties: list[str | None] = list(paths)
        if not (all(layout.held for layout in known) and _apart(leaves)):
            first: dict[Hashable, str] = {}
            for place, leaf in enumerate(leaves):
                key = tie_key(leaf.tensor) if leaf.layout.held else None
                ties[place] = None if key is None else first.setdefault(key, leaf.path)
        return Columns(paths, list(kinds), numbers, ties)


def _apart(leaves: Sequence[Leaf]) -> bool:
    """Whether no two leaves are tied, by their addresses alone; False says nothing."""
    addresses: set[int] = set()
    for leaf in leaves:
        if type(leaf.tensor) is not DTensor or type(leaf.local[0]) is not torch.Tensor:
            return False
        addresses.add(leaf.local[0].data_ptr())
    return len(addresses) == len(leaves)


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
            if isinstance(value, DTensor):
                spec, local = value._spec, value._local_tensor
                if type(local) is not torch.Tensor or local.requires_grad:
                    local = local_of(value)
                # Meshes by identity: that two are equal costs more to find than a second layout.
                key: Hashable = (
                    *(id(spec.mesh), spec.placements, spec.tensor_meta),
                    getattr(spec, "shard_order", None),
                    *(local.shape, local.dtype, local.device),
                )
                layout = layouts.get(key)
                if layout is None:
                    layout = layouts[key] = _checked(_layout_of(value, domains), [local])
                parts = [local] if layout.domain is not None else []
            else:
                layout = _layout_of(value, domains)
                parts = _shards_of(value, layout) if layout.domain is not None else []
                _checked(layout, parts)
            found.leaves[name] = Leaf(name, value, layout, parts)
        except (ValueError, RuntimeError) as error:
            found.fail(type(error)(f"{name!r}: {error}"))
    found.domains = domains.in_order()
    return found


_NOT_DISTRIBUTED = LEAF_TYPES - {DTensor, ShardedTensor}


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


def _device_of(tensor: DTensor | ShardedTensor) -> torch.device:
    if isinstance(tensor, DTensor):
        return tensor._local_tensor.device
    return next((shard.tensor.device for shard in tensor.local_shards()), CPU)


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


class _Spread(NamedTuple):
    """How a DTensor is laid out on its mesh, whatever its memory.

    Attributes:
        stride: the global strides where they are not row-major.
        summary: in words.
        nbytes: of the whole tensor.
        cuts: how it is sharded.
        reductions: mesh dimension -> pending reduction.
        dims: the mesh dimensions over which the data differs.

    """

    stride: tuple[int, ...] | None
    summary: str
    nbytes: int
    cuts: tuple[Cut, ...]
    reductions: dict[int, str]
    dims: tuple[int, ...]


# Weak: a mesh holds process groups.
_SPREADS: WeakKeyDictionary[DeviceMesh, dict[Hashable, _Spread]] = WeakKeyDictionary()


def _spread_of(tensor: DTensor) -> _Spread:
    """Models have few layouts, and checkpoints ask for the same again and again."""
    spec, dtype = tensor._spec, tensor.dtype
    known = _SPREADS.get(spec.mesh)
    if known is None:
        known = _SPREADS[spec.mesh] = {}
    # The types, too: a kind of partial of its own may equal the plain one.
    kinds = tuple(map(type, spec.placements))
    order = getattr(spec, "shard_order", None)
    key = spec.placements, kinds, spec.tensor_meta, order, dtype, is_meta(tensor)
    found = known.get(key)
    if found is not None:
        return found
    shape, sizes = tuple(spec.shape), tuple(spec.mesh.shape)
    stride: tuple[int, ...] | None = tuple(spec.stride)
    if is_row_major(shape, spec.stride):
        stride = None
    reductions = {d: op for d, op in partial_dims(spec.placements).items() if sizes[d] > 1}
    check_reductions(list(reductions.values()))
    cuts = cuts_of(spec)
    split = {cut.mesh_dim for cut in cuts if sizes[cut.mesh_dim] > 1} | set(reductions)
    nbytes = math.prod(shape) * dtype.itemsize
    found = _Spread(stride, summary(tensor), nbytes, cuts, reductions, tuple(sorted(split)))
    known[key] = found
    return found


def _layout_of(tensor: DTensor | ShardedTensor, domains: _Domains) -> Layout:
    domain = domains.of(tensor)
    device, shape, dtype = _device_of(tensor), shape_of(tensor), dtype_of(tensor)
    if isinstance(tensor, DTensor):
        if domain is None:
            # This rank takes no part, and a placement that it does not know is not its matter.
            ranks = mesh_ranks(tensor.device_mesh)
            return Layout(None, ranks, shape, dtype, None, device, summary(tensor), 0)
        stride, words, nbytes, cuts, reductions, dims = _spread_of(tensor)
        layout = Layout(domain, domain.members, shape, dtype, stride, device, words, nbytes)
        layout.dims, layout.reductions, layout.cuts = dims, reductions, cuts
        layout.here = [block_at(shape, domain.shape, cuts, domain.here)]
    else:
        members = () if domain is None else domain.members
        nbytes = math.prod(shape) * dtype.itemsize
        layout = Layout(domain, members, shape, dtype, None, device, summary(tensor), nbytes)
        if domain is None:
            return layout
        layout.shards = _shards(tensor)
        strangers = sorted({rank for rank, _ in layout.shards} - set(members))
        if strangers:
            raise ValueError(f"shards on global ranks {strangers}, expected {members}")
        layout.dims = (0,) if len(members) > 1 else ()
        mine = members[domain.here[0]]
        layout.here = [block for rank, block in layout.shards if rank == mine]
    layout.held = any(block.numel for block in layout.here)
    return layout


def _shards_of(tensor: ShardedTensor, layout: Layout) -> list[torch.Tensor]:
    """This rank's parts, detached, in the order of its blocks."""
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


def _checked(layout: Layout, parts: Sequence[torch.Tensor]) -> Layout:
    """Refuse parts of another shape or dtype than the layout says."""
    if layout.domain is None:
        return layout
    for part, block in zip(parts, layout.here, strict=True):
        if part.shape != block.shape:
            raise ValueError(
                f"local shape {tuple(part.shape)} on this rank, expected {block.shape}"
            )
        if part.dtype != layout.dtype:
            raise ValueError(f"local dtype {part.dtype} on this rank, expected {layout.dtype}")
    return layout
