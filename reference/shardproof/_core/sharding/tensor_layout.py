"""How a DTensor or ShardedTensor is sharded over ranks, and a summary to compare between ranks."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharding_spec._internals import (
    check_tensor,
    validate_non_overlapping_shards_metadata,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardproof._core import limits
from shardproof._core.sharding.blocks import (
    Block,
    Cut,
    block_at,
    box_block,
    cuts_of,
    partial_dims,
    split_dims,
)
from shardproof._core.sharding.domain import Domain
from shardproof._core.sharding.partial_reduction import check_reductions
from shardproof._core.sharding.ranks import mesh_ranks, shard_numbers
from shardproof._core.sharding.uniform_grid import UniformGrid, blocks_and_grid_at, grid_of
from shardproof._core.tensors.properties import CPU, dtype_of, is_row_major, shape_of, wrapper_of
from shardproof._core.tensors.subclasses import is_table, shards_of, wait_for_pending


@dataclass(slots=True, eq=False)
class TensorLayout:
    """How tensors are sharded over ranks. Leaves of one call that are sharded alike share it.

    Attributes:
        domain: the ranks that share the tensors; None where this rank is none of them.
        members: the global ranks that have to know of them.
        shape: the global shape.
        dtype: of the elements.
        stride: the global strides where they are not row-major.
        device: of this rank's local shards.
        summary: all of it in words.
        dims: the domain's dimensions over which the data differs.
        reductions: dimension -> pending reduction.
        cuts: how a DTensor is sharded; None for a ShardedTensor.
        numbers: which shard each member holds, where its coordinate does not say it.
        shards: (global rank, block) of each shard of a ShardedTensor.
        local_blocks: the blocks that this rank holds.
        nbytes: of a whole tensor.
        held: whether this rank holds any element.
        by_class: the class whose own operations gather it: that of this rank's local tensor, or a
            subclass of Partial.

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
    numbers: tuple[tuple[int, ...], ...] = ()
    shards: list[tuple[int, Block]] = field(default_factory=list)
    local_blocks: list[Block] = field(default_factory=list)
    held: bool = False
    by_class: type | None = None

    def blocks_and_grid(
        self, coordinates: tuple[tuple[int, ...], ...]
    ) -> tuple[list[list[Block]], UniformGrid | None]:
        """What the members at these coordinates hold, and the grid that this makes, if any."""
        assert self.domain is not None
        if self.cuts is not None:
            numbers = self.shard_numbers(coordinates)
            return blocks_and_grid_at(self.shape, self.domain.shape, self.cuts, numbers)
        ranks = [self.domain.members[c[0]] for c in coordinates]
        held = [[block for rank, block in self.shards if rank == r] for r in ranks]
        return held, grid_of(self.shape, held)

    def shard_numbers(
        self, coordinates: tuple[tuple[int, ...], ...]
    ) -> tuple[tuple[int, ...], ...]:
        """Which shards the members at these coordinates hold, along each mesh dimension."""
        if not self.numbers:
            return coordinates
        assert self.domain is not None
        return tuple([self.numbers[self.domain.position(c)] for c in coordinates])

    @property
    def meta(self) -> bool:
        """Whether the tensors have no data."""
        return self.device.type == "meta"

    @property
    def travels(self) -> bool:
        """Whether a rank needs what others hold."""
        return self.domain is not None and bool(self.dims) and not self.meta

    @property
    def peers(self) -> tuple[int, ...]:
        """The global ranks whose parts make up what this rank wants; none where nothing travels."""
        domain = self.domain
        return () if domain is None or not self.travels else domain.along(self.dims)

    @property
    def large(self) -> bool:
        """Whether such a tensor is worth collectives of its own."""
        return self.nbytes >= limits.alone_bytes()

    @property
    def bucket_key(self) -> Hashable:
        """Equal for leaves that travel together, and sorted the same way on every rank."""
        assert self.domain is not None
        return self.domain.key, self.dims, tuple(sorted(self.reductions.items())), self.numbers


def summary(tensor: DTensor | ShardedTensor) -> str:
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
    else:
        shards = [
            (tuple(m.shard_offsets), tuple(m.shard_sizes), m.placement and m.placement.rank())
            for m in tensor.metadata().shards_metadata
        ]
        text = f"a ShardedTensor {head}, shards (offsets, sizes, rank) {shards}"
    return text + (", on meta" if is_meta(tensor) else "")


def is_meta(tensor: DTensor | ShardedTensor) -> bool:
    """Whether a DTensor has no data."""
    if isinstance(tensor, ShardedTensor):
        return False
    local = tensor._local_tensor
    return local.is_meta and not (is_table(type(local)) and not shards_of(local))


def _device_of(tensor: DTensor | ShardedTensor) -> torch.device:
    if isinstance(tensor, DTensor):
        local = tensor._local_tensor
        if is_table(type(local)) and not shards_of(local):
            return torch.device(tensor.device_mesh.device_type)
        return local.device
    return next((shard.tensor.device for shard in tensor.local_shards()), CPU)


def _shards(tensor: ShardedTensor) -> list[tuple[int, Block]]:
    """(global rank, block) of each shard, in the metadata's order."""
    found: list[tuple[int, Block]] = []
    for meta in tensor.metadata().shards_metadata:
        rank = None if meta.placement is None else meta.placement.rank()
        if rank is None:
            raise ValueError(f"the shard at {meta.shard_offsets} names no rank: {meta.placement}")
        found.append((int(rank), box_block(meta.shard_offsets, meta.shard_sizes)))
    return found


def _check_tiling(tensor: ShardedTensor) -> None:
    """Refuse shards that overlap, leave gaps, or leave the tensor.

    What no shard holds would come out as whatever is in memory.
    """
    size = shape_of(tensor)
    shards = tensor.metadata().shards_metadata
    held = [shard for shard in shards if math.prod(shard.shard_sizes)]
    if any(o < 0 for shard in held for o in shard.shard_offsets):
        raise ValueError(f"a shard begins before the tensor: {held}")
    validate_non_overlapping_shards_metadata(held)
    if held or 0 not in size:
        check_tensor(held or shards, size)


# Weak: a mesh holds process groups.
_MESH_LAYOUTS: WeakKeyDictionary[DeviceMesh, dict[Hashable, TensorLayout]] = WeakKeyDictionary()


def _mesh_layout_of(tensor: DTensor) -> TensorLayout:
    """The layout of a DTensor but for what depends on this rank: its domain, device and blocks.

    Models have few layouts, and checkpoints ask for the same again and again.
    """
    spec, dtype = tensor._spec, dtype_of(tensor)
    known = _MESH_LAYOUTS.setdefault(spec.mesh, {})
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
    pending = {d: op for d, op in partial_dims(spec.placements).items() if sizes[d] > 1}
    reductions = {d: op for d, op in pending.items() if isinstance(op, str)}
    partial = next((op for op in pending.values() if isinstance(op, type)), None)
    if partial is None:
        check_reductions(list(reductions.values()), dtype)
    cuts = cuts_of(spec)
    split = {cut.mesh_dim for cut in cuts if sizes[cut.mesh_dim] > 1} | set(pending)
    nbytes, dims = math.prod(shape) * dtype.itemsize, tuple(sorted(split))
    words, numbers = summary(tensor), shard_numbers(spec.mesh, split_dims(cuts, sizes))
    if numbers:  # known of this rank's own groups: others may have made theirs otherwise
        words += f", which hold the shards {numbers}"
    found = TensorLayout(None, mesh_ranks(spec.mesh), shape, dtype, stride, CPU, words, nbytes)
    found.dims, found.reductions, found.cuts, found.numbers = dims, reductions, cuts, numbers
    found.by_class = partial
    known[key] = found
    return found


def layout_of(tensor: DTensor | ShardedTensor, domain: Domain | None) -> TensorLayout:
    """The layout of a tensor that the ranks of ``domain`` share; None where this is none of them.

    Raises:
        ValueError: a placement or a shard that cannot be gathered, or shards of other ranks alone.

    """
    device, shape, dtype = _device_of(tensor), shape_of(tensor), dtype_of(tensor)
    if isinstance(tensor, DTensor):
        if domain is None:
            # This rank takes no part, and a placement that it does not know is not its matter.
            ranks = mesh_ranks(tensor.device_mesh)
            return TensorLayout(None, ranks, shape, dtype, None, device, summary(tensor), 0)
        layout = replace(_mesh_layout_of(tensor), domain=domain, device=device)
        (at,) = layout.shard_numbers((domain.my_coordinate,))
        assert layout.cuts is not None
        layout.local_blocks = [block_at(shape, domain.shape, layout.cuts, at)]
        wrapper = wrapper_of(wait_for_pending(tensor._local_tensor))
        if wrapper is not None and not is_table(wrapper):
            layout.summary += f", over {wrapper.__name__}"
            layout.by_class = wrapper
    else:
        if domain is None:  # nothing of it is here
            raise ValueError("this rank is outside the group that gathers the ShardedTensor")
        members = domain.members
        nbytes = math.prod(shape) * dtype.itemsize
        layout = TensorLayout(domain, members, shape, dtype, None, device, summary(tensor), nbytes)
        layout.shards = _shards(tensor)
        _check_tiling(tensor)
        strangers = sorted({rank for rank, _ in layout.shards} - set(members))
        if strangers:
            raise ValueError(f"shards on global ranks {strangers}, expected {members}")
        layout.dims = (0,) if len(members) > 1 else ()
        mine = members[domain.my_coordinate[0]]
        layout.local_blocks = [block for rank, block in layout.shards if rank == mine]
    layout.held = any(block.numel for block in layout.local_blocks)
    return layout
