"""Tensor subclasses that bring operations of their own, and only those that they need.

Quantised weights, wrappers of other tensors, fake tensors: what they hold lies in no memory of
theirs, and only their own operations move it. So for them nothing is asked here but what torch's
twin of the function asks; where one operation more would keep the live weight apart from a copy,
it is tried, and done without.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from shardproof._state_dict_utils.subclasses import PLAIN, settled

__all__ = ["alias", "finish", "has_own_operations", "own_copy", "piece"]

_NONE: Any = torch.Tensor.__torch_dispatch__


def has_own_operations(tensor: torch.Tensor) -> bool:
    """Whether operations on ``tensor`` go through Python code of its type."""
    kind: Any = type(tensor)
    return kind not in PLAIN and kind.__torch_dispatch__ is not _NONE


def finish(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, waited for with all that it holds.

    What a wrapper holds is replaced by the finished tensor in place: the wrapper stays the same
    object, and needs no operation for it.
    """
    tensor = settled(tensor)
    if has_own_operations(tensor):
        for name, held in _held(tensor):
            done = finish(held)
            if done is not held:
                setattr(tensor, name, done)
    return tensor


def _held(tensor: Any) -> list[tuple[str, torch.Tensor]]:
    """(attribute, tensor) of what a wrapper holds, also where it tells nobody."""
    if hasattr(type(tensor), "__tensor_flatten__"):
        found = [(name, getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
    else:
        found = list(getattr(tensor, "__dict__", {}).items())
    return [(name, held) for name, held in found if isinstance(held, torch.Tensor)]


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` over the same memory, detached; itself where its type has no way to do that.

    Of a type that has a view alone it is one, which requires grad as long as the tensor does.
    """
    if not has_own_operations(tensor):
        return tensor.detach()
    # Whatever a type raises for an operation that it lacks: torch prescribes nothing.
    with suppress(Exception):
        return tensor.detach()
    with suppress(Exception), torch.no_grad():
        return tensor.view_as(tensor)
    return tensor


def piece(tensor: torch.Tensor, dim: int, parts: int, index: int) -> torch.Tensor:
    """The piece that ``torch.chunk`` gives to ``index``, an empty one where it gives none."""
    found = torch.chunk(tensor, parts, dim)
    if index < len(found):
        return found[index]
    shape = list(tensor.size())
    shape[dim] = 0
    return tensor.new_zeros(shape)


def own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in memory of its own; ``tensor`` itself where its type has no way to copy."""
    with suppress(Exception), torch.no_grad():
        return tensor.clone()
    with suppress(Exception):
        return _rebuilt(tensor)
    return tensor


def _rebuilt(tensor: Any) -> torch.Tensor:
    """A wrapper of the same type around copies of what it holds."""
    names, context = tensor.__tensor_flatten__()
    inner = {name: own_copy(getattr(tensor, name)) for name in names}
    made: torch.Tensor = type(tensor).__tensor_unflatten__(
        inner, context, tensor.size(), tensor.stride()
    )
    return made
