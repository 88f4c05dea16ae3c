"""Copies of tensors that share memory: the copies share memory in the same way.

A weight and its transpose, a fused projection and its parts, a table and a slice of it: each copied
by itself would take their memory twice, and no longer change with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch

from shardproof._core.tensors.properties import has_no_memory, is_lazy, is_ordinary, local_parts
from shardproof._core.tensors.subclasses import PLAIN, wait_for_pending
from shardproof._core.tensors.ties import extent, geometry
from shardproof._core.tensors.values import allocate

# Storages begin where any dtype may.
_ALIGNED = 16


class OverlappingCopies:
    """Makes a copy of each memory once.

    Args:
        leaves: those of which copies may be asked that are tied to each other. A leaf that is
            left out is copied by itself.
        make: gives a copy of a plain tensor, or new memory like it.

    """

    def __init__(self, leaves: Iterable[Any], make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._make = make
        self._made: dict[Hashable, torch.Tensor] = {}
        self._regions: dict[Hashable, tuple[int, int]] = {}
        self._bases: dict[Hashable, torch.Tensor] = {}
        self._find_regions(leaves)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The copy of a tensor that is not distributed, detached, a new object of its class."""
        key = geometry(tensor)
        if key not in self._made:
            region = self._regions.get(key)
            self._made[key] = self._make(tensor) if region is None else self._within(tensor, region)
            return _in_class_of(tensor, self._made[key])
        made = self._made[key]
        return _in_class_of(tensor, made.detach()) if is_ordinary(made) else made

    def _find_regions(self, leaves: Iterable[Any]) -> None:
        by_storage: dict[Hashable, dict[Hashable, tuple[int, int]]] = {}
        for leaf in leaves:
            for part in local_parts(leaf) if isinstance(leaf, torch.Tensor) else ():
                memory = wait_for_pending(part)
                if is_ordinary(memory) and _has_elements(memory):
                    start = int(memory.storage_offset()) * memory.element_size()
                    held = by_storage.setdefault(memory.untyped_storage()._cdata, {})
                    held[geometry(memory)] = start, start + extent(memory)
        for held in by_storage.values():
            if len(held) > 1:
                self._merge(held)

    def _merge(self, held: dict[Hashable, tuple[int, int]]) -> None:
        """Views whose extents overlap make up one region."""
        group: list[Hashable] = []
        begin = end = 0
        for key, (lo, hi) in [*sorted(held.items(), key=lambda item: item[1]), (None, (-1, -1))]:
            if group and (key is None or lo >= end):
                if len(group) > 1:
                    self._regions.update(dict.fromkeys(group, (begin, end)))
                group = []
            if not group:
                begin, end = lo // _ALIGNED * _ALIGNED, hi
            group.append(key)
            end = max(end, hi)

    def _within(self, tensor: torch.Tensor, region: tuple[int, int]) -> torch.Tensor:
        storage, (begin, end) = tensor.untyped_storage(), region
        at: Hashable = (storage._cdata, begin)
        base = self._bases.get(at)
        if base is None:
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            source.set_(storage, begin, (end - begin,), (1,))
            base = self._bases[at] = self._make(source)
        offset = tensor.storage_offset() - begin // tensor.element_size()
        made = allocate((0,), tensor.dtype, base.device)
        made.set_(base.untyped_storage(), offset, tensor.size(), tensor.stride())
        return made


def _in_class_of(tensor: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """What was made, in the class that a copy of ``tensor`` alone would have."""
    if not is_ordinary(made) or not is_ordinary(tensor):
        return made
    # Operations on a Parameter of a class of its own, for example, give plain tensors.
    kind = torch.Tensor if type(tensor) in PLAIN else type(tensor.detach())
    if type(made) is kind:
        return made
    with torch._C.DisableTorchFunctionSubclass():
        return made.as_subclass(kind)


def _has_elements(memory: torch.Tensor) -> bool:
    """Whether its bytes are its values. To look at a freed storage would allocate it again."""
    if memory.is_meta or is_lazy(memory) or not memory.numel():
        return False
    return not has_no_memory(memory)
