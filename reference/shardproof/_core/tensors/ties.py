"""Which tensors of a state dict are tied: the same object, or memory that overlaps."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from itertools import repeat
from operator import add, attrgetter, le
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from shardproof._core.tensors.properties import (
    LEAF_TYPES,
    has_no_memory,
    is_ordinary,
    requires_grad_of,
)
from shardproof._core.tensors.subclasses import PLAIN, inner_tensors, is_custom

_nbytes = attrgetter("nbytes")
Span = tuple[int, int]


def parameter_tie_key(tensor: torch.Tensor) -> Hashable:
    """As :func:`tie_key`, but a Parameter and a detached view of it have different keys.

    So have two objects of which one bears attributes, as an nn.Buffer does.
    """
    kind = type(tensor)
    parameter = kind not in PLAIN and getattr(tensor, "_is_param", False)
    bears = (kind is DTensor or not is_custom(kind)) and vars(tensor).keys() - {"_is_param"}
    return tie_key(tensor), kind, parameter, requires_grad_of(tensor), id(tensor) if bears else None


def maybe_tied(leaves: list[Any]) -> Iterable[bool]:
    """For each leaf, whether the memory of another may be its own, or overlap it. False is certain.

    It asks for addresses and sizes only, a fraction of what :func:`tie_key` costs; nearly all
    leaves have memory of their own.
    """
    spans = _spans(leaves)
    if spans is None:
        return repeat(True, len(leaves))
    ordered = sorted(spans)
    starts, ends = [start for start, _ in ordered], [end for _, end in ordered]
    if len(set(starts)) == len(starts) and all(map(le, ends, starts[1:])):
        return repeat(False, len(leaves))
    tied: set[Span] = set()
    reach: Span = (-1, -1)
    for span in ordered:
        if span[0] < reach[1] or span[0] == reach[0]:
            tied.update((reach, span))
        if span[1] > reach[1] or span[0] == span[1]:
            reach = span
    return [span in tied for span in spans]


def _spans(leaves: list[Any]) -> list[Span] | None:
    """(first byte, behind the last one) of each; None where a class keeps its memory apart."""
    kinds = set(map(type, leaves))
    plain = leaves
    if DTensor in kinds:
        plain = [leaf._local_tensor if type(leaf) is DTensor else leaf for leaf in leaves]
        kinds = set(map(type, plain))
    try:
        if kinds <= PLAIN and all(map(torch.Tensor.is_contiguous, plain)):
            starts = list(map(torch.Tensor.data_ptr, plain))
            if min(starts, default=_LOW) >= _LOW or (0 not in starts and _all_have_memory(plain)):
                return list(zip(starts, map(add, starts, map(_nbytes, plain)), strict=True))
        return list(map(_span, leaves))
    except (RuntimeError, _UnknownMemory):
        # A tensor without storage, or of a kind of its own, which may share another's.
        return None


_LOW = 1 << 40
"""Where storages seldom begin. The address of a tensor in a freed one is its offset."""


def _all_have_memory(tensors: list[torch.Tensor]) -> bool:
    storages = map(torch.Tensor.untyped_storage, tensors)
    return all(map(torch.UntypedStorage.nbytes, storages))


class _UnknownMemory(Exception):  # noqa: N818  (no error: it is answered here)
    pass


def _span(leaf: Any) -> Span:
    kind = type(leaf)
    if kind is DTensor:
        leaf = leaf._local_tensor
        kind = type(leaf)
    if kind in PLAIN:
        start = leaf.data_ptr()
        if start < _LOW and not leaf.is_meta and has_no_memory(leaf):
            raise _UnknownMemory  # each is looked at then
        if not start:
            start = leaf.untyped_storage()._cdata
            return start, start
        return start, start + (leaf.nbytes if leaf.is_contiguous() else extent(leaf))
    if kind is ShardedTensor:
        spans = [_span(shard.tensor) for shard in leaf.local_shards() if shard.tensor.numel()]
        starts, ends = [start for start, _ in spans], [end for _, end in spans]
        return (min(starts), max(ends)) if spans else (id(leaf), id(leaf))
    if (kind not in LEAF_TYPES or kind is DTensor) and isinstance(leaf, torch.Tensor):
        raise _UnknownMemory
    return 0, 0


def extent(tensor: torch.Tensor) -> int:
    """From the first byte of a strided tensor that has elements to behind its last one."""
    last = sum((n - 1) * step for n, step in zip(tensor.size(), tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def geometry(tensor: torch.Tensor) -> Hashable:
    """A key that two tensors share if and only if they are the same view of the same memory.

    Valid while both are alive.
    """
    if not is_ordinary(tensor):
        if hasattr(type(tensor), "__tensor_flatten__"):
            return (type(tensor), *map(geometry, inner_tensors(tensor)))
        return id(tensor)
    return (
        tensor.untyped_storage()._cdata,
        tensor.storage_offset(),
        tensor.size(),
        tensor.stride(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )


def tie_key(tensor: torch.Tensor) -> Hashable:
    """A key that tied tensors share: the same object, or the same view of the same memory."""
    if isinstance(tensor, DTensor):
        spec = tensor._spec
        return ("DTensor", geometry(tensor._local_tensor), spec.placements, spec.shape)
    return id(tensor) if isinstance(tensor, ShardedTensor) else geometry(tensor)
