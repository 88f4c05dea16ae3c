"""The copies that a gather makes on this rank alone, where no other rank holds a part."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from shardproof._core.containers.leaf_values import copy_leaf_value
from shardproof._core.gathering.mesh_gather import carrier_view, result_device, result_for
from shardproof._core.gathering.sharded_leaves import FoundLeaves, ShardedLeaf
from shardproof._core.tensors import pinned_copy
from shardproof._core.tensors.overlapping_copies import OverlappingCopies
from shardproof._core.tensors.properties import CPU, local_of
from shardproof._core.tensors.subclasses import PLAIN, is_custom, is_table
from shardproof._core.tensors.ties import maybe_tied, parameter_tie_key
from shardproof._core.tensors.values import (
    as_carrier,
    as_parameter_like,
    copy_of_any,
    fresh_copy,
)


class LocalCopies:
    """Copies the memory that this rank holds of a state dict; what overlaps goes on overlapping.

    Args:
        found: the state dict.
        cpu_offload: copies in CPU memory.

    """

    def __init__(self, found: FoundLeaves, cpu_offload: bool) -> None:
        self.cpu_offload = cpu_offload
        self._found = found
        self._overlapping: dict[torch.device, OverlappingCopies] = {}

    def of(self, leaves: Sequence[ShardedLeaf]) -> Iterator[tuple[str, torch.Tensor]]:
        """(path, whole tensor) of distributed leaves of which nothing has to travel."""
        ready = (
            pinned_copy.copy_small_together([leaf.tensor for leaf in leaves])
            if self.cpu_offload
            else {}
        )
        for index, leaf in enumerate(leaves):
            yield leaf.path, self._whole(leaf, ready.get(index))

    def _whole(self, leaf: ShardedLeaf, made: torch.Tensor | None) -> torch.Tensor:
        tensor, layout = leaf.tensor, leaf.layout
        if isinstance(tensor, DTensor) and (layout.domain is None or not layout.meta):
            if made is not None:
                return made  # Not reached on a CPU: only a GPU's tensors are copied together.
            memory = tensor._local_tensor
            if is_custom(type(memory)):
                joined = is_table(type(memory)) and leaf.local
                device = result_device(layout, self.cpu_offload)
                return fresh_copy(leaf.local[0] if joined else memory, device)
            return self._copy(local_of(tensor), id(tensor))
        full = result_for(leaf, self.cpu_offload)
        if not layout.meta:
            whole = carrier_view(full)
            for block, part in zip(layout.local_blocks, leaf.local, strict=True):
                assert block.region is not None  # shards of a ShardedTensor are rectangles
                whole[block.region].copy_(as_carrier(part))
        return full

    def rebuild_around(self, gathered: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The containers of the state dict around what was gathered, and copies of the rest."""
        found = self._found
        leaves = list(zip(found.names, found.walk.leaves, strict=True))
        ready: dict[int, torch.Tensor] = {}
        if self.cpu_offload and pinned_copy.gpu_in_use():
            # Not reached on a CPU: no tensor lies on a GPU.
            ready = pinned_copy.copy_small_together(
                [None if name in gathered else value for name, value in leaves]
            )
        finished: dict[Hashable, torch.Tensor] = {}
        shared, offload = self._shared, self.cpu_offload
        results: list[Any] = []
        for index, (name, value) in enumerate(leaves):
            if name in gathered:
                results.append(gathered[name])
            elif not isinstance(value, torch.Tensor):
                results.append(copy_leaf_value(value))
            elif id(value) in shared or (type(value) not in PLAIN and is_custom(type(value))):
                key = parameter_tie_key(value)
                if key not in finished:
                    fresh = self._copy(value, id(value))
                    finished[key] = value if fresh is value else as_parameter_like(fresh, value)
                results.append(finished[key])
            else:
                made = ready.get(index)
                if made is None:
                    made = fresh_copy(value, CPU if offload else value.device)
                results.append(as_parameter_like(made, value))
        result: dict[str, Any] = found.walk.rebuilt(results)
        return result

    def _copy(self, memory: torch.Tensor, leaf: int) -> torch.Tensor:
        to = CPU if self.cpu_offload else memory.device
        if leaf not in self._shared:
            return fresh_copy(memory, to)
        if to not in self._overlapping:
            tied = [v for v in self._found.walk.leaves if id(v) in self._shared]
            self._overlapping[to] = OverlappingCopies(tied, partial(copy_of_any, device=to))
        return self._overlapping[to].of(memory)

    @cached_property
    def _shared(self) -> frozenset[int]:
        """The ids of the leaves that may share memory with another that is copied here."""
        found = self._found
        travels = {layout: layout.travels for layout in {f.layout for f in found.leaves.values()}}
        copied = [
            value
            for name, value in zip(found.names, found.walk.leaves, strict=True)
            if isinstance(value, torch.Tensor)
            and not (name in found.leaves and travels[found.leaves[name].layout])
        ]
        tied = zip(copied, maybe_tied(copied), strict=True)
        return frozenset(id(value) for value, ask in tied if ask)
