"""Bit patterns that tell: every one that a dtype has, or every exponent with telling fractions."""

from __future__ import annotations

import warnings

import torch

_SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_FRACTION = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}


def patterns(dtype: torch.dtype) -> torch.Tensor:
    """A matrix of four columns: -0.0, NaNs with payload, subnormals, extremes are among them.

    Dtypes of one byte come with all of their patterns. Of the wider ones floats have every
    exponent, with either sign and fractions of no bits, the lowest, the highest, all of them;
    integers have each bit, and what lies next to it.
    """
    if dtype is torch.bool:
        return torch.tensor([True, False, False, True] * 3).view(-1, 4)
    if dtype.is_complex:
        with warnings.catch_warnings():
            # torch says once in a process that complex32 is experimental.
            warnings.simplefilter("ignore", UserWarning)
            torch.empty(1, dtype=dtype)
        part = {4: torch.float16, 8: torch.float32, 16: torch.float64}[dtype.itemsize]
        real = patterns(part).reshape(-1)
        pairs = torch.stack([real, real.flip(0)], -1).contiguous()
        return pairs.view(torch.uint8).view(dtype).reshape(-1, 4)
    width = dtype.itemsize * 8
    if width == 8:
        return torch.arange(256, dtype=torch.uint8).view(dtype).view(-1, 4)
    if dtype in _FRACTION:
        low = _FRACTION[dtype]
        fractions = [0, 1, 1 << (low - 1), (1 << low) - 1]
        found = [
            sign << (width - 1) | exponent << low | fraction
            for sign in (0, 1)
            for exponent in range(1 << (width - 1 - low))
            for fraction in fractions
        ]
    else:
        found = [((1 << bit) + step) % (1 << width) for bit in range(width) for step in (-1, 0, 1)]
        found += [0, (1 << width) - 1, (2**24 + 1) % (1 << width), 3]
    half = 1 << (width - 1)
    signed = [number - 2 * half if number >= half else number for number in found]
    return torch.tensor(signed, dtype=_SIGNED[dtype.itemsize]).view(dtype).view(-1, 4)


def uneven(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with one row once more where their number is even."""
    raw = matrix.view(torch.uint8)
    return matrix if len(matrix) % 2 else torch.cat([raw, raw[:1]]).view(matrix.dtype)
