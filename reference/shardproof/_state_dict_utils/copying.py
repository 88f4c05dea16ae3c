"""Copies of a state dict on one rank: snapshot, copy into another, comparison.

Nothing here communicates, so any rank may call these functions alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from shardproof._core.containers.leaf_values import check_leaf_types, copy_leaf_value
from shardproof._core.containers.walk import CompanionMismatch, Walk
from shardproof._core.copies.companions import companion_mismatch, copy_into_companions
from shardproof._core.copies.copy_into import all_matching, difference, matching
from shardproof._core.copies.snapshots import cpu_copy, snapshot_by, snapshots_of_tied
from shardproof._core.sharding.ranks import wants_result_here
from shardproof._core.tensors import pinned_copy
from shardproof._core.tensors.inference_mode import outside_inference_mode
from shardproof._core.tensors.properties import unwrapped
from shardproof._core.tensors.ties import maybe_tied


@outside_inference_mode
def _offload_state_dict_to_cpu(
    state_dict: dict[str, Any],
    *,
    ranks_only: tuple[int, ...] = (),
    type_check: bool = True,
) -> dict[str, Any]:
    """Take a snapshot of a state dict in CPU memory.

    Args:
        state_dict: nested containers of tensors of any kind, shape and dtype. Not changed.
        ranks_only: global ranks that want the snapshot; empty means all.
        type_check: refuse leaves that no checkpoint can hold; otherwise they are deep-copied.

    Returns:
        The same structure over new CPU memory, CPU tensors included (the defect of
        pytorch#144657): later training does not change it. A DTensor stays a DTensor of its mesh
        and placements, a ShardedTensor a ShardedTensor; ties, strides of dense tensors,
        Parameter-ness and ``requires_grad`` survive. Outside ``ranks_only`` ``{}``, without a
        copy.

    Raises:
        ValueError: an unsupported leaf under ``type_check``; names its path.

    No collective runs.

    """
    # Checked on every rank, also where nothing is copied: the ranks have to agree on the error.
    walk = Walk(state_dict)
    if type_check:
        check_leaf_types(walk)
    if not wants_result_here(ranks_only, None):
        return walk.nothing()
    ready = pinned_copy.copy_small_together(walk.leaves)
    tied = list(maybe_tied(walk.leaves))
    of = snapshots_of_tied(walk.leaves, tied)
    results: list[Any] = []
    for index, (value, shared) in enumerate(zip(walk.leaves, tied, strict=True)):
        if not isinstance(value, torch.Tensor):
            results.append(copy_leaf_value(value))
        elif shared:
            results.append(of(value))
        else:
            results.append(snapshot_by(value, cpu_copy, made=ready.get(index)))
    result: dict[str, Any] = walk.rebuilt(results)
    return result


def _copy_state_dict(
    state_dict: dict[str, Any],
    copy_state_dict: dict[str, Any],
    non_blocking: bool = False,
    type_check: bool = True,
) -> dict[str, Any]:
    """Copy the tensors of one state dict into those of another.

    Args:
        state_dict: the values. Not changed.
        copy_state_dict: the tensors that take them, same structure; the order of keys is free.
        non_blocking: whether copies between devices may be pending on return.
        type_check: refuse leaves that no checkpoint can hold; otherwise they are deep-copied.

    Returns:
        The containers and keys of ``state_dict`` over the tensors of ``copy_state_dict``. Leaves
        that are no tensors are those of ``state_dict``, copied where mutable.

    Raises:
        CompanionMismatch: structure, kind, shape, dtype or placements differ somewhere.
        ValueError: an unsupported leaf under ``type_check``.
        After either nothing was copied.

    No collective runs.

    """
    walk = Walk(state_dict, copy_state_dict)
    if type_check:
        check_leaf_types(walk)
    result: dict[str, Any] = walk.rebuilt(copy_into_companions(walk, walk.leaves, non_blocking))
    return result


def _check_state_dict_similarity(
    state_dict: dict[str, Any],
    compared_state_dict: dict[str, Any],
) -> bool:
    """Tell whether two state dicts have the same structure.

    Args:
        state_dict: nested containers of leaves.
        compared_state_dict: the other one.

    Returns:
        True when containers, keys, kinds of tensors (sparse layouts, and wrappers of several,
        included), shapes, dtypes and placements agree. Values, devices, the order of keys, and
        leaves that are no tensors do not matter. Mappings of different type count as the same
        container, and so do list and tuple.

    Reads only, raises nothing on a difference, and runs no collective.

    """
    try:
        walk = Walk(state_dict, compared_state_dict)
    except CompanionMismatch:
        return False
    if all_matching(walk.companions, walk.leaves) is not None:
        return True
    return not any(map(_differ, walk.leaves, walk.companions))


def _differ(value: Any, other: Any) -> bool:
    if matching(other, value):
        return False
    if companion_mismatch(value, other):
        return True
    return difference(value, other) is not None or _other_class(value, other)


def _other_class(value: Any, other: Any) -> bool:
    """Whether one of two tensors wraps what the other does not."""
    ours, theirs = (t._local_tensor if isinstance(t, DTensor) else t for t in (value, other))
    if not isinstance(ours, torch.Tensor) or type(ours) is type(theirs):
        return False
    return unwrapped(ours) is None or unwrapped(theirs) is None
