"""Which tensors of a state dict are tied: the same object, or the same view of the same memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from itertools import repeat
from operator import attrgetter
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from shardproof._state_dict_utils.containers import LEAF_TYPES
from shardproof._state_dict_utils.subclasses import PLAIN
from shardproof._state_dict_utils.tensors import requires_grad_of, tie_key

_DTENSOR = frozenset({DTensor})
_local = attrgetter("_local_tensor")


def dressed_tie_key(tensor: torch.Tensor) -> Hashable:
    """As :func:`tie_key`, but a Parameter and a detached view of it are told apart."""
    return tie_key(tensor), type(tensor), requires_grad_of(tensor)


def maybe_tied(leaves: list[Any]) -> Iterable[bool]:
    """For each leaf, whether another may be tied to it. False is certain.

    It asks for addresses only, a tenth of what :func:`tie_key` costs; nearly all leaves have one
    of their own.
    """
    kinds = set(map(type, leaves))
    plain = leaves
    if kinds == _DTENSOR:
        plain = list(map(_local, leaves))
        kinds = set(map(type, plain))
    try:
        if kinds <= PLAIN:
            addresses = list(map(torch.Tensor.data_ptr, plain))
            if 0 in addresses:
                addresses = list(map(_address, leaves))
        else:
            addresses = list(map(_address, leaves))
    except (RuntimeError, _UnknownMemory):
        # A tensor without storage, or of a kind of its own, which may share another's.
        return repeat(True, len(leaves))
    if len(set(addresses)) == len(addresses):
        return repeat(False, len(leaves))
    times = Counter(addresses)
    return [times[address] > 1 for address in addresses]


class _UnknownMemory(Exception):  # noqa: N818  (no error: it is answered here)
    pass


def _address(leaf: Any) -> int:
    kind = type(leaf)
    if kind is DTensor:
        leaf = leaf._local_tensor
        kind = type(leaf)
    if kind in PLAIN:
        return leaf.data_ptr() or leaf.untyped_storage()._cdata
    if kind not in LEAF_TYPES or kind is DTensor:
        if isinstance(leaf, torch.Tensor):
            raise _UnknownMemory
        return 0
    return id(leaf) if kind is ShardedTensor else 0
