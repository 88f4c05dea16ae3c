"""Pending reductions of a ``Partial`` placement, carried out on gathered contributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def reduced(parts: Sequence[torch.Tensor], ops: Sequence[str], count: int) -> torch.Tensor:
    """Reduce contributions that were made over one or more mesh dimensions.

    Args:
        parts: 1-D contributions of one dtype, in row-major order of the dimensions.
        ops: the reduction of each dimension; all the same.
        count: how many contributions there are.

    Raises:
        ValueError: the dimensions ask for different reductions, whose order is not defined, or a
            reduction is unknown.

    """
    op = ops[0]
    wide = _wide(parts[0].dtype)
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = _FOLDS[op](total, part.to(wide))
    if op == "avg":
        exact = wide.is_floating_point or wide.is_complex
        total = total / count if exact else torch.div(total, count, rounding_mode="trunc")
    return total.to(parts[0].dtype)


def check_reductions(ops: Sequence[str]) -> None:
    """Refuse what :func:`reduced` cannot do.

    Raises:
        ValueError: names the reductions.

    """
    unknown = [op for op in ops if op not in _FOLDS]
    if unknown:
        raise ValueError(f"unknown reduction {unknown[0]!r}")
    if len(set(ops)) > 1:
        raise ValueError(f"reductions {list(ops)} over several dimensions have no defined order")


def _wide(dtype: torch.dtype) -> torch.dtype:
    """A dtype in which torch computes and no smaller one loses anything until the end."""
    if dtype is torch.complex32:
        return torch.complex64
    if dtype.is_floating_point:
        return torch.float32 if dtype.itemsize < 4 else dtype
    # Sums of unsigned integers wrap the same way in int64.
    if dtype in (torch.uint16, torch.uint32, torch.uint64):
        return torch.int64
    return dtype
