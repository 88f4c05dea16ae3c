"""The leaves that a checkpoint can hold, and copies of those that are no tensors."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch

from shardproof._core.containers.container_types import path_name
from shardproof._core.containers.walk import Walk
from shardproof._core.tensors.properties import LEAF_TYPES

_IMMUTABLE = (int, float, complex, str, bytes, type(None), frozenset)
_IMMUTABLE_TORCH = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
_MUTABLE = (io.BytesIO, set, bytearray)
_SUPPORTED = (torch.Tensor, *_IMMUTABLE, *_IMMUTABLE_TORCH, *_MUTABLE)
_SHARED = (*_IMMUTABLE[:-1], *_IMMUTABLE_TORCH)


def check_leaf_types(walk: Walk) -> None:
    """Refuse leaves that no checkpoint can hold.

    Raises:
        ValueError: names the path and the type.

    """
    if LEAF_TYPES.issuperset(map(type, walk.leaves)):
        return
    for index, value in enumerate(walk.leaves):
        if not isinstance(value, _SUPPORTED):
            raise ValueError(
                f"{path_name(walk.path(index))}: unexpected value of type {type(value)}; expected "
                "a tensor, a number, a string, bytes, a set, None, or containers of them"
            )


def copy_leaf_value(value: Any) -> Any:
    """A leaf that is no tensor, safe from later changes of the original."""
    if type(value) in LEAF_TYPES or isinstance(value, _SHARED):
        return value
    try:
        return copy.deepcopy(value)
    except (TypeError, ValueError):
        if isinstance(value, io.BytesIO):
            return value  # closed, or with what cannot be copied: upstream's result is itself
        raise


def copy_or_value(value: Any) -> Any:
    """A copy, or the value itself where its class has none: a lock, a view of a mapping."""
    try:
        return copy.deepcopy(value)
    except Exception:  # A class raises what it likes.
        return value
