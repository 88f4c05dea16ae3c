"""Copies of all leaves of a state dict into the leaves of another, its companion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from shardproof._core.containers.container_types import is_container, path_name
from shardproof._core.containers.leaf_values import copy_leaf_value
from shardproof._core.containers.walk import CompanionMismatch, Walk
from shardproof._core.copies.copy_into import CannotTakeError, LeafCopies
from shardproof._core.copies.snapshots import snapshot
from shardproof._core.tensors.properties import LEAF_TYPES, kind_of

_TENSORS = frozenset({torch.Tensor, nn.Parameter, DTensor, ShardedTensor})


def copy_into_companions(walk: Walk, values: list[Any], non_blocking: bool) -> list[Any]:
    """Copy tensors into the companions of the leaves; the leaves of the result.

    Raises:
        CompanionMismatch: a companion cannot take its tensor; nothing was copied.

    """
    leaves, others = walk.leaves, walk.companions
    results = others.copy()
    indices: Sequence[int] = range(len(leaves))
    if not (are_usual_tensors(leaves) and are_usual_tensors(others)):
        indices = [index for index in indices if isinstance(leaves[index], torch.Tensor)]
        for index in set(range(len(leaves))).difference(indices):
            if reason := companion_mismatch(leaves[index], others[index]):
                raise CompanionMismatch(f"{path_name(walk.path(index))}: {reason}")
            results[index] = copy_leaf_value(values[index])
        for index in indices:
            if others[index] is None:
                # Nothing takes it: optimizers make some of their state with the first step.
                results[index] = snapshot(values[index], values[index].device)
        indices = [index for index in indices if others[index] is not None]
        values, others = [values[index] for index in indices], [others[index] for index in indices]
    pairs = LeafCopies()
    if not pairs.add_all(others, values):
        for index, other, value in zip(indices, others, values, strict=True):
            if reason := pairs.add(other, value):
                raise CompanionMismatch(f"{path_name(walk.path(index))}: {reason}")
    try:
        pairs.copy(non_blocking)
    except CannotTakeError as error:
        index, message = error.args
        name = path_name(walk.path(indices[index]))
        raise CompanionMismatch(
            f"{name}: the companion cannot take the tensor: {message}"
        ) from error
    return results


def are_usual_tensors(leaves: list[Any]) -> bool:
    """Whether all are tensors of the usual types; False says nothing."""
    return _TENSORS.issuperset(map(type, leaves))


def companion_mismatch(value: Any, other: Any) -> str | None:
    """Why a companion is nothing that could be in the place of a leaf; None where it could."""
    fits = not isinstance(value, torch.Tensor) or isinstance(other, (torch.Tensor, type(None)))
    if fits and (type(other) in LEAF_TYPES or not is_container(other)):
        return None
    if isinstance(value, torch.Size) and isinstance(other, tuple) and len(value) == len(other):
        return None
    return f"expected a {kind_of(value)}, the companion has {kind_of(other)}"
