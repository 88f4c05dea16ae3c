"""A state dict rebuilt with one function applied to each kind of tensor."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from shardproof._core.containers.container_types import path_name
from shardproof._core.containers.leaf_values import check_leaf_types, copy_leaf_value
from shardproof._core.containers.walk import ABSENT, CompanionMismatch, Walk
from shardproof._core.copies.companions import (
    are_usual_tensors,
    companion_mismatch,
    copy_into_companions,
)
from shardproof._core.copies.snapshots import cpu_copy, snapshot_by, snapshots_of_tied
from shardproof._core.sharding.ranks import wants_result_here
from shardproof._core.tensors.inference_mode import outside_inference_mode
from shardproof._core.tensors.ties import maybe_tied, parameter_tie_key

_ITSELF = object()
"""Stands for the result of a function that gives a leaf as it is."""

TensorFunction = Callable[
    [Any, "dist.ProcessGroup | None", "torch.device | None", Any],
    Any,
]


def _identity_func(
    obj: torch.Tensor,
    pg: dist.ProcessGroup | None,  # noqa: ARG001
    device: torch.device | None,  # noqa: ARG001
    companion_obj: Any,  # noqa: ARG001
) -> torch.Tensor:
    """Return ``obj``: the per-kind function of a walk that changes no tensor."""
    return obj


def _iterate_state_dict(
    iter_object: Any,
    sharded_tensor_func: TensorFunction,
    dtensor_func: TensorFunction,
    tensor_func: TensorFunction,
    *,
    pg: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
    cpu_offload: bool = False,
    companion_obj: Any = None,
    ranks_only: tuple[int, ...] = (),
    type_check: bool = True,
    non_blocking: bool = True,
) -> Any:
    """Rebuild a state dict with one function applied to each kind of tensor.

    Args:
        iter_object: nested Mapping, list, tuple of leaves, or one leaf. Not changed.
        sharded_tensor_func: called as ``func(leaf, pg, device, companion)`` for ShardedTensor.
        dtensor_func: the same for DTensor.
        tensor_func: the same for any other tensor.
        pg: handed to the functions; its numbering is that of ``ranks_only``.
        device: handed to the functions.
        cpu_offload: put results into CPU memory that is not the state dict's own; without effect
            where ``companion_obj`` is given.
        companion_obj: takes the values. Everything is checked before anything is copied.
        ranks_only: ranks that get a result; empty means all. The functions run on every rank.
        type_check: refuse leaves that no checkpoint can hold; otherwise they are deep-copied.
        non_blocking: how values are copied into ``companion_obj``.

    Returns:
        The same containers around the results; tensors of ``companion_obj`` where it is given.
        Outside ``ranks_only`` ``{}`` for a mapping and None for anything else. A function is
        called once for tied tensors, and they share its result.

    Raises:
        ValueError: an unsupported leaf under ``type_check``, or a container that holds itself.
        CompanionMismatch: structure, kind, shape, dtype or placements differ; nothing was copied.

    No collective runs but those of the functions.

    """
    companion = ABSENT if companion_obj is None else companion_obj
    walk = Walk(iter_object, companion)
    if type_check:
        check_leaf_types(walk)
    if not (are_usual_tensors(walk.leaves) and are_usual_tensors(walk.companions)):
        for index, (value, other) in enumerate(zip(walk.leaves, walk.companions, strict=False)):
            if reason := companion_mismatch(value, other):
                raise CompanionMismatch(f"{path_name(walk.path(index))}: {reason}")

    here = wants_result_here(ranks_only, pg)
    offload = cpu_offload and here and companion is ABSENT
    by_kind = (
        (ShardedTensor, sharded_tensor_func),
        (DTensor, dtensor_func),
        (torch.Tensor, tensor_func),
    )

    @cache
    def function_for(kind: type) -> TensorFunction | None:
        return next((function for base, function in by_kind if issubclass(kind, base)), None)

    others = walk.companions or repeat(None)
    results: list[Any] = []
    called: dict[Hashable, Any] = {}
    tied = list(maybe_tied(walk.leaves))
    take, of = snapshot_by, snapshots_of_tied(walk.leaves, tied if offload else [False] * len(tied))
    if torch.is_inference_mode_enabled():
        take, of = outside_inference_mode(take), outside_inference_mode(of)
    for value, other, shared in zip(walk.leaves, others, tied, strict=False):
        kind: type = type(value)
        function = function_for(kind)
        if function is None:
            results.append(copy_leaf_value(value) if companion is ABSENT else value)
            continue
        key: Hashable = None
        if shared:
            # Without the Parameter-ness in the key a detached twin would come back as the
            # Parameter.
            key = parameter_tie_key(value), None if other is None else id(other)
            if key in called:
                # What a function returns as it is, as the identity does, is each leaf itself.
                known = called[key]
                results.append(value if known is _ITSELF else known)
                continue
        result = function(value, pg, device, other)
        if offload and isinstance(result, torch.Tensor):
            # At once: with all results on their device first there would be two of each. One that
            # is not the leaf may be gone, and its memory another's, before the next is copied.
            result = of(result) if shared and result is value else take(result, cpu_copy)
        if shared:
            called[key] = _ITSELF if result is value else result
        results.append(result)
    if not here:
        return walk.nothing()
    if companion is not ABSENT:
        results = copy_into_companions(walk, results, non_blocking)
    return walk.rebuilt(results)
