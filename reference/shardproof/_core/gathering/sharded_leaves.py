"""The sharded leaves of a state dict: found, checked on this rank, described to other ranks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardproof._core.comms.agreement import Failure
from shardproof._core.containers.leaf_values import check_leaf_types
from shardproof._core.containers.walk import Walk
from shardproof._core.gathering.leaf_entries import Columns
from shardproof._core.sharding.domain import Domain, group_domain, mesh_domain
from shardproof._core.sharding.ranks import my_coordinate
from shardproof._core.sharding.table_shards import joined
from shardproof._core.sharding.tensor_layout import TensorLayout, layout_of
from shardproof._core.tensors.properties import LEAF_TYPES, local_of, wrapper_of
from shardproof._core.tensors.subclasses import (
    has_own_operations,
    is_table,
    memory_of,
    wait_for_pending,
)
from shardproof._core.tensors.ties import tie_key


@dataclass(slots=True)
class ShardedLeaf:
    """One distributed tensor as this rank sees it.

    Attributes:
        path: where it is first met.
        tensor: the DTensor or ShardedTensor.
        layout: how it is spread.
        local: this rank's parts, detached, in the order of its blocks.

    """

    path: str
    tensor: torch.Tensor
    layout: TensorLayout
    local: list[torch.Tensor]


class FoundLeaves:
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
        self.leaves: dict[str, ShardedLeaf] = {}
        self.domains: list[Domain] = []
        self.failure: Failure | None = None

    def note_failure(self, error: Exception, name: str | None = None) -> None:
        """Remember the first error: it is raised only after all ranks know of it."""
        if self.failure is None:
            failure = Failure.of(error)
            if name is not None:
                failure = Failure(failure.kind, f"{name!r}: {failure.message}")
            self.failure = failure

    @cached_property
    def columns(self) -> Columns:
        """What this rank tells the others of its distributed leaves."""
        paths = sorted(self.leaves)
        leaves = list(map(self.leaves.__getitem__, paths))
        kinds: dict[tuple[str, tuple[int, ...], tuple[int, ...]], int] = {}
        known: dict[TensorLayout, int] = {}
        numbers: list[int] = []
        for leaf in leaves:
            layout = leaf.layout
            number = known.get(layout)
            if number is None:
                number = kinds.setdefault(
                    (layout.summary, layout.members, layout.peers), len(kinds)
                )
                known[layout] = number
            numbers.append(number)
        ties: list[str | None] = list(paths)
        if not (all(layout.held for layout in known) and _have_own_memory(leaves)):
            first: dict[Hashable, str] = {}
            for index, leaf in enumerate(leaves):
                key = tie_key(leaf.tensor) if leaf.layout.held else None
                ties[index] = None if key is None else first.setdefault(key, leaf.path)
        others = [name for name in self.names if name not in self.leaves]
        return Columns(paths, list(kinds), numbers, ties, others)


def _have_own_memory(leaves: Sequence[ShardedLeaf]) -> bool:
    """Whether no two leaves are tied, by their addresses alone; False says nothing."""
    addresses: set[int] = set()
    for leaf in leaves:
        if type(leaf.tensor) is not DTensor or len(leaf.local) != 1:
            return False
        if type(leaf.local[0]) is not torch.Tensor:
            return False
        addresses.add(leaf.local[0].data_ptr())
    return len(addresses) == len(leaves)


def find_sharded_leaves(
    state_dict: Any,
    pg: dist.ProcessGroup | None,
    device: torch.device | None,
    type_check: bool,
) -> FoundLeaves:
    """Find the distributed leaves of a state dict. Raises nothing, communicates nothing."""
    found = FoundLeaves()
    found.walk = Walk(state_dict, refuse=found.note_failure)
    found.names = found.walk.names()
    if type_check:
        try:
            check_leaf_types(found.walk)
        except ValueError as error:
            found.note_failure(error)
    domains = _Domains(pg, device)
    layouts: dict[Hashable, TensorLayout] = {}
    for name, value in zip(found.names, found.walk.leaves, strict=True):
        if type(value) in _NOT_DISTRIBUTED or not isinstance(value, (DTensor, ShardedTensor)):
            continue
        try:
            if isinstance(value, DTensor):
                spec, local, wrapper = value._spec, value._local_tensor, None
                if type(local) is not torch.Tensor or local.requires_grad:
                    local = memory_of(local_of(value))
                    wrapper = wrapper_of(local)
                # Meshes by identity: that two are equal costs more to find than a second layout.
                key: Hashable = (
                    *(id(spec.mesh), spec.placements, spec.tensor_meta),
                    getattr(spec, "shard_order", None),
                    *(local.shape, local.dtype, local.device, wrapper),
                )
                known = layouts.get(key)
                layout = layout_of(value, domains.of(value)) if known is None else known
                parts = [local] if layout.domain is not None else []
                if wrapper is not None and is_table(wrapper):
                    # What stays on its rank may lie there whole, and on the others nothing.
                    parts = []
                    if layout.domain is not None and layout.cuts:
                        parts = [joined(local, layout.local_blocks[0], layout.dtype)]
                        _validate_parts(layout, parts)
                elif known is None:
                    layouts[key] = _validate_parts(layout, [local])
                    if wrapper is not None and layout.travels:
                        _check_padding(value, local)
            else:
                layout = layout_of(value, domains.of(value))
                parts = _shards_of(value, layout)
                _validate_parts(layout, parts)
            found.leaves[name] = ShardedLeaf(name, value, layout, parts)
        except Exception as error:
            # Whatever it is, the others hear of it: they are about to wait for this rank.
            found.note_failure(error, name)
    found.domains = domains.in_order()
    return found


def _check_padding(tensor: DTensor, local: torch.Tensor) -> None:
    """Try what a gather of uneven shards by their class asks of some ranks alone.

    A rank that found out only then would leave the others waiting.
    """
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        dim = getattr(placement, "dim", None)
        if dim is not None and tensor.size(dim) % size:
            torch.nn.functional.pad(local, [0, 0] * (tensor.dim() - 1 - dim) + [0, 1])


_NOT_DISTRIBUTED = LEAF_TYPES - {DTensor, ShardedTensor}


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


def _shards_of(tensor: ShardedTensor, layout: TensorLayout) -> list[torch.Tensor]:
    """This rank's parts, detached, in the order of its blocks."""
    held = {
        (tuple(s.metadata.shard_offsets), tuple(s.metadata.shard_sizes)): s.tensor
        for s in tensor.local_shards()
    }
    parts: list[torch.Tensor] = []
    for block in layout.local_blocks:
        part = held.get((block.starts or (), block.shape))
        if part is None:
            raise ValueError(f"the metadata has a shard at {block.starts} that is not here")
        part = memory_of(wait_for_pending(part))
        if has_own_operations(part):
            raise TypeError(f"a shard is a {type(part).__name__}, expected a plain tensor")
        parts.append(part.detach())
    return parts


def _validate_parts(layout: TensorLayout, parts: Sequence[torch.Tensor]) -> TensorLayout:
    """Refuse parts of another shape or dtype than the layout says."""
    if layout.domain is None:
        return layout
    for part, block in zip(parts, layout.local_blocks, strict=True):
        if part.shape != block.shape:
            raise ValueError(
                f"local shape {tuple(part.shape)} on this rank, expected {block.shape}"
            )
        if part.dtype != layout.dtype:
            raise ValueError(f"local dtype {part.dtype} on this rank, expected {layout.dtype}")
    return layout
