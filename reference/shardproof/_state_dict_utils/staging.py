"""CPU buffers with the structure of a state dict, for staging a checkpoint.

Nothing is copied and nothing communicates: the buffers are allocated, pinned or shared as asked.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, cast

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from shardproof._core.containers.container_types import path_name
from shardproof._core.containers.leaf_values import copy_leaf_value
from shardproof._core.containers.walk import Walk
from shardproof._core.sharding.dtensors import with_local
from shardproof._core.sharding.sharded_tensors import with_shards
from shardproof._core.tensors.overlapping_copies import OverlappingCopies
from shardproof._core.tensors.properties import CPU, is_ordinary, local_of
from shardproof._core.tensors.subclasses import (
    PLAIN,
    buffer_by_class,
    has_own_operations,
    is_custom,
    is_table,
    shards_of,
    wait_for_pending,
    wrapper_around,
)
from shardproof._core.tensors.ties import maybe_tied, tie_key
from shardproof._core.tensors.values import MOVABLE, allocate_like, bit_dtype

# cudaHostRegisterPortable: pinned for every context of the process.
_PORTABLE = 1


def _create_cpu_state_dict(
    state_dict: dict[str, Any], pin_memory: bool = False, share_memory: bool = False
) -> dict[str, Any]:
    """Allocate CPU tensors with the structure of a state dict.

    Args:
        state_dict: nested containers of tensors of any kind, shape, dtype and device.
        pin_memory: put the tensors into page-locked memory.
        share_memory: put them into memory that other processes can map. With ``pin_memory`` the
            shared memory is registered with the accelerator, which is slow: for tensors that live
            long.

    Returns:
        The same containers around new tensors with unspecified contents: same kinds, shapes,
        dtypes, ties and, for dense tensors, strides. They are plain buffers that do not require
        grad, whatever the originals are. A DTensor keeps mesh and placements, a ShardedTensor its
        sharding and process group, a wrapper of tensors (``__tensor_flatten__``) a buffer for
        each of them; any other class of tensors makes its own. Views of one memory stay views of
        one. Tensors without elements are never pinned. Leaves that are no tensors are copied.

    Raises:
        RuntimeError: pinning is asked for, a tensor has elements, and no accelerator can pin
            (pytorch#189991), or the accelerator cannot register shared memory; raised before
            anything is allocated. Or a tensor cannot be allocated, pinned or shared, as a sparse
            one cannot: names it.

    No collective runs.

    """
    walk = Walk(state_dict)
    if pin_memory and any(isinstance(v, torch.Tensor) and v.numel() for v in walk.leaves):
        _require_pinning(share_memory)
    fill = partial(_buffer_like, pin_memory=pin_memory, share_memory=share_memory)
    tied = list(maybe_tied(walk.leaves))
    together = OverlappingCopies(
        (leaf for leaf, ask in zip(walk.leaves, tied, strict=True) if ask), fill
    )
    made: dict[Hashable, torch.Tensor] = {}
    results: list[Any] = []
    try:
        for value, shared in zip(walk.leaves, tied, strict=True):
            if not isinstance(value, torch.Tensor):
                results.append(copy_leaf_value(value))
            elif not shared:
                results.append(_allocate_leaf(value, fill))
            else:
                key = tie_key(value), None if type(value) in PLAIN else type(value)
                if key not in made:
                    made[key] = _allocate_leaf(value, together.of)
                results.append(made[key])
    except RuntimeError as error:
        raise RuntimeError(f"{path_name(walk.path(len(results)))}: {error}") from error
    result: dict[str, Any] = walk.rebuilt(results)
    return result


def _allocate_leaf(
    value: torch.Tensor, fill: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    if isinstance(value, DTensor):
        return with_local(value, fill(local_of(value)))
    if isinstance(value, ShardedTensor):
        return with_shards(value, fill, CPU)
    return fill(value)


def _buffer_like(tensor: torch.Tensor, *, pin_memory: bool, share_memory: bool) -> torch.Tensor:
    pinnable = pin_memory and tensor.numel() > 0
    if not share_memory and tensor.dtype in MOVABLE and is_ordinary(tensor):
        return torch.empty_like(tensor, device=CPU, pin_memory=pinnable)
    fill = partial(_buffer_like, pin_memory=pin_memory, share_memory=share_memory)
    tensor = wait_for_pending(tensor)
    if is_table(type(tensor)):
        shards = list(map(fill, shards_of(tensor)))
        table: Any = tensor
        return type(table)(shards, table.local_offsets()) if shards else tensor
    if is_custom(type(tensor)) and not hasattr(type(tensor), "__tensor_flatten__"):
        own = buffer_by_class(tensor, CPU)
        if share_memory:
            cast(Any, own.share_memory_)()
        return own.pin_memory() if pinnable and not share_memory else own
    if has_own_operations(tensor):
        return wrapper_around(tensor, fill).detach()
    if tensor.layout is not torch.strided:
        if pin_memory or share_memory:
            how = "shared" if share_memory else "pinned"
            raise RuntimeError(f"a tensor of layout {tensor.layout} cannot be {how}")
        return torch.empty_like(tensor.detach(), device=CPU)
    if share_memory:
        buffer = allocate_like(tensor, CPU)
        with warnings.catch_warnings():
            # Sharing goes through a storage class that announces its own removal.
            warnings.simplefilter("ignore")
            share: Any = buffer.share_memory_
            share()
        if pinnable:
            _register(buffer)  # Not reached on a CPU: pinning is refused.
        return buffer
    if tensor.is_quantized:
        buffer = allocate_like(tensor, CPU)
        return buffer.pin_memory() if pinnable else buffer
    # Not reached on a CPU: pinning is refused.
    if pinnable:
        like = allocate_like(tensor, "meta")
        return torch.empty_strided(
            like.size(), like.stride(), dtype=bit_dtype(tensor.dtype), device=CPU, pin_memory=True
        ).view(tensor.dtype)
    return allocate_like(tensor, CPU)


def _require_pinning(share_memory: bool) -> None:
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        raise RuntimeError(
            "pin_memory=True needs an accelerator that can page-lock memory, and none is available"
        )
    # Not reached on a CPU: pinning has been refused.
    if share_memory and _host_registration() is None:
        raise RuntimeError(
            "pin_memory=True with share_memory=True needs an accelerator runtime that registers "
            f"existing memory; {accelerator.type} has none"
        )


# Not reached on a CPU: pinning is refused before.
def _host_registration() -> Any:
    accelerator = torch.accelerator.current_accelerator()
    module = None if accelerator is None else torch.get_device_module(accelerator.type)
    runtime = getattr(module, "cudart", None)
    return None if runtime is None else runtime()


# Not reached on a CPU: pinning is refused before.
def _register(buffer: torch.Tensor) -> None:
    runtime, address = _host_registration(), buffer.data_ptr()
    status = int(runtime.cudaHostRegister(address, buffer.untyped_storage().nbytes(), _PORTABLE))
    if status != 0:
        raise RuntimeError(
            f"registering {buffer.untyped_storage().nbytes()} bytes of shared memory failed with "
            f"status {status}; it may stem from an earlier asynchronous operation"
        )
    # Of the storage: others than the buffer may lie in it, and tensors that are weakly referenced
    # cannot be swapped. At exit the runtime may be gone, and the process gives the memory back.
    unregister = runtime.cudaHostUnregister
    weakref.finalize(buffer.untyped_storage(), unregister, address).atexit = False
