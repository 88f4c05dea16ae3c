"""Bit patterns that arithmetic, a detour through another dtype or a comparison would not keep.

For each dtype all patterns where these are few (8 bits), else every exponent of both signs with
mantissas of each kind: negative zeros, NaNs with payloads, quiet and signalling, infinities,
subnormals, extremes, whole numbers beyond 2^53.
"""

from __future__ import annotations

import functools
import warnings

import torch

CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> the integers that carry its bits."""
_LAYOUT = {
    torch.float16: (5, 10),
    torch.bfloat16: (8, 7),
    torch.float32: (8, 23),
    torch.float64: (11, 52),
}
"""Dtype -> bits of the exponent, and of the mantissa."""
_PART = {
    torch.complex32: torch.float16,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}


def patterns(dtype: torch.dtype, columns: int) -> torch.Tensor:
    """A new tensor (rows divisible by 8, columns) of them."""
    return _patterns(dtype, columns).clone()


@functools.cache
def _patterns(dtype: torch.dtype, columns: int) -> torch.Tensor:
    if dtype in _PART:
        real = patterns(_PART[dtype], 1).view(-1)
        turned = real.view(CARRIERS[real.itemsize]).flip(0).view(real.dtype)
        with warnings.catch_warnings():
            # torch says once in a process that complex32 is experimental.
            warnings.simplefilter("ignore", UserWarning)
            torch.empty(1, dtype=dtype)
        return _rows(torch.stack([real, turned], 1).view(-1).view(dtype), columns)
    if dtype is torch.bool:
        return _rows(torch.arange(64) % 3 == 0, columns)
    if dtype.itemsize == 1:
        return _rows(torch.arange(256).to(torch.uint8).view(dtype), columns)
    if dtype not in _LAYOUT:
        return _rows(_whole_numbers(dtype), columns)
    exponents, mantissa = _LAYOUT[dtype]
    edges = (0, 1, 2 ** (mantissa - 1), 2 ** (mantissa - 1) | 3, 2**mantissa - 1, 2**mantissa // 3)
    found = [
        (exponent << mantissa | edge) - (sign << (exponents + mantissa))
        for exponent in range(2**exponents)
        for sign in (0, 1)
        for edge in edges
    ]
    return _rows(torch.tensor(found, dtype=CARRIERS[dtype.itemsize]).view(dtype), columns)


def _whole_numbers(dtype: torch.dtype) -> torch.Tensor:
    """Integers around each power of two, of both signs, and the extremes."""
    info = torch.iinfo(dtype)
    near = {s * (2**n) + d for n in range(64) for d in (-1, 0, 1) for s in (1, -1)}
    found = sorted(n for n in near | {info.min, info.max} if info.min <= n <= info.max)
    return torch.tensor(found, dtype=dtype)


def _rows(flat: torch.Tensor, columns: int) -> torch.Tensor:
    bytes_of = flat.reshape(-1).view(torch.uint8).view(flat.numel(), -1)
    step = 8 * columns
    wanted = -(-flat.numel() // step) * step
    filled = torch.cat([bytes_of, bytes_of[: wanted - flat.numel()]])
    return filled.view(-1).view(flat.dtype).view(-1, columns)


def uneven(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with one row once more where their number is even."""
    raw = matrix.view(torch.uint8)
    return matrix if len(matrix) % 2 else torch.cat([raw, raw[:1]]).view(matrix.dtype)
