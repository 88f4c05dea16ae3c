"""The walk over a nested state dict.

One walk serves all: Mapping, list and tuple are containers, everything else is a leaf. Containers
keep their type, keys their type and order. A container that holds itself is refused by path.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from shardproof._state_dict_utils.containers import (
    LEAF_TYPES,
    Path,
    empty_like_mapping,
    is_container,
    path_name,
    sequence_of,
)
from shardproof._state_dict_utils.tensors import (
    CPU,
    copy_all,
    copy_leaf,
    difference,
    dress_like,
    fresh_copy,
    geometry,
    kind_of,
    local_of,
    matching,
    requires_grad_of,
    tie_key,
    unwritable,
    with_local,
    with_shards,
    without_data,
)

ABSENT: Final = object()

TensorFunction = Callable[
    [Any, "dist.ProcessGroup | None", "torch.device | None", Any],
    Any,
]
LeafFunction = Callable[[Path, Any, Any], Any]

_IMMUTABLE = (int, float, complex, str, bytes, type(None), frozenset)
_IMMUTABLE_TORCH = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
_MUTABLE = (io.BytesIO, set, bytearray)
_SUPPORTED = (torch.Tensor, *_IMMUTABLE, *_IMMUTABLE_TORCH, *_MUTABLE)
_SHARED = (*_IMMUTABLE[:-1], *_IMMUTABLE_TORCH)


class CompanionMismatch(Exception):  # noqa: N818  (upstream's name)
    """The companion of a state dict has another structure, kind, shape, dtype or placement.

    The message names the path of the leaf and what was expected there.
    """


def _identity_func(
    obj: torch.Tensor,
    pg: dist.ProcessGroup | None,  # noqa: ARG001
    device: torch.device | None,  # noqa: ARG001
    companion_obj: Any,  # noqa: ARG001
) -> torch.Tensor:
    """Return ``obj``: the per-kind function of a walk that changes no tensor."""
    return obj


def map_leaves(
    value: Any,
    leaf: LeafFunction,
    companion: Any = ABSENT,
    refuse: Callable[[Exception], None] | None = None,
) -> Any:
    """Rebuild ``value`` with ``leaf(path, leaf_value, companion_value)`` in place of each leaf.

    Args:
        value: nested containers, or a single leaf.
        leaf: called once per leaf, in the order of the walk.
        companion: walked in parallel. ``ABSENT`` where there is none.
        refuse: told of a container that holds itself, instead of an exception.

    Raises:
        CompanionMismatch: the containers of ``companion`` differ.
        ValueError: a container holds itself.

    """
    return _visit(value, companion, (), set(), leaf, refuse)


def _visit(
    value: Any,
    companion: Any,
    path: Path,
    above: set[int],
    leaf: LeafFunction,
    refuse: Callable[[Exception], None] | None,
) -> Any:
    # One frame per level, no comprehensions: deep nesting must not meet the recursion limit.
    if not is_container(value):
        return leaf(path, value, companion)
    mapping = isinstance(value, Mapping)
    if id(value) in above:
        error = ValueError(f"the container at {path_name(path)!r} holds itself")
        if refuse is None:
            raise error
        refuse(error)
        return None
    above.add(id(value))
    _require_same_container(value, companion, path)
    paired = companion is not ABSENT
    result: Any
    if mapping:
        result = empty_like_mapping(value)
        for key, item in value.items():
            other = companion[key] if paired else ABSENT
            below = (*path, key)
            # The one call saved here is most of what a walk costs.
            if type(item) in LEAF_TYPES:
                result[key] = leaf(below, item, other)
            else:
                result[key] = _visit(item, other, below, above, leaf, refuse)
    else:
        items = []
        for index, item in enumerate(value):
            other = companion[index] if paired else ABSENT
            items.append(_visit(item, other, (*path, index), above, leaf, refuse))
        result = sequence_of(type(value), items)
    above.discard(id(value))
    return result


def _require_same_container(value: Any, companion: Any, path: Path) -> None:
    if companion is ABSENT:
        return
    where = path_name(path)
    if isinstance(value, Mapping):
        if not isinstance(companion, Mapping):
            raise CompanionMismatch(
                f"{where}: expected a mapping, the companion has {kind_of(companion)}"
            )
        if companion.keys() == value.keys():
            return
        missing = [key for key in value if key not in companion]
        extra = [key for key in companion if key not in value]
        if missing or extra:
            raise CompanionMismatch(
                f"{where}: expected the keys of the state dict; the companion lacks {missing} "
                f"and has {extra} more"
            )
        return
    if isinstance(companion, Mapping) or not is_container(companion):
        raise CompanionMismatch(
            f"{where}: expected a {type(value).__name__}, the companion has {kind_of(companion)}"
        )
    if len(companion) != len(value):
        raise CompanionMismatch(
            f"{where}: expected {len(value)} elements, the companion has {len(companion)}"
        )


def check_leaf_type(path: Path, value: Any) -> None:
    """Refuse a leaf that no checkpoint can hold.

    Raises:
        ValueError: names the path and the type.

    """
    if isinstance(value, _SUPPORTED):
        return
    raise ValueError(
        f"{path_name(path)}: unexpected value of type {type(value)}; expected a tensor, a number, "
        "a string, bytes, a set, None, or containers of them"
    )


def copy_leaf_value(value: Any) -> Any:
    """A leaf that is no tensor, safe from later changes of the original."""
    if isinstance(value, _SHARED):
        return value
    return copy.deepcopy(value)


def on_this_rank(ranks_only: tuple[int, ...], pg: dist.ProcessGroup | None) -> bool:
    """Whether the caller wants a result here; ``ranks_only`` counts in the numbering of ``pg``."""
    return not ranks_only or dist.get_rank(pg) in ranks_only


Pair = tuple[Any, Any, tuple[torch.Tensor, torch.Tensor] | None]
"""(target leaf, source leaf, the memory of both where copying that is all there is to do)."""


def fitting(path: Path, value: Any, other: Any) -> Pair:
    """The tensor ``value`` and the companion that takes it.

    Raises:
        CompanionMismatch: it cannot; names the path and the reason.

    """
    if is_tensor(other):
        memory = matching(other, value)
        if memory is not None:
            return other, value, memory
    if reason := difference(value, other) or unwritable(other):
        raise CompanionMismatch(f"{path_name(path)}: {reason} in the companion")
    if without_data(value) != without_data(other):
        bare = "the companion" if without_data(other) else "the state dict"
        raise CompanionMismatch(f"{path_name(path)}: {bare} has a tensor on meta, without data")
    return other, value, None


def copy_pairs(pairs: Iterable[Pair], non_blocking: bool) -> None:
    """Copy leaves, once all of them were found to fit."""
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    with torch.no_grad():
        for target, source, memory in pairs:
            if target is source:
                continue
            if memory is None:
                copy_leaf(target, source, non_blocking)
            else:
                targets.append(memory[0])
                sources.append(memory[1])
        copy_all(targets, sources, non_blocking)


def cpu_snapshot(tensor: torch.Tensor, shared: dict[Hashable, torch.Tensor]) -> torch.Tensor:
    """A copy of any tensor leaf in new CPU memory, Parameter-ness and ``requires_grad`` kept.

    ``shared`` remembers the memory already copied, so that ties stay ties.
    """

    def plain(source: torch.Tensor) -> torch.Tensor:
        key = geometry(source)
        if key in shared:
            return shared[key].detach()
        shared[key] = fresh_copy(source, CPU)
        return shared[key]

    if isinstance(tensor, DTensor):
        return dress_like(with_local(tensor, plain(local_of(tensor))), tensor)
    if isinstance(tensor, ShardedTensor):
        return with_shards(tensor, plain, CPU, requires_grad_of(tensor))
    return dress_like(plain(tensor), tensor)


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

    def check(path: Path, value: Any, other: Any) -> None:
        if type_check:
            check_leaf_type(path, value)
        if other is not ABSENT and (is_tensor(value) != is_tensor(other) or is_container(other)):
            raise CompanionMismatch(
                f"{path_name(path)}: expected a {kind_of(value)}, the companion has "
                f"{kind_of(other)}"
            )

    map_leaves(iter_object, check, companion)

    here = on_this_rank(ranks_only, pg)
    results: dict[Hashable, Any] = {}
    copied: dict[Hashable, torch.Tensor] = {}
    pending: dict[int, Pair] = {}

    def apply(path: Path, value: Any, other: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return copy_leaf_value(value) if here else None
        # Without the Parameter-ness in the key a detached twin would come back as the Parameter.
        key = (
            tie_key(value),
            type(value),
            requires_grad_of(value),
            None if other is ABSENT else id(other),
        )
        if key not in results:
            results[key] = call(value, None if other is ABSENT else other)
        result = results[key]
        if other is ABSENT or not here:
            return result
        pending[id(other)] = fitting(path, result, other)
        return other

    def call(value: torch.Tensor, other: Any) -> Any:
        if isinstance(value, ShardedTensor):
            result = sharded_tensor_func(value, pg, device, other)
        elif isinstance(value, DTensor):
            result = dtensor_func(value, pg, device, other)
        else:
            result = tensor_func(value, pg, device, other)
        offload = cpu_offload and here and companion is ABSENT
        return cpu_snapshot(result, copied) if offload and is_tensor(result) else result

    rebuilt = map_leaves(iter_object, apply, companion)
    copy_pairs(pending.values(), non_blocking)
    if here:
        return rebuilt
    return {} if isinstance(iter_object, Mapping) else None


def is_tensor(value: Any) -> bool:
    """Whether ``value`` is a tensor of any kind."""
    return isinstance(value, torch.Tensor)
