"""What a tensor is: its kind, shape and dtype, and whether it has memory of the usual kind.

Asked of DTensors and ShardedTensors, too, by what they say of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from shardproof._core.tensors.subclasses import (
    PLAIN,
    has_own_dispatch,
    is_custom,
    shards_of,
    wait_for_pending,
)

CPU = torch.device("cpu")
QUANTIZED = frozenset({torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4})


def kind_of(value: Any) -> str:
    """``ShardedTensor``, ``DTensor``, ``Tensor`` or the name of another type."""
    if isinstance(value, torch.Tensor):
        if isinstance(value, ShardedTensor):
            return "ShardedTensor"
        return "DTensor" if isinstance(value, DTensor) else "Tensor"
    return type(value).__name__


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The global shape. A ShardedTensor is asked for its metadata: its own properties warn."""
    if isinstance(tensor, ShardedTensor):
        return tuple(tensor.metadata().size)
    return tuple(tensor.size())


def dtype_of(tensor: torch.Tensor) -> torch.dtype:
    """The dtype; of a ShardedTensor from its metadata, of a table from its shards."""
    if isinstance(tensor, ShardedTensor):
        return tensor.metadata().tensor_properties.dtype
    if isinstance(tensor, DTensor) and type(tensor._local_tensor) not in PLAIN:
        shards = shards_of(tensor._local_tensor)
        return shards[0].dtype if shards else tensor.dtype
    return tensor.dtype


def requires_grad_of(tensor: torch.Tensor) -> bool:
    """Whether it requires grad; of a ShardedTensor from its metadata."""
    if isinstance(tensor, ShardedTensor):
        return bool(tensor.metadata().tensor_properties.requires_grad)
    return tensor.requires_grad


def local_of(tensor: DTensor) -> torch.Tensor:
    """The finished local tensor of a DTensor, detached, over the same storage."""
    local = tensor._local_tensor
    if type(local) is not torch.Tensor:
        local = wait_for_pending(local)
    return local.detach() if local.requires_grad else local


def local_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold a leaf's elements on this rank: shards, the local one, or itself."""
    if isinstance(tensor, ShardedTensor):
        return [shard.tensor for shard in tensor.local_shards()]
    return [tensor._local_tensor if isinstance(tensor, DTensor) else tensor]


def is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a strided tensor with memory of its own kind, no wrapper.

    Of such a tensor every operation can be asked.
    """
    kind = type(tensor)
    if kind not in PLAIN and is_custom(kind):
        return False
    return tensor.layout is torch.strided and not tensor.is_quantized


def has_no_memory(tensor: torch.Tensor) -> bool:
    """Whether the storage was freed, as FSDP frees it: to read an element ends the process."""
    return (
        not tensor.is_meta
        and is_ordinary(tensor)
        and tensor.numel() > 0
        and not tensor.untyped_storage().nbytes()
    )


def is_lazy(tensor: torch.Tensor) -> bool:
    """Whether memory holds the negatives or the conjugates of the values."""
    return tensor.is_conj() or tensor.is_neg()


def is_opaque(layout: torch.layout, dtype: torch.dtype) -> bool:
    """Whether such tensors (sparse, quantized) hold more than elements at strides.

    They can be copied as a whole; no part of them can be cut out, or sent as bytes.
    """
    return layout is not torch.strided or dtype in QUANTIZED


def wrapper_of(tensor: torch.Tensor) -> type | None:
    """The class of a finished tensor that wraps others, or answers for itself; None elsewhere.

    What it holds besides its elements (scales, a second tensor) only its own operations move.
    """
    kind = type(tensor)
    return kind if has_own_dispatch(kind) else None


def unwrapped(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor inside a wrapper that holds no other; None where that is not all there is."""
    while wrapper_of(tensor) is not None:
        if not hasattr(type(tensor), "__tensor_flatten__"):
            return None
        names, _ = cast(Any, tensor).__tensor_flatten__()
        if len(names) != 1:
            return None
        inner: torch.Tensor = getattr(tensor, names[0])
        if (inner.shape, inner.dtype) != (tensor.shape, tensor.dtype):
            return None
        tensor = inner
    return tensor


def is_row_major(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the strides are those of a contiguous tensor."""
    step = 1
    for size, actual in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and actual != step:
            return False
        step *= max(size, 1)
    return True


def unwritable(tensor: torch.Tensor) -> str | None:
    """Why ``tensor`` cannot take values: two of its elements share memory. None where it can."""
    if any(map(expanded_dims, local_parts(tensor))):
        return "expected memory of its own for each element, got an expanded tensor"
    return None


def expanded_dims(part: torch.Tensor) -> list[int]:
    """The dimensions of plain memory along which all elements are the same one."""
    if not is_ordinary(part) or part.is_contiguous():
        return []
    return [dim for dim, n in enumerate(part.size()) if n > 1 and part.stride(dim) == 0]


LEAF_TYPES = frozenset(
    {torch.Tensor, nn.Parameter, DTensor, ShardedTensor, int, float, bool, str, bytes, type(None)}
)
"""The types of nearly all leaves: what is of one of them needs no further questions."""
