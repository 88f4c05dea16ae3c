"""New memory for tensors, and copies of their values, bit for bit.

Values are moved as integers of the same width (:func:`bits`): then every dtype travels, NaN
payloads included, also where torch has no kernels for it.
"""

from __future__ import annotations

import copyreg
import warnings
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardproof._core.tensors.prefault import LARGE, prefault
from shardproof._core.tensors.properties import has_no_memory, is_lazy, is_ordinary, is_row_major
from shardproof._core.tensors.subclasses import (
    PLAIN,
    copy_by_class,
    is_custom,
    put_by_class,
    wait_for_pending,
)

# For these torch has every kernel that moving takes, and copying them copies their bits: they need
# not be disguised as integers, which would cost a view a tensor.
MOVABLE = frozenset(
    {
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)
_COMPRESSED = frozenset({torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})
_INTEGER_OF_WIDTH = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
    16: torch.complex128,
}


def bit_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that carries the bits of ``dtype``."""
    return _INTEGER_OF_WIDTH[dtype.itemsize]


def carrier_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype as which values of ``dtype`` are moved: itself, or integers of its width."""
    return dtype if dtype in MOVABLE else _INTEGER_OF_WIDTH[dtype.itemsize]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of ``tensor`` as integers: a view, unless a lazy conj or neg has to be resolved."""
    plain = tensor.detach() if tensor.requires_grad else tensor
    if plain.is_conj() or plain.is_neg():
        with warnings.catch_warnings():
            # torch warns of complex32 whenever it makes one.
            warnings.simplefilter("ignore")
            plain = plain.resolve_conj().resolve_neg()
    return plain.view(bit_dtype(plain.dtype))


def allocate(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str,
    stride: Sequence[int] | None = None,
) -> torch.Tensor:
    """An uninitialised tensor; ``stride`` is kept where it is dense."""
    # torch warns of some dtypes when it makes a tensor of them, but not when it views one.
    made = carrier_dtype(dtype)
    if stride is not None and not is_row_major(shape, stride):
        ghost = torch.empty_strided(shape, stride, dtype=torch.uint8, device="meta")
        stride = torch.empty_like(ghost).stride()
        fresh = torch.empty_strided(shape, stride, dtype=made, device=device)
    else:
        fresh = torch.empty(shape, dtype=made, device=device)
    return fresh if made is dtype else fresh.view(dtype)


def allocate_like(
    tensor: torch.Tensor, device: torch.device | str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """An uninitialised tensor with the shape and, where dense, the strides of ``tensor``."""
    dtype = tensor.dtype if dtype is None else dtype
    if not is_ordinary(tensor):
        return torch.empty_like(tensor.detach(), device=device, dtype=dtype)
    stride = None if tensor.is_contiguous() else tensor.stride()
    return allocate(tensor.size(), dtype, device, stride)


def put(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> None:
    """Write the values of ``source`` into ``target``; bit for bit where the dtypes agree."""
    dtype = target.dtype
    direct = (
        dtype not in MOVABLE
        and dtype == source.dtype
        and is_ordinary(target)
        and is_ordinary(source)
        and not is_lazy(target)
    )
    # Detached, so that nothing is recorded: that is cheaper than a no_grad block a tensor.
    if is_custom(type(target)) or is_custom(type(source)):
        put_by_class(target, source, non_blocking)
    elif direct:
        target.detach().view(bit_dtype(dtype)).copy_(bits(source), non_blocking=non_blocking)
    elif target.layout is torch.strided:
        target.detach().copy_(source.detach(), non_blocking=non_blocking)
    else:
        # What a detached sparse tensor gets for new entries, the tensor itself does not have.
        with torch.no_grad():
            if target.layout in _COMPRESSED:
                # As many entries as the source has: they copy between equal numbers alone.
                target.resize_as_sparse_(source)
            target.copy_(source.detach(), non_blocking=non_blocking)


def copy_all(
    targets: list[torch.Tensor], sources: list[torch.Tensor], non_blocking: bool = False
) -> None:
    """Copy each source into its target, in one call: a third of what calls one by one cost.

    FSDP copies its all-gathered parameters out with the same one.
    """
    # That call refuses to write to lazy ones.
    if any(map(torch.Tensor.is_neg, targets)) or any(map(torch.Tensor.is_conj, targets)):
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=non_blocking)
    elif targets:
        torch._foreach_copy_(targets, sources, non_blocking=non_blocking)


# A copy of each tensor along the first dimension; torch's own annotation says that it gives none.
copies_of_each: Callable[[torch.Tensor], Sequence[torch.Tensor]] = cast(Any, torch.unbind_copy)


def copy_each(stacked: torch.Tensor, targets: list[torch.Tensor]) -> None:
    """Copy each tensor along the first dimension into its target, of the same shape and dtype.

    On the CPU two thirds of what :func:`copy_all` takes with the views that it needs.
    """
    torch.unbind_copy(stacked, out=targets)


def fresh_copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The values of a plain tensor in new memory on ``device``, detached, strides kept."""
    usual = type(tensor) in PLAIN
    if not usual:
        tensor = wait_for_pending(tensor)
        if is_custom(type(tensor)):
            return copy_by_class(tensor, device)
    if tensor.dtype in MOVABLE or not is_ordinary(tensor) or tensor.is_meta:
        plain = tensor.detach() if tensor.requires_grad or not usual else tensor
        if (
            usual
            and plain.layout is torch.strided
            and plain.nbytes >= LARGE
            and device.type == "cpu"
            and (plain.device == device or plain.is_cuda)
        ):
            fresh = torch.empty_like(plain, device=device)
            return prefault(fresh, alone=plain.is_cuda).copy_(plain)
        if plain.device != device:
            # Not reached on a CPU: there is no other device.
            return plain.to(device, copy=True)
        return plain.clone()
    return bits(tensor).to(device, copy=True).view(tensor.dtype)


def copy_of_any(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """As :func:`fresh_copy`; where the storage was freed, the copy has no memory either."""
    if not has_no_memory(tensor):
        return fresh_copy(tensor, device)
    fresh = allocate_like(tensor, device)
    fresh.untyped_storage().resize_(0)
    return fresh


def as_parameter_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Give ``tensor`` the ``requires_grad`` and the Parameter-ness of ``like``.

    On the same device also the attributes that somebody has written on it.
    """
    # Asking for the very type first: nn.Parameter has an instance check of its own, in Python. It
    # goes by the mark that a Parameter of another type of tensor bears.
    kind = type(like)
    if kind is not torch.Tensor and (
        getattr(like, "_is_param", False) if kind is DTensor else isinstance(like, nn.Parameter)
    ):
        tensor = nn.Parameter(tensor, requires_grad=like.requires_grad)
    elif like.requires_grad:
        tensor.requires_grad_()
    # What libraries write on tensors, and nn.Buffer does. Upstream's result is the tensor itself;
    # on another device it has lost them, and they may not be fit to be saved.
    if kind in PLAIN or kind is DTensor:
        if (attributes := vars(like)) and tensor.device == like.device:
            vars(tensor).update(attributes)
    elif not is_custom(kind) and tensor.device == like.device:
        return _with_class_of(like, tensor)
    return tensor


def _with_class_of(like: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in the class of another, with what that keeps besides its elements."""
    kind = type(like)
    with torch._C.DisableTorchFunctionSubclass():
        made = torch.Tensor._make_subclass(kind, tensor, like.requires_grad)
    vars(made).update(vars(like))
    slots: Iterable[str] = cast(Any, copyreg)._slotnames(kind)
    for name in slots:
        if hasattr(like, name):
            setattr(made, name, getattr(like, name))
    return made


_device = attrgetter("device")


def stack_into(room: torch.Tensor, parts: list[torch.Tensor]) -> None:
    """Write tensors of one shape into 1-D memory, one after the other.

    The memory has the dtype that carries theirs.
    """
    if parts[0].dtype is not room.dtype:
        parts = [bits(part) for part in parts]
    if set(map(_device, parts)) != {room.device}:
        # Not reached on a CPU: all lies there.
        parts = [part.to(room.device) for part in parts]
    torch.stack(parts, out=room.view(len(parts), *parts[0].shape))


def as_carrier(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype that carries its dtype between ranks: mostly itself."""
    return tensor if tensor.dtype in MOVABLE else bits(tensor)
