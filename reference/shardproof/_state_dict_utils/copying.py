"""Copies of a state dict on one rank: snapshot, copy into another, comparison.

Nothing here communicates, so any rank may call these functions alone.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from shardproof._state_dict_utils.containers import Path, is_container, path_name
from shardproof._state_dict_utils.tensors import difference, dressed_tie_key, kind_of
from shardproof._state_dict_utils.traverse import (
    CompanionMismatch,
    Pair,
    check_leaf_type,
    copy_leaf_value,
    copy_pairs,
    cpu_snapshot,
    fitting,
    map_leaves,
    on_this_rank,
)


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
    if type_check:
        map_leaves(state_dict, lambda path, value, _: check_leaf_type(path, value))
    if not on_this_rank(ranks_only, None):
        return {}
    results: dict[Hashable, Any] = {}
    copied: dict[Hashable, torch.Tensor] = {}

    def snapshot(_path: Path, value: Any, _: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return copy_leaf_value(value)
        key = dressed_tie_key(value)
        if key not in results:
            results[key] = cpu_snapshot(value, copied)
        return results[key]

    result: dict[str, Any] = map_leaves(state_dict, snapshot)
    return result


@torch.no_grad()
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
    if copy_state_dict is None:
        raise CompanionMismatch("<root>: expected a mapping, the companion has NoneType")
    pending: dict[int, Pair] = {}

    def pair(path: Path, value: Any, other: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            if type_check:
                check_leaf_type(path, value)
            if isinstance(other, torch.Tensor) or is_container(other):
                raise CompanionMismatch(
                    f"{path_name(path)}: expected a {kind_of(value)}, the companion has "
                    f"{kind_of(other)}"
                )
            return copy_leaf_value(value)
        pending[id(other)] = fitting(path, value, other)
        return other

    result: dict[str, Any] = map_leaves(state_dict, pair, copy_state_dict)
    copy_pairs(pending.values(), non_blocking)
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
        True when containers, keys, kinds of tensors, shapes, dtypes and placements agree. Values,
        devices, the order of keys, and leaves that are no tensors do not matter. Mappings of
        different type count as the same container, and so do list and tuple.

    Reads only, raises nothing on a difference, and runs no collective.

    """

    def compare(_path: Path, value: Any, other: Any) -> None:
        if is_container(other) or difference(value, other):
            raise CompanionMismatch

    try:
        map_leaves(state_dict, compare, compared_state_dict)
    except CompanionMismatch:
        return False
    return True
