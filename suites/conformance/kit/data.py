"""Data that every dtype holds exactly, in every memory layout that a caller may pass."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable

import pytest
import torch

from harness.rank import rank_process

_NAMES = (
    "bool",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "complex32",
    "complex64",
    "complex128",
)
DTYPES: list[torch.dtype] = [getattr(torch, n) for n in _NAMES if hasattr(torch, n)]
"""Every dtype that a tensor in a state dict may have."""

SOME_DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.int16,
    torch.uint16,
    torch.bool,
    torch.complex64,
]
"""One of each kind: what Gloo moves and what it refuses, one byte to eight."""

SHAPES: list[tuple[int, ...]] = [
    (),
    (1,),
    (8,),
    (7,),
    (3,),
    (0,),
    (4, 6),
    (5, 3),
    (0, 3),
    (3, 0),
    (2, 3, 5),
]
"""0-dim, one element, even, uneven, fewer elements than ranks, empty; one to three dimensions."""


def dtype_id(dtype: torch.dtype) -> str:
    """The dtype's name for a check's id."""
    return str(dtype).removeprefix("torch.")


# Without int16: Gloo refuses it as it refuses uint16, for which torch has fewer operators.
_EACH_RUN = {*SOME_DTYPES, torch.float8_e4m3fn} - {torch.int16}
EACH_DTYPE = pytest.mark.parametrize(
    "dtype",
    [pytest.param(d, marks=() if d in _EACH_RUN else pytest.mark.thorough) for d in DTYPES],
    ids=dtype_id,
)
"""Runs a check for each dtype; one of each kind each time, the others with --thorough."""


@functools.cache
def _period(dtype: torch.dtype, salt: int) -> torch.Tensor:
    """What `numbers` repeats: made once, because most checks ask for it many times."""
    index = torch.arange(3 * 11 * 13, device="cpu")
    whole = (index * 7 + index // 11 + salt * 3) % 13
    if dtype == getattr(torch, "float8_e8m0fnu", None):
        return torch.exp2((whole % 7).to(torch.float32)).to(dtype)
    if dtype is torch.bool:
        return (whole + index) % 3 == 0
    if dtype.is_complex:
        pair = torch.stack([whole, (whole + 5) % 13], -1).to(torch.float32)
        with warnings.catch_warnings():
            # torch says once in a process that complex32 is experimental.
            warnings.simplefilter("ignore", UserWarning)
            return torch.view_as_complex(pair).to(dtype)
    return whole.to(torch.float32).to(dtype) if dtype.is_floating_point else whole.to(dtype)


def numbers(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    salt: int = 0,
    device: str | torch.device | None = None,
) -> torch.Tensor:
    """A contiguous tensor of small whole numbers, neighbours different, exact in the dtype.

    Without `device` it lies on the device of this rank; on the CPU where there is no rank.
    Tensors of different `salt` differ. float8_e8m0fnu holds powers of two only, bool two values.
    """
    size = math.prod(shape)
    period = _period(dtype, salt % 13)
    flat = torch.empty(size, dtype=dtype, device="cpu")
    rounds = size // len(period)
    whole = rounds * len(period)
    flat[:whole].view(rounds, len(period)).copy_(period)
    flat[whole:] = period[: size - whole]
    if device is None:
        device = rank_process.current.device if rank_process.current is not None else "cpu"
    return flat.reshape(shape).to(device)


def _sliced(t: torch.Tensor) -> torch.Tensor:
    if t.dim() == 0:
        return t
    wide = t.repeat_interleave(2, dim=-1)
    return wide[..., ::2]


def _offset(t: torch.Tensor) -> torch.Tensor:
    room = torch.empty(t.numel() + 5, dtype=t.dtype, device=t.device)
    room[3 : 3 + t.numel()] = t.reshape(-1)
    return room[3 : 3 + t.numel()].view(t.shape)


def _transposed(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t


def _expanded(t: torch.Tensor) -> torch.Tensor:
    """Not the same values: the first row, seen at every index of dimension 0 without a copy."""
    return t[:1].expand(t.shape) if t.dim() and t.shape[0] else t


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": _transposed,
    "sliced": _sliced,
    "offset": _offset,
    "expanded": _expanded,
}
"""Name to a function that gives a tensor another memory layout (`expanded`: other values, too)."""
