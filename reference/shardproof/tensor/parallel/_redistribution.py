"""Redistribution of DTensors of any dtype, as bits where a backend refuses the dtype.

A backend may refuse a dtype (Gloo: unsigned and 16-bit integers, 8-bit floats), and torch may lack
a kernel that splits or concatenates it. Neither happens to a common dtype of the same width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.distributed.tensor import DTensor

from shardproof._core.sharding.dtensors import build_dtensor, spec_with_dtype
from shardproof._core.tensors.properties import is_ordinary
from shardproof._core.tensors.subclasses import unwrap_pending, wait_for_pending
from shardproof._core.tensors.values import MOVABLE, bits

__all__ = ["move_by_dtensor"]

# Gloo refuses 16-bit integers.
_MOVABLE = MOVABLE - {torch.int16}
_CARRIERS = {1: torch.uint8, 2: torch.float16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> a dtype of that width that every backend moves."""


def move_by_dtensor(tensor: DTensor, move: Callable[[DTensor], torch.Tensor]) -> torch.Tensor:
    """What ``move`` gives of a DTensor, finished, of the dtype that the DTensor has.

    All ranks of its mesh have to call it. A pending reduction is left to the dtype itself.
    """
    local = wait_for_pending(tensor._local_tensor)
    carrier_dtype = _CARRIERS.get(local.dtype.itemsize)
    if (
        local.dtype in _MOVABLE
        or carrier_dtype is None
        or not is_ordinary(local)
        or any(placement.is_partial() for placement in tensor._spec.placements)
    ):
        return unwrap_pending(move(tensor))
    as_bits = build_dtensor(
        bits(local).view(carrier_dtype), spec_with_dtype(tensor._spec, carrier_dtype)
    )
    return unwrap_pending(move(as_bits)).view(local.dtype)
