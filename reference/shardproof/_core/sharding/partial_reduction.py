"""Pending reductions of a ``Partial`` placement, carried out on gathered contributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch

_FOLDS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}
_OF_BITS = frozenset({"band", "bor", "bxor"})
_OF_ORDER = frozenset({"min", "max"})
_UNSIGNED = frozenset({torch.uint16, torch.uint32, torch.uint64})
_LOW = (1 << 32) - 1


def reduce_partials(parts: Sequence[torch.Tensor], ops: Sequence[str], count: int) -> torch.Tensor:
    """Reduce contributions that were made over one or more mesh dimensions.

    Sums and products of integers wrap as torch's do. An average of integers is that of the exact
    sum, rounded towards zero; one of booleans is true where all are.

    Args:
        parts: 1-D contributions of one dtype, in row-major order of the dimensions.
        ops: the reduction of each dimension; all the same.
        count: how many contributions there are.

    """
    op, dtype = ops[0], parts[0].dtype
    wide = _wide(dtype)
    if op == "avg" and not (wide.is_floating_point or wide.is_complex):
        return _integer_average(parts, count)
    values = [part.to(wide) for part in parts]
    flips = dtype is torch.uint64 and op in _OF_ORDER
    if flips:
        # As signed numbers in the same order.
        values = [value ^ _SIGN for value in values]
    total = reduce(_FOLDS[op], values)
    if op == "avg":
        total = total / count
    return (total ^ _SIGN if flips else total).to(dtype)


def _integer_average(parts: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """The average of the exact sum, which no integer dtype may hold: by halves of 32 bits."""
    dtype = parts[0].dtype
    high = low = torch.zeros_like(parts[0], dtype=torch.int64)
    for part in parts:
        value = part.to(torch.int64)
        upper = value >> 32
        high = high + (upper & _LOW if dtype is torch.uint64 else upper)
        low = low + (value & _LOW)
    quotient, rest = high // count, high % count
    lower = (rest << 32) + low
    average = (quotient << 32) + lower // count
    # Rounded down so far.
    up = (high + (low >> 32) < 0) & (lower % count != 0)
    return (average + up).to(dtype)


def check_reductions(ops: Sequence[str], dtype: torch.dtype) -> None:
    """Refuse what :func:`reduce_partials` cannot do.

    Raises:
        ValueError: names the reductions.

    """
    unknown = [op for op in ops if op not in _FOLDS]
    if unknown:
        raise ValueError(f"unknown reduction {unknown[0]!r}")
    if len(set(ops)) > 1:
        raise ValueError(f"reductions {list(ops)} over several dimensions have no defined order")
    fraction = dtype.is_floating_point or dtype.is_complex
    if (fraction and not _OF_BITS.isdisjoint(ops)) or (
        dtype.is_complex and not _OF_ORDER.isdisjoint(ops)
    ):
        raise ValueError(f"reduction {ops[0]!r} is not defined for {dtype}")


_SIGN = -(1 << 63)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """A dtype in which torch computes and no smaller one loses anything until the end."""
    if dtype is torch.complex32:
        return torch.complex64
    if dtype.is_floating_point:
        return torch.float32 if dtype.itemsize < 4 else dtype
    # Sums of unsigned integers wrap the same way in int64.
    return torch.int64 if dtype in _UNSIGNED else dtype
