"""Tensor subclasses that implement operations themselves, or refuse them.

Quantised weights, 8-bit optimizer state, float8 weights, sharded tables: such a class implements
the operations that its users need and no others. So it is asked for nothing but what torch's own
functions would ask for: ``copy_`` to take values, ``clone`` or ``to`` to be copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from operator import is_not
from typing import Any, cast

import torch
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

PLAIN = frozenset({torch.Tensor, nn.Parameter})
_OUR_FUNCTION = (
    cast(Any, torch.Tensor.__torch_function__).__func__,
    torch._C._disabled_torch_function_impl,
)


@lru_cache(maxsize=4096)
def has_own_dispatch(kind: type) -> bool:
    """Whether a class of tensors answers operations itself, so that its memory tells nothing."""
    if kind in PLAIN:
        return False
    dispatch = getattr(kind, "__torch_dispatch__", None)
    own = dispatch is not None and dispatch is not torch.Tensor.__torch_dispatch__
    return own or hasattr(kind, "__tensor_flatten__")


def has_own_operations(tensor: torch.Tensor) -> bool:
    """Whether operations on ``tensor`` go through Python code of its class."""
    kind: type = type(tensor)
    return has_own_dispatch(kind)


@lru_cache(maxsize=4096)
def is_custom(kind: type) -> bool:
    """Whether a class of tensors may refuse an operation that every torch.Tensor has."""
    if kind in PLAIN:
        return False
    function: Any = kind.__torch_function__  # type: ignore[attr-defined]
    return has_own_dispatch(kind) or getattr(function, "__func__", function) not in _OUR_FUNCTION


def has_own_function(kind: type) -> bool:
    """Whether a class answers functions of torch itself, around memory like any other."""
    return kind not in PLAIN and is_custom(kind) and not has_own_dispatch(kind)


@lru_cache(maxsize=4096)
def is_table(kind: type) -> bool:
    """Whether a class of tensors holds the shards of a sharded table.

    Torch and torchrec have one each, both called ``LocalShardsWrapper``.
    """
    return has_own_dispatch(kind) and all(
        hasattr(kind, name) for name in ("local_shards", "local_offsets", "local_sizes")
    )


def shards_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The shards in a table; none in any other tensor."""
    kind: type = type(tensor)
    return list(cast(Any, tensor).local_shards()) if is_table(kind) else []


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor over the memory of one whose class refuses operations but keeps no memory apart.

    Any other tensor comes back itself.
    """
    kind = type(tensor)
    if not has_own_function(kind):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(torch.Tensor)


def inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a class with ``__tensor_flatten__`` holds, in an order that it fixes."""
    return shards_of(tensor) or [value for _, value in _held_attributes(tensor)]


def _attributes(tensor: torch.Tensor) -> Iterator[tuple[str, Any]]:
    """What the class has put on the tensor, in its dict or in slots."""
    yield from vars(tensor).items()
    for base in type(tensor).__mro__:
        if base is torch.Tensor:
            return
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(tensor, name):
                yield name, getattr(tensor, name)


def wait_for_pending(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, once no collective writes to it, or to a tensor that it holds, any more."""
    if type(tensor) in PLAIN:
        return tensor
    if isinstance(tensor, AsyncCollectiveTensor):
        return wait_for_pending(tensor.wait())
    if has_own_operations(tensor):
        for held in tree_leaves([value for _, value in _held_attributes(tensor)]):
            if isinstance(held, torch.Tensor):
                wait_for_pending(held)
    return tensor


def _held_attributes(tensor: torch.Tensor) -> Iterator[tuple[str, Any]]:
    if hasattr(type(tensor), "__tensor_flatten__"):
        names, _ = cast(Any, tensor).__tensor_flatten__()
        yield from [(name, getattr(tensor, name)) for name in names]
    else:
        yield from _attributes(tensor)


def unwrap_pending(tensor: torch.Tensor) -> torch.Tensor:
    """As :func:`wait_for_pending`, and no tensor in it is an ``AsyncCollectiveTensor`` any more.

    Only for a tensor of our own, since what it holds is replaced.
    """
    tensor = wait_for_pending(tensor)
    if has_own_operations(tensor):
        for name, value in list(_held_attributes(tensor)):
            held, structure = tree_flatten(value)
            finished = [unwrap_pending(v) if isinstance(v, torch.Tensor) else v for v in held]
            if any(map(is_not, finished, held)):
                setattr(tensor, name, tree_unflatten(finished, structure))
    return tensor


_UNSUPPORTED = (NotImplementedError, TypeError, ValueError, AttributeError, AssertionError)
"""What classes raise for an operation that they do not have."""


@torch.no_grad()
def copy_by_class(tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """A copy by the operations of the tensor's class, on ``device`` or where the tensor is.

    The tensor itself where it is there already and its class has no way to copy: so did torch.
    """
    if is_lazy(tensor):  # no values yet
        return tensor
    if device is not None and tensor.device != device:
        return tensor.to(device)
    try:
        return tensor.clone()
    except _UNSUPPORTED:
        pass
    try:
        return tensor.to(tensor.device, copy=True)
    except _UNSUPPORTED:
        if hasattr(type(tensor), "__tensor_flatten__"):
            return wrapper_around(tensor, copy_by_class)
        return tensor


def wrapper_around(
    tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """A wrapper of the class of ``tensor`` around what ``change`` makes of what that holds."""
    names, context = cast(Any, tensor).__tensor_flatten__()
    inner = {name: change(getattr(tensor, name)) for name in names}
    unflatten: Any = type(tensor).__tensor_unflatten__  # type: ignore[attr-defined]
    made: torch.Tensor = unflatten(inner, context, tensor.size(), tensor.stride())
    return made


@torch.no_grad()
def buffer_by_class(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """New memory of the tensor's class on ``device`` that can take its values.

    A copy where the class makes no other, and the tensor itself where it makes no copy.
    """
    for make in (torch.empty_like, torch.zeros_like):
        try:
            return make(tensor, device=device)
        except _UNSUPPORTED:
            continue
    return copy_by_class(tensor, device)


@torch.no_grad()
def put_by_class(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> None:
    """Write ``source`` into ``target`` as the class of one of them does it."""
    if is_table(type(target)) and is_table(type(source)):
        for ours, theirs in zip(shards_of(target), shards_of(source), strict=True):
            ours.copy_(theirs, non_blocking=non_blocking)
        return
    target.copy_(source, non_blocking=non_blocking)
