"""What the walks need to know about a tensor: its kind, its ties, its bits, and how to rebuild it.

Values are moved as integers of the same width (:func:`bits`): then every dtype travels, NaN
payloads included, also where torch has no kernels for it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from shardproof._core.sharding.blocks import local_shape
from shardproof._core.sharding.table_shards import first_shard
from shardproof._core.tensors.prefault import LARGE, map_ahead
from shardproof._core.tensors.subclasses import (
    PLAIN,
    has_own_dispatch,
    inner_tensors,
    is_custom,
    own_copy,
    own_put,
    settled,
)

CPU = torch.device("cpu")
FSDP_FLATTENED = "_fsdp_flattened"
"""The mark that FSDP1 puts on what it has flattened, ``torch.distributed.fsdp._common_utils``."""

STANDS_FOR = "_st_info"
"""Where a local Parameter keeps the spec of the DTensor that it stands for."""

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
QUANTIZED = frozenset({torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4})
_INTEGER_OF_WIDTH = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
    16: torch.complex128,
}


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
        shard = first_shard(tensor._local_tensor)
        return tensor.dtype if shard is None else shard.dtype
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
        local = settled(local)
    return local.detach() if local.requires_grad else local


def is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a strided tensor with memory of its own kind, no wrapper.

    Of such a tensor every operation can be asked.
    """
    kind = type(tensor)
    if kind not in PLAIN and is_custom(kind):
        return False
    return tensor.layout is torch.strided and not tensor.is_quantized


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


def bit_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that carries the bits of ``dtype``."""
    return _INTEGER_OF_WIDTH[dtype.itemsize]


def carrier(dtype: torch.dtype) -> torch.dtype:
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
    made = carrier(dtype)
    if stride is not None and not is_row_major(shape, stride):
        ghost = torch.empty_strided(shape, stride, dtype=torch.uint8, device="meta")
        stride = torch.empty_like(ghost).stride()
        fresh = torch.empty_strided(shape, stride, dtype=made, device=device)
    else:
        fresh = torch.empty(shape, dtype=made, device=device)
    return fresh if made is dtype else fresh.view(dtype)


def is_row_major(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the strides are those of a contiguous tensor."""
    step = 1
    for size, actual in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and actual != step:
            return False
        step *= max(size, 1)
    return True


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
        and not (target.is_conj() or target.is_neg())
    )
    # Detached, so that nothing is recorded: that is cheaper than a no_grad block a tensor.
    if is_custom(type(target)) or is_custom(type(source)):
        own_put(target, source, non_blocking)
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
    if targets:
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
        tensor = settled(tensor)
        if is_custom(type(tensor)):
            return own_copy(tensor, device)
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
            return map_ahead(fresh, alone=plain.is_cuda).copy_(plain)
        if plain.device != device:
            # Not reached on a CPU: there is no other device.
            return plain.to(device, copy=True)
        return plain.clone()
    return bits(tensor).to(device, copy=True).view(tensor.dtype)


def unwritable(tensor: Any) -> str | None:
    """Why ``tensor`` cannot take values: two of its elements share memory. None where it can."""
    if isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
    elif isinstance(tensor, ShardedTensor):
        return next(filter(None, (unwritable(s.tensor) for s in tensor.local_shards())), None)
    if not isinstance(tensor, torch.Tensor) or not is_ordinary(tensor) or tensor.is_contiguous():
        return None
    if any(n > 1 and step == 0 for n, step in zip(tensor.size(), tensor.stride(), strict=True)):
        return "expected memory of its own for each element, got an expanded tensor"
    return None


def dress_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Give ``tensor`` the ``requires_grad`` and the Parameter-ness of ``like``."""
    # Asking for the very type first: nn.Parameter has an instance check of its own, in Python. It
    # goes by the mark that a Parameter of another type of tensor bears.
    kind = type(like)
    if kind is not torch.Tensor and (
        getattr(like, "_is_param", False) if kind is DTensor else isinstance(like, nn.Parameter)
    ):
        return nn.Parameter(tensor, requires_grad=like.requires_grad)
    return tensor.requires_grad_() if like.requires_grad else tensor


def geometry(tensor: torch.Tensor) -> Hashable:
    """A key that two tensors share if and only if they are the same view of the same memory.

    Valid while both are alive.
    """
    if not is_ordinary(tensor):
        if hasattr(type(tensor), "__tensor_flatten__"):
            return (type(tensor), *map(geometry, inner_tensors(tensor)))
        return id(tensor)
    return (
        tensor.untyped_storage()._cdata,
        tensor.storage_offset(),
        tensor.size(),
        tensor.stride(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )


def tie_key(tensor: torch.Tensor) -> Hashable:
    """A key that tied tensors share: the same object, or the same view of the same memory."""
    if isinstance(tensor, DTensor):
        spec = tensor._spec
        return ("DTensor", geometry(tensor._local_tensor), spec.placements, spec.shape)
    return id(tensor) if isinstance(tensor, ShardedTensor) else geometry(tensor)


def dtensor(local: torch.Tensor, spec: DTensorSpec) -> DTensor:
    """The DTensor of ``spec`` around a local tensor, without ``requires_grad``.

    ``DTensor.__init__`` does nothing, behind a guard against Dynamo that costs more than making
    the tensor does; so it is left out.
    """
    make: Callable[..., DTensor] = DTensor.__new__
    return make(DTensor, local, spec, requires_grad=False)


def with_local(like: DTensor, local: torch.Tensor, dtype: torch.dtype | None = None) -> DTensor:
    """The DTensor of ``like``'s spec around another local tensor. No collective runs."""
    return dtensor(local, like._spec if dtype is None else spec_of_dtype(like._spec, dtype))


def spec_of_dtype(spec: DTensorSpec, dtype: torch.dtype) -> DTensorSpec:
    """``spec``, or a copy of it where it says another dtype."""
    meta = spec.tensor_meta
    if meta is None or meta.dtype == dtype:
        return spec
    spec = copy.copy(spec)
    spec.tensor_meta = meta._replace(dtype=dtype)
    spec._hash = None
    return spec


def stood_for(value: Any) -> Any:
    """The DTensor that a local Parameter of tensor parallelism stands in for; else the value.

    ``torch.distributed.checkpoint.state_dict`` hands the parameters of a module to the load
    functions as they are, so the mark on the Parameter is all that tells its global shape. A piece
    of FSDP1's flat parameter stands for a DTensor whose local tensor is nowhere: on meta.
    """
    spec = getattr(value, STANDS_FOR, None)
    if not isinstance(spec, DTensorSpec) or not isinstance(value, torch.Tensor):
        return value
    if isinstance(value, DTensor):
        return value
    shape, local = local_shape(spec), value.detach()
    if getattr(value, FSDP_FLATTENED, False):
        local = torch.empty(shape, dtype=value.dtype, device="meta")
    elif tuple(value.shape) != shape:
        return value
    return dtensor(local, spec)
