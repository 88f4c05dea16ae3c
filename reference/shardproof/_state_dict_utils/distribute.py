"""From full tensors that every rank holds to each rank's shards. Nothing communicates."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from shardproof._core.containers.container_types import assign
from shardproof._core.containers.leaf_values import copy_or_value
from shardproof._core.loading.simulated import check_simulated, fill_simulated
from shardproof._core.loading.target_spec import TargetSpec
from shardproof._core.loading.targets import Target, TargetFactory, last_of_tied
from shardproof._core.loading.value_checks import check_kinds, plain_full_tensor
from shardproof._core.sharding.dtensors import with_local
from shardproof._core.sharding.ranks import same_ranks
from shardproof._core.sharding.simulated_ranks import simulates_ranks
from shardproof._core.tensors.inference_mode import outside_inference_mode
from shardproof._core.tensors.properties import CPU
from shardproof._core.tensors.subclasses import PLAIN, has_own_function
from shardproof._core.tensors.ties import tie_key
from shardproof._core.tensors.values import copies_of_each, fresh_copy


@outside_inference_mode
@torch.no_grad()
def _distribute_state_dict(
    full_state_dict: dict[str, Any],
    local_state_dict: dict[str, Any],
    device: torch.device,
    pg: dist.ProcessGroup | None = None,  # noqa: ARG001
) -> None:
    """Load a full state dict that is on this rank into its local one.

    Args:
        full_state_dict: flat; full tensors or other values. Not changed.
        local_state_dict: flat; the output.
        device: where new tensors are made.
        pg: accepted for the signature; no group is used.

    After it, for each key that both have: a DTensor target is replaced by a new DTensor on
    ``device`` with its mesh, placements and dtype; a plain target by a copy of the full tensor,
    of whatever class, shape, dtype and layout, which its module adapts in its load hooks or
    refuses. Where a target is on meta, so that the module is given what lands, floating-point
    tensors take the target's dtype. A 0-dim tensor for a plain target comes out on the CPU. None
    stays None where a tensor with dimensions is offered. A DTensor that is placed as its target
    is copied. Values that are no tensors are copied, where their class can be. Tied targets stay
    tied: the last key of the full state dict wins. No key is added.

    Raises, on this rank and before anything changes:
        TypeError: the full state dict has a ShardedTensor, or a DTensor for one that is placed
            otherwise; a target is a ShardedTensor; or one of both is a number and the other a
            tensor with dimensions.
        ValueError: shape, dtype or layout of a full tensor do not fit a DTensor.

    No collective runs, so a rank whose full state dict is empty keeps what it has and nobody
    waits (pytorch#157781).

    """
    device = torch.device(device)
    values: dict[str, Any] = {}
    targets = TargetFactory(in_place=False)
    targets.classify(local_state_dict)
    simulated = simulates_ranks()
    found: dict[str, tuple[Target, torch.Tensor]] = {}
    of_classes: dict[Hashable, torch.Tensor] = {}  # their classes copy them, as they do in torch
    for key, value in full_state_dict.items():
        if key not in local_state_dict:
            continue
        held = local_state_dict[key]
        if not isinstance(value, torch.Tensor):
            check_kinds(key, held, type(value).__name__, 0)
            values[key] = copy_or_value(value)
            continue
        if isinstance(value, DTensor):
            values[key] = _copy_of_placed(key, value, held, device)
            continue
        full = plain_full_tensor(key, value)
        if not isinstance(held, torch.Tensor):
            check_kinds(key, held, "Tensor", full.dim())
        elif simulated and isinstance(held, DTensor):
            check_simulated(key, held, full)
            values[key] = fill_simulated(held, full, device, in_place=False)
            continue
        if held is None and full.dim():
            continue
        meta = isinstance(held, torch.Tensor) and held.is_meta
        plain = not meta and not isinstance(held, DTensor)
        where = CPU if plain and not full.dim() else device
        if plain and has_own_function(type(value)):
            same = tie_key(full), type(value)  # a state dict has a new object for each name
            if same not in of_classes:
                of_classes[same] = value.detach().to(where, copy=True)
            values[key] = of_classes[same]
            continue
        size, dtype, layout = alike = full.size(), full.dtype, full.layout
        found[key] = targets.target(key, held, size, dtype, where, alike, layout), full
    results = _fill_targets(found)
    assign(local_state_dict, values)
    assign(local_state_dict, results)


@outside_inference_mode
@torch.no_grad()
def _distribute_tensors(
    local_state_dict: dict[str, Any],
    keys: list[str],
    device: torch.device,
    pg: dist.ProcessGroup | None = None,  # noqa: ARG001
) -> None:
    """Turn (DTensor, full tensor) pairs into the DTensors with this rank's part.

    Args:
        local_state_dict: flat; the output. Tensors, None and missing keys stay as they are.
        keys: the keys to look at.
        device: where the local tensor of a meta DTensor is made.
        pg: accepted for the signature; no group is used.

    A DTensor with memory is written in place and stays the same object; a meta one is replaced by
    a new one with its dtype.

    Raises, on this rank and before anything changes:
        TypeError, ValueError: as for :func:`_distribute_state_dict`.

    No collective runs.

    """
    device = torch.device(device)
    targets = TargetFactory(in_place=True)
    simulated = simulates_ranks()
    played: dict[str, tuple[DTensor, torch.Tensor]] = {}
    found: dict[str, tuple[Target, torch.Tensor]] = {}
    for key in keys:
        pair = local_state_dict.get(key)
        if pair is None or isinstance(pair, torch.Tensor):
            continue
        held, value = pair
        full = plain_full_tensor(key, value)
        if simulated:
            check_simulated(key, held, full)
            played[key] = held, full
            continue
        size, dtype, layout = alike = full.size(), full.dtype, full.layout
        found[key] = targets.target(key, held, size, dtype, device, alike, layout), full
    assign(local_state_dict, _fill_targets(found))
    for key, (held, full) in played.items():
        local_state_dict[key] = fill_simulated(held, full, device, in_place=True)


def _copy_of_placed(key: Any, value: DTensor, held: Any, device: torch.device) -> DTensor:
    """A copy of a DTensor that the full state dict has in place of a full tensor."""
    alike = not isinstance(held, DTensor) or (
        same_ranks(value.device_mesh, held.device_mesh) and value.placements == held.placements
    )
    if not alike or value._local_tensor.is_meta:
        raise TypeError(
            f"{key!r}: the full state dict has a DTensor placed {value.placements} on "
            f"{value.device_mesh}, expected a full tensor, or one placed as the target is"
        )
    return with_local(value, fresh_copy(value._local_tensor, device))


_SMALL = 8 << 10
"""Bytes of a full tensor up to which it is cut together with others that are laid out alike: to
copy all of it costs less than to look at its part alone."""
_AT_ONCE = 16
"""So many at once, through 128 KiB at most: more would not be faster."""


def _fill_targets(found: dict[str, tuple[Target, torch.Tensor]]) -> dict[str, Any]:
    """The results by key; of tied targets the last key's values are in all of them."""
    leaders = last_of_tied({key: target for key, (target, _) in found.items()})
    results: dict[str, Any] = {}
    alike: dict[TargetSpec, list[str]] = {}
    for key, (target, full) in found.items():
        spec = target.spec
        if key not in leaders:
            small = spec.copies and type(full) in PLAIN and full.nbytes <= _SMALL
            if small and full.device == spec.device:
                alike.setdefault(spec, []).append(key)
            else:
                results[key] = target.fill_from(full)
        elif spec.keeps:
            # The leader's values are in its memory, and it stays the caller's object.
            results[key] = target.value
    for spec, keys in alike.items():
        results.update(zip(keys, _fill_alike(spec, [found[key] for key in keys]), strict=True))
    return {key: results[key if key in results else leaders[key]] for key in found}


def _fill_alike(spec: TargetSpec, pairs: list[tuple[Target, torch.Tensor]]) -> Iterator[Any]:
    """The results of targets of one model whose new memory is a copy of a part of full tensors."""
    block = spec.block
    if block is None or block.region is None or len(pairs) == 1:
        yield from [target.fill_from(full) for target, full in pairs]
        return
    for begin in range(0, len(pairs), _AT_ONCE):
        some = pairs[begin : begin + _AT_ONCE]
        stacked = torch.stack([full for _, full in some])
        for (target, _), part in zip(some, copies_of_each(stacked[:, *block.region]), strict=True):
            target.memory = part
            yield target.result()
        del stacked
