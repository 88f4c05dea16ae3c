"""State dicts rebuilt around other leaves: what is asked of each leaf, and what takes its place."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from shardproof._core.containers.container_types import LEAF_TYPES, is_container, path_name
from shardproof._core.containers.walk import ABSENT, CompanionMismatch, Walk
from shardproof._core.copies.copy_into import CannotTakeError, Pairs
from shardproof._core.sharding.sharded_tensors import with_shards
from shardproof._core.tensors.overlapping_copies import Together
from shardproof._core.tensors.ties import dressed_tie_key, maybe_tied
from shardproof._core.tensors.values import (
    CPU,
    dress_like,
    fresh_copy,
    kind_of,
    local_of,
    requires_grad_of,
    with_local,
)

TensorFunction = Callable[
    [Any, "dist.ProcessGroup | None", "torch.device | None", Any],
    Any,
]

_IMMUTABLE = (int, float, complex, str, bytes, type(None), frozenset)
_IMMUTABLE_TORCH = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
_MUTABLE = (io.BytesIO, set, bytearray)
_SUPPORTED = (torch.Tensor, *_IMMUTABLE, *_IMMUTABLE_TORCH, *_MUTABLE)
_TENSORS = frozenset({torch.Tensor, nn.Parameter, DTensor, ShardedTensor})
_SHARED = (*_IMMUTABLE[:-1], *_IMMUTABLE_TORCH)


def _identity_func(
    obj: torch.Tensor,
    pg: dist.ProcessGroup | None,  # noqa: ARG001
    device: torch.device | None,  # noqa: ARG001
    companion_obj: Any,  # noqa: ARG001
) -> torch.Tensor:
    """Return ``obj``: the per-kind function of a walk that changes no tensor."""
    return obj


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
    return copy.deepcopy(value)


def on_this_rank(ranks_only: tuple[int, ...], pg: dist.ProcessGroup | None) -> bool:
    """Whether the caller wants a result here; ``ranks_only`` counts in the numbering of ``pg``."""
    return not ranks_only or dist.get_rank(pg) in ranks_only


def snapshot(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of any tensor leaf in new memory, Parameter-ness and ``requires_grad`` kept."""
    return snapshot_by(tensor, partial(fresh_copy, device=device), device)


def snapshot_by(
    tensor: torch.Tensor,
    copied: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device = CPU,
    made: torch.Tensor | None = None,
) -> torch.Tensor:
    """As :func:`snapshot`; ``copied`` copies plain memory, ``made`` is a copy that is there."""
    if isinstance(tensor, DTensor):
        local = copied(local_of(tensor)) if made is None else made
        return dress_like(with_local(tensor, local), tensor)
    if isinstance(tensor, ShardedTensor):
        return with_shards(tensor, copied, device, requires_grad_of(tensor))
    fresh = copied(tensor) if made is None else made
    return fresh if fresh is tensor else dress_like(fresh, tensor)


cpu_copy = partial(fresh_copy, device=CPU)


def snapshots(leaves: Sequence[Any], tied: Sequence[bool]) -> Callable[[Any], torch.Tensor]:
    """What gives the CPU snapshots of tied leaves: the same object for the same tensor."""
    together = Together((leaf for leaf, ask in zip(leaves, tied, strict=True) if ask), cpu_copy)
    known: dict[Hashable, torch.Tensor] = {}

    def of(value: torch.Tensor) -> torch.Tensor:
        key = dressed_tie_key(value)
        if key not in known:
            known[key] = snapshot_by(value, together.of)
        return known[key]

    return of


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
    if not (_all_tensors(walk.leaves) and _all_tensors(walk.companions)):
        for index, (value, other) in enumerate(zip(walk.leaves, walk.companions, strict=False)):
            if reason := _unlike(value, other):
                raise CompanionMismatch(f"{path_name(walk.path(index))}: {reason}")

    here = on_this_rank(ranks_only, pg)
    offload = cpu_offload and here and companion is ABSENT
    functions = _Functions(sharded_tensor_func, dtensor_func, tensor_func)
    others = walk.companions or repeat(None)
    results: list[Any] = []
    called: dict[Hashable, Any] = {}
    tied = list(maybe_tied(walk.leaves))
    of = snapshots(walk.leaves, tied if offload else [False] * len(tied))
    for value, other, shared in zip(walk.leaves, others, tied, strict=False):
        function = functions[type(value)]
        if function is None:
            results.append(copy_leaf_value(value) if companion is ABSENT else value)
            continue
        key: Hashable = None
        if shared:
            # Without the Parameter-ness in the key a detached twin would come back as the
            # Parameter.
            key = dressed_tie_key(value), None if other is None else id(other)
            if key in called:
                results.append(called[key])
                continue
        result = function(value, pg, device, other)
        if offload and isinstance(result, torch.Tensor):
            # At once: with all results on their device first there would be two of each. One that
            # is not the leaf may be gone, and its memory another's, before the next is copied.
            result = of(result) if shared and result is value else snapshot_by(result, cpu_copy)
        if shared:
            called[key] = result
        results.append(result)
    if not here:
        return {} if isinstance(iter_object, Mapping) else None
    if companion is not ABSENT:
        results = take(walk, results, non_blocking)
    return walk.rebuilt(results)


class _Functions(dict[type, "TensorFunction | None"]):
    """Type of a leaf -> what is called for it; None where it is no tensor."""

    def __init__(self, sharded: TensorFunction, dtensor: TensorFunction, plain: TensorFunction):
        super().__init__()
        self._by_kind = (ShardedTensor, sharded), (DTensor, dtensor), (torch.Tensor, plain)

    def __missing__(self, kind: type) -> TensorFunction | None:
        found = next((function for base, function in self._by_kind if issubclass(kind, base)), None)
        self[kind] = found
        return found


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
