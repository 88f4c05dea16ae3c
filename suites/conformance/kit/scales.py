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


def _counts() -> Leaves:
    """As many of a layout as any round may take, one more and one less."""
    counts = [2, 3, 16, 17, 32, 33, 64, 65]
    return {
        f"{count} alike, {n}": ("rows", torch.arange(2.0 * count).view(2, count) + n)
        for count in counts
        for n in range(count)
    }


def _narrow_between() -> Leaves:
    """Odd numbers of narrow elements between wide ones, so that no dtype lies where others end."""
    dtypes = [torch.bool, torch.bfloat16, torch.int32, torch.float64, torch.complex128, torch.uint8]
    return {
        f"{kind} {n} {dtype}": (kind, _cycle(rows * 3, dtype, n).view(rows, 3))
        for kind in _KINDS
        for n, rows in enumerate((1, 3, 7))
        for dtype in dtypes
    }


def _large_of_each_kind() -> Leaves:
    """Tensors that may travel as they lie, each of 4 MiB, in every way of lying."""
    kinds = [*_KINDS, "strided rows", "rows strided on one rank", "turned rows", "strided"]
    square = _cycle(1 << 20, torch.float32).view(1024, 1024)
    found: dict[str, tuple[str, torch.Tensor]] = {kind: (kind, square) for kind in kinds}
    found |= {f"{kind}, transposed": (kind, square.t()) for kind in ("rows", "plain")}
    # Not as it is sent, and so large that buckets cut it.
    images = _cycle(5 << 20, torch.float32).view(64, 8, 64, 160)
    found["channels last"] = ("rows", images.to(memory_format=torch.channels_last))
    conjugated = _cycle(1 << 19, torch.complex64).view(512, 1024)
    found["negated"] = ("negated rows", square)
    return found | {"conjugated": ("conjugated rows", conjugated * 1j)}


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
    "of each number": _counts,
    "narrow between": _narrow_between,
}
LARGE: dict[str, Callable[[], Leaves]] = {
    "a large one first": _one_large(0),
    "a large one between": _one_large(1),
    "a large one last": _one_large(2),
    "large ones of each kind": _large_of_each_kind,
}
"""Name -> the leaves of a state dict."""
