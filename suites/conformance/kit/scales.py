"""Many tensors, and sizes around thresholds that an implementation may have.

Thresholds are powers of two of bytes. Tensors of bytes meet each exactly, one below and one above.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from conformance.kit.functions import Leaves

_KINDS = ["rows", "replica", "plain", "columns"]


def _cycle(count: int, dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
    """That many numbers, neighbours different, in a cycle of 251."""
    once = ((torch.arange(251) * 7 + salt) % 251).to(dtype)
    return once.repeat(count // 251 + 1)[:count]


def _alike() -> Leaves:
    """Hundreds of one layout."""
    return {f"layer.{n}": ("rows", torch.arange(12.0).view(4, 3) + n) for n in range(600)}


def _distinct() -> Leaves:
    """Hundreds, no two of a shape."""
    return {
        f"layer.{n}": (
            _KINDS[n % 4],
            torch.arange(n + 1.0).repeat(3).view(3, n + 1),
        )
        for n in range(300)
    }


def _thresholds() -> Leaves:
    """Each power of two from 1 KiB to 4 MiB, a byte less and a byte more."""
    return {
        f"{_KINDS[place]} {size}": (_KINDS[place], _cycle(size, torch.uint8, place))
        for exponent in range(10, 22)
        for place, size in enumerate(((1 << exponent) - 1, 1 << exponent, (1 << exponent) + 1))
    }


def _one_large(at: int) -> Callable[[], Leaves]:
    """A tensor of 18 MiB before, between or behind small ones, by name as by place.

    Uneven, so that nothing sends it as it lies; of the widest dtype, a middling one, the narrowest:
    implementations may put wide ones first.
    """

    def make() -> Leaves:
        dtype = [torch.float64, torch.float32, torch.uint8][at]
        count = (18 << 20) // dtype.itemsize // 1023
        large = _cycle(1023 * count, dtype).view(1023, count)
        found: dict[str, tuple[str, torch.Tensor]] = {
            f"{letter}{n}": ("rows", (torch.arange(15) + n).to(kind).view(5, 3))
            for n, kind in enumerate((torch.float64, torch.float32, torch.bfloat16, torch.uint8))
            for letter in "bdf"
        }
        return dict(sorted({**found, f"{'ace'[at]}": ("rows", large)}.items()))

    return make


MANY: dict[str, Callable[[], Leaves]] = {
    "hundreds alike": _alike,
    "hundreds distinct": _distinct,
    "thresholds": _thresholds,
}
LARGE: dict[str, Callable[[], Leaves]] = {
    "a large one first": _one_large(0),
    "a large one between": _one_large(1),
    "a large one last": _one_large(2),
}
"""Name -> the leaves of a state dict."""
