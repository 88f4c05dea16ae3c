"""DTensor's own collectives for tensors of any dtype, which may travel as the bits that they are.

A backend may refuse a dtype (Gloo: unsigned and 16-bit integers, 8-bit floats), and torch may lack
a kernel that splits or concatenates it. Neither happens to a common dtype of the same width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.distributed.tensor import DTensor

from shardproof._core.sharding.dtensors import dtensor, spec_of_dtype
from shardproof._core.tensors.properties import is_ordinary
from shardproof._core.tensors.subclasses import settled, settled_result
from shardproof._core.tensors.values import bits

__all__ = ["moved"]

_MOVABLE = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)
_CARRIERS = {1: torch.uint8, 2: torch.float16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> a dtype of that width that every backend moves."""


def moved(tensor: DTensor, move: Callable[[DTensor], torch.Tensor]) -> torch.Tensor:
    """What ``move`` gives of a DTensor, finished, of the dtype that the DTensor has.

    All ranks of its mesh have to call it. A pending reduction is left to the dtype itself.
    """
    local = settled(tensor._local_tensor)
    carrier = _CARRIERS.get(local.dtype.itemsize)
    if (
        local.dtype in _MOVABLE
        or carrier is None
        or not is_ordinary(local)
        or any(placement.is_partial() for placement in tensor._spec.placements)
    ):
        return settled_result(move(tensor))
    carried = dtensor(bits(local).view(carrier), spec_of_dtype(tensor._spec, carrier))
    return settled_result(move(carried)).view(local.dtype)
