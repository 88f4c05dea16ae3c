"""What a case is made of that is no matter of ranks: values that tell, memory, containers.

The oracle uses it as well, and each script that repeats a failure holds a copy.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

SHORT = 256
"""Bytes of a tensor up to which an outcome holds all of them, and not a digest."""
_SPECIAL: dict[torch.dtype, tuple[int, ...]] = {
    # -0.0, the smallest subnormal, NaNs with a payload (quiet and signalling), infinities, the
    # largest, the largest subnormal, one above 1, as bits.
    torch.float64: (
        *(1 << 63, 1, 0x7FF8DEADBEEF0001, 0x7FF0000000000001, 0x7FF0000000000000, 0xFFF << 52),
        *(0x7FEFFFFFFFFFFFFF, 0x000FFFFFFFFFFFFF, 0x3FF0000000000001, 0xFFF8000000000002),
    ),
    torch.float32: (
        *(1 << 31, 1, 0x7FC0BEEF, 0x7F800001, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x007FFFFF),
        *(0x3F800001, 0xFFC00002),
    ),
    torch.bfloat16: (0x8000, 1, 0x7FC5, 0x7F81, 0x7F80, 0xFF80, 0x7F7F, 0x007F, 0x3F81, 0xFFC2),
    torch.float16: (0x8000, 1, 0x7E05, 0x7C01, 0x7C00, 0xFC00, 0x7BFF, 0x03FF, 0x3C01, 0xFE02),
    torch.int64: ((1 << 53) + 1, 1 << 63, (1 << 63) - 1, (1 << 64) - 1, (1 << 62) + 1, 0),
    torch.uint64: ((1 << 53) + 1, 1 << 63, (1 << 64) - 1, (1 << 63) - 1, (1 << 62) + 1, 0),
    torch.int32: (1 << 31, (1 << 31) - 1, (1 << 24) + 1, (1 << 32) - 1, 0),
}


def _hear_of_complex32() -> None:
    """Let torch warn, once in a process, that complex32 is experimental: here, and unheard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ones(1, dtype=torch.complex32)


_hear_of_complex32()


def pattern(dtype: str, shape: Sequence[int], fill: int) -> torch.Tensor:
    """Values that tell: 1, 2, 3 ... for fill 0, special bits for 1 to 10, all bits above.

    Neighbours differ, and so do tensors of other fills. What comes out depends on nothing else.
    """
    kind = getattr(torch, dtype)
    count = 1
    for size in shape:
        count *= size
    index = torch.arange(count, dtype=torch.int64)
    if fill == 0 and dtype != "float8_e8m0fnu":
        whole = index % 100 + 1
        made = whole % 2 == 1 if dtype == "bool" else whole.to(torch.float32).to(kind)
        if dtype.endswith(("int64", "int32", "int16", "int8")):
            made = whole.to(kind)
        return made.reshape(tuple(shape))
    width = kind.itemsize
    words = max(width // 8, 1)
    place = torch.arange(count * words, dtype=torch.int64)
    mixed = (place + 1 + fill * 1_000_003) * 0x2545F4914F6CDD1D
    mixed = (mixed ^ (mixed >> 29)) * 0x1B873593CC9E2D51
    mixed = mixed ^ (mixed >> 32)
    if dtype == "bool":
        return (mixed & 1).to(torch.bool).reshape(tuple(shape))
    part = {"complex64": torch.float32, "complex128": torch.float64, "complex32": torch.float16}
    real = part.get(dtype, kind)
    data = mixed.view(torch.uint8).reshape(count * words, 8)[:, : min(width, 8)].contiguous()
    if fill <= 10 and real in _SPECIAL:
        special = _SPECIAL[real]
        raw = b"".join(
            special[(fill - 1 + at) % len(special)].to_bytes(real.itemsize, "little")
            for at in range(len(special))
        )
        table = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(len(special), -1)
        flat = data.reshape(-1, real.itemsize)
        data = table[torch.arange(len(flat)) % len(special)].contiguous()
    return data.reshape(-1).view(kind).reshape(tuple(shape))


def contribution(dtype: str, shape: Sequence[int], rank: int) -> torch.Tensor:
    """A rank's part of a pending reduction that needs care: large and small, negative, NaN."""
    made = pattern(dtype, shape, 0)
    kind = made.dtype
    if kind.is_floating_point:
        made = torch.full_like(made, 256.0 if rank == 0 else 1.0)
        # Not in half precision: what a NaN becomes that is rounded to it is nobody's promise.
        if rank == 1 and made.numel() > 1 and kind.itemsize > 2:
            made.view(-1)[-1] = torch.nan
        return made
    return made - 3 * rank - 2 if kind.is_signed else made + rank


def bits(dtype: str, shape: Sequence[int], data: str) -> torch.Tensor:
    """The tensor of these bytes, in hexadecimal."""
    raw = bytearray.fromhex(data)
    if not raw:
        return torch.empty(tuple(shape), dtype=getattr(torch, dtype))
    return (
        torch.frombuffer(raw, dtype=torch.uint8).view(getattr(torch, dtype)).reshape(tuple(shape))
    )


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, in the order of its elements."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def laid_out(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The same values in other memory: transposed, sliced, offset."""
    if how == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "sliced" and tensor.dim():
        wide = tensor.new_empty((*tensor.shape[:-1], 2 * tensor.shape[-1]))
        return written(wide[..., ::2], tensor)
    if how == "offset":
        return written(
            tensor.new_empty(tensor.numel() + 5)[3 : 3 + tensor.numel()].view(tensor.shape), tensor
        )
    return tensor


def written(target: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    wide = target.dtype.is_complex or target.dtype.itemsize > 8
    if wide or not target.numel():
        return target.copy_(values)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    as_bits = integers[target.dtype.itemsize]  # a copy of floats may change NaNs
    target.view(as_bits).copy_(values.view(as_bits))
    return target


def view_of(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """A view of a tensor: all of it, a part, or transposed."""
    if how == "first" and tensor.dim() and tensor.shape[0]:
        return tensor.detach()[:1]
    if how == "transposed" and tensor.dim() > 1:
        return tensor.detach().transpose(0, 1)
    return tensor.detach()


class Pair(NamedTuple):
    """A namedtuple."""

    first: Any
    second: Any


def with_metadata(items: Iterable[tuple[Any, Any]]) -> OrderedDict[Any, Any]:
    """An OrderedDict with `_metadata`, as a module's state dict is."""
    made: OrderedDict[Any, Any] = OrderedDict(items)
    made._metadata = OrderedDict({"": {"version": 3}})  # type: ignore[attr-defined]
    return made


def counted(items: Iterable[tuple[Any, Any]]) -> defaultdict[Any, Any]:
    """A defaultdict of int."""
    return defaultdict(int, items)


def turned(mapping: Any, rank: int) -> Any:
    """The mapping with its keys in another order on each rank."""
    items = list(mapping.items())
    turn = rank % len(items) if items else 0
    mapping.clear()
    mapping.update(items[turn:] + items[:turn])
    return mapping


def strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides that mean something: those of dimensions that have several elements."""
    if tensor.numel() < 2:
        return ()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(step if size > 1 else 0 for size, step in steps)


def digest(tensor: torch.Tensor) -> str:
    """The bytes in hexadecimal; of many of them their BLAKE2 digest."""
    data = raw(tensor).numpy().tobytes()
    return data.hex() if len(data) <= SHORT else "blake2 " + hashlib.blake2b(data).hexdigest()[:32]


def said(value: Any) -> str:
    if isinstance(value, (set, frozenset)):
        return repr(sorted(value, key=repr))
    return repr(value)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
