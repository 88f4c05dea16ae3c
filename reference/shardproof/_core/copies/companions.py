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
from shardproof._core.copies.copy_into import CannotTakeError, Pairs
from shardproof._core.copies.snapshots import snapshot
from shardproof._core.tensors.properties import LEAF_TYPES, kind_of

_TENSORS = frozenset({torch.Tensor, nn.Parameter, DTensor, ShardedTensor})


def take(walk: Walk, values: list[Any], non_blocking: bool) -> list[Any]:
    """Copy tensors into the companions of the leaves; the leaves of the result.

    Raises:
        CompanionMismatch: a companion cannot take its tensor; nothing was copied.

    """
    leaves, others = walk.leaves, walk.companions
    results = others.copy()
    places: Sequence[int] = range(len(leaves))
    if not (_all_tensors(leaves) and _all_tensors(others)):
        places = [place for place in places if isinstance(leaves[place], torch.Tensor)]
        for place in set(range(len(leaves))).difference(places):
            if reason := _unlike(leaves[place], others[place]):
                raise CompanionMismatch(f"{path_name(walk.path(place))}: {reason}")
            results[place] = copy_leaf_value(values[place])
        for place in places:
            if others[place] is None:
                # Nothing takes it: optimizers make some of their state with the first step.
                results[place] = snapshot(values[place], values[place].device)
        places = [place for place in places if others[place] is not None]
        values, others = [values[place] for place in places], [others[place] for place in places]
    pairs = Pairs()
    if not pairs.add_all(others, values):
        for place, other, value in zip(places, others, values, strict=True):
            if reason := pairs.add(other, value):
                raise CompanionMismatch(f"{path_name(walk.path(place))}: {reason}")
    try:
        pairs.copy(non_blocking)
    except CannotTakeError as error:
        place, said = error.args
        name = path_name(walk.path(places[place]))
        raise CompanionMismatch(f"{name}: the companion cannot take the tensor: {said}") from error
    return results


def _all_tensors(leaves: list[Any]) -> bool:
    """Whether all are tensors of the usual types; False says nothing."""
    return _TENSORS.issuperset(map(type, leaves))


def _unlike(value: Any, other: Any) -> str | None:
    """Why a companion is nothing that could be in the place of a leaf; None where it could."""
    fits = not isinstance(value, torch.Tensor) or isinstance(other, (torch.Tensor, type(None)))
    if fits and (type(other) in LEAF_TYPES or not is_container(other)):
        return None
    return f"expected a {kind_of(value)}, the companion has {kind_of(other)}"
