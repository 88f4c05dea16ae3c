"""Copies between tensor leaves: whether one can take the values of the other, and the copy."""

from __future__ import annotations

from operator import attrgetter, eq, is_
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from shardproof._core.sharding.ranks import same_ranks
from shardproof._core.tensors.pinned_copy import copy_across_devices
from shardproof._core.tensors.properties import (
    dtype_of,
    expanded_dims,
    kind_of,
    local_parts,
    shape_of,
    unwritable,
)
from shardproof._core.tensors.subclasses import PLAIN, is_custom, wait_for_pending
from shardproof._core.tensors.values import MOVABLE, put

_SHARDED = frozenset({DTensor})
_STRIDED = frozenset({torch.strided})


class CannotTakeError(Exception):
    """The class of a target has no copy from its source; ``args``: its index, the reason."""


class LeafCopies:
    """Copies between tensor leaves, made once all of them were found to fit."""

    def __init__(self) -> None:
        self._takers: list[Any] = []
        self._targets: list[Any] = []
        self._sources: list[Any] = []
        self._slow: list[int] = []
        """The indices of those that take more than a copy between two tensors' memory."""

    def add_all(self, takers: list[Any], sources: list[Any]) -> bool:
        """:meth:`add` for usual leaves that all fit. Where it is False nothing was noted.

        Asked of all at once a question costs a fraction of what it costs pair by pair.
        """
        memory = all_matching(takers, sources)
        if memory is None:
            return False
        targets, local = memory
        self._takers += takers
        self._targets += targets
        self._sources += local
        return True

    def add(self, taker: Any, source: Any) -> str | None:
        """Note that ``taker`` takes the values of a tensor. Why it cannot, None where it can."""
        # An odd one among them leaves the others as fast as they are.
        if self.add_all([taker], [source]):
            return None
        if reason := difference(source, taker) or _unwritable_from(taker, source):
            return f"{reason} in the companion"
        if without_data(source) != without_data(taker):
            bare = "the companion" if without_data(taker) else "the state dict"
            return f"{bare} has a tensor on meta, without data"
        self._slow.append(len(self._takers))
        self._takers.append(taker)
        self._targets.append(taker)
        self._sources.append(source)
        return None

    def copy(self, non_blocking: bool) -> None:
        """Copy. Of several sources for one taker the last wins, as if copied one by one.

        Raises:
            CannotTakeError: the class of a target or source has no such copy. Those are asked
                first, so that nothing else was copied.

        """
        targets, sources = self._targets, self._sources
        # As torch.no_grad does: for a few small tensors its object costs as much as the copy.
        recording = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            if self._slow or len(set(map(id, self._takers))) < len(self._takers):
                last = {id(taker): index for index, taker in enumerate(self._takers)}
                slow = set(self._slow)
                for index in sorted(
                    slow.intersection(last.values()), key=self._copies_without_class
                ):
                    if targets[index] is sources[index]:
                        continue
                    try:
                        copy_leaf(targets[index], sources[index], non_blocking)
                    except Exception as error:
                        message = f"{type(error).__name__}: {error}"
                        raise CannotTakeError(index, message) from error
                fast = [index for index in last.values() if index not in slow]
                targets = [targets[index] for index in fast]
                sources = [sources[index] for index in fast]
            copy_across_devices(targets, sources, non_blocking)
        finally:
            torch._C._set_grad_enabled(recording)

    def _copies_without_class(self, index: int) -> bool:
        """Whether no class of its own has a say in a copy."""
        return not (_by_class(self._targets[index]) or _by_class(self._sources[index]))


def _by_class(leaf: Any) -> bool:
    memory: Any = leaf._local_tensor if isinstance(leaf, DTensor) else leaf
    kind: type = type(memory)
    return is_custom(kind) and not isinstance(memory, ShardedTensor)


def matching(target: Any, source: Any) -> bool:
    """Whether two leaves are of the usual kind and agree: then their memory is all to copy.

    One question where :func:`difference`, :func:`unwritable` and :func:`without_data` are many:
    what it grants, these grant too.
    """
    return all_matching([target], [source]) is not None


_spec, _local = attrgetter("_spec"), attrgetter("_local_tensor")
_placements, _meta, _mesh = attrgetter("placements"), attrgetter("tensor_meta"), attrgetter("mesh")
_shape, _dtype, _layout = attrgetter("shape"), attrgetter("dtype"), attrgetter("layout")
_is_meta = attrgetter("is_meta")


def all_matching(
    targets: list[Any], sources: list[Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
    """The memory of leaves that all are :func:`matching`, each with the other in its place.

    None where one of them is not.
    """
    kinds = set(map(type, targets)), set(map(type, sources))
    if not (kinds[0] <= PLAIN and kinds[1] <= PLAIN):
        if kinds[0] == kinds[1] == _SHARDED:
            ours, theirs = list(map(_spec, targets)), list(map(_spec, sources))
            targets, sources = list(map(_local, targets)), list(map(_local, sources))
        else:
            at = [index for index, target in enumerate(targets) if type(target) is DTensor]
            if at != [index for index, source in enumerate(sources) if type(source) is DTensor]:
                return None
            ours, theirs = [targets[p]._spec for p in at], [sources[p]._spec for p in at]
            targets, sources = targets.copy(), sources.copy()
            for index in at:
                targets[index] = targets[index]._local_tensor
                sources[index] = sources[index]._local_tensor
        if not _all_laid_out_alike(ours, theirs):
            return None
        if not (PLAIN.issuperset(map(type, targets)) and PLAIN.issuperset(map(type, sources))):
            return None
    dtypes = list(map(_dtype, targets))
    if (
        MOVABLE.issuperset(dtypes)
        and dtypes == list(map(_dtype, sources))
        and all(map(eq, map(_shape, targets), map(_shape, sources)))
        and _STRIDED.issuperset(map(_layout, targets))
        and _STRIDED.issuperset(map(_layout, sources))
        and all(map(torch.Tensor.is_contiguous, targets))
        and not any(map(_is_meta, targets))
        and not any(map(_is_meta, sources))
    ):
        return targets, sources
    return None


def _all_laid_out_alike(ours: list[DTensorSpec], theirs: list[DTensorSpec]) -> bool:
    return all(map(is_, ours, theirs)) or (
        list(map(_placements, ours)) == list(map(_placements, theirs))
        and list(map(_meta, ours)) == list(map(_meta, theirs))
        and all(map(same_ranks, map(_mesh, ours), map(_mesh, theirs)))
    )


def without_data(tensor: torch.Tensor) -> bool:
    """Whether a tensor leaf is on meta, in whole or in part."""
    return any(part.is_meta for part in local_parts(tensor))


def difference(ours: Any, theirs: Any) -> str | None:
    """Why values cannot be copied between the two leaves, None where they can."""
    if type(ours) is not type(theirs) and kind_of(ours) != kind_of(theirs):
        if not isinstance(ours, torch.Tensor) and not isinstance(theirs, torch.Tensor):
            return None
        return f"expected a {kind_of(ours)}, got {kind_of(theirs)}"
    if not isinstance(ours, torch.Tensor):
        return None
    if shape_of(ours) != shape_of(theirs):
        return f"expected shape {shape_of(ours)}, got {shape_of(theirs)}"
    if dtype_of(ours) != dtype_of(theirs) and not _by_class(theirs):
        return f"expected dtype {dtype_of(ours)}, got {dtype_of(theirs)}"
    if isinstance(ours, ShardedTensor):
        held, given = _shard_boxes(ours), _shard_boxes(theirs)
        if held != given:
            return f"expected shards (offsets, sizes) {held}, got {given}"
        return None
    if isinstance(ours, DTensor):
        if ours._spec is not theirs._spec and (tuple(ours.placements) != tuple(theirs.placements)):
            return f"expected placements {ours.placements}, got {theirs.placements}"
        if not same_ranks(ours.device_mesh, theirs.device_mesh):
            return f"expected mesh {ours.device_mesh}, got {theirs.device_mesh}"
        ours, theirs = ours._local_tensor, theirs._local_tensor
        if ours.size() != theirs.size():
            return f"expected local shape {tuple(ours.size())}, got {tuple(theirs.size())}"
        if ours.dtype != theirs.dtype and not _by_class(theirs):
            return f"expected local dtype {ours.dtype}, got {theirs.dtype}"
    ours, theirs = wait_for_pending(ours), wait_for_pending(theirs)
    if ours.layout is not theirs.layout:
        return f"expected layout {ours.layout}, got {theirs.layout}"
    return None


def copy_leaf(target: Any, source: Any, non_blocking: bool = False) -> None:
    """Write a tensor leaf into another that :func:`difference` found equal to it."""
    for ours, theirs in zip(local_parts(target), local_parts(source), strict=True):
        held, values = wait_for_pending(ours), wait_for_pending(theirs)
        for dim in expanded_dims(held):
            held, values = held.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
        put(held, values, non_blocking)


def _unwritable_from(target: Any, source: Any) -> str | None:
    """Why the target cannot take values; one that is expanded can from one expanded alike."""
    parts = zip(local_parts(target), local_parts(source), strict=True)
    if all({*expanded_dims(ours)} <= {*expanded_dims(theirs)} for ours, theirs in parts):
        return None
    return unwritable(target)


def _shard_boxes(tensor: ShardedTensor) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [
        (tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes))
        for shard in tensor.local_shards()
    ]
