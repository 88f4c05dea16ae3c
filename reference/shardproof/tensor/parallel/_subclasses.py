"""Views and pieces of tensors whose class implements operations itself.

Nothing is asked here but what torch's twin of the function asks; where one operation more would
keep the live weight apart from a copy, it is tried, and done without.
"""

from __future__ import annotations

from contextlib import suppress

import torch

from shardproof._core.tensors.subclasses import has_own_operations

__all__ = ["alias", "piece"]


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
