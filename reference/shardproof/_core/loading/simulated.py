"""Simulated ranks: one process plays all of them, or none at all.

Under torch's ``LocalTensorMode`` sizes and coordinates are symbolic and every tensor holds the
values of each rank; under ``FakeTensorMode`` tensors have no values. There is nobody to agree with,
and nothing that arithmetic on this rank's coordinate could say: DTensor's own operations do it all.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from shardproof._core.containers.walk import Walk
from shardproof._core.sharding.simulated_ranks import plays_all_ranks
from shardproof._core.tensors.subclasses import settled_result
from shardproof._state_dict_utils.iterate import (
    check_leaf_types,
    copy_leaf_value,
    on_this_rank,
    snapshot,
)


def simulates_ranks() -> bool:
    """Whether a mode is active under which ranks or values are made up."""
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return True
    return plays_all_ranks()


def gather_simulated(
    state_dict: dict[str, Any],
    pg: dist.ProcessGroup | None,
    cpu_offload: bool,
    ranks_only: tuple[int, ...],
    type_check: bool,
) -> dict[str, Any]:
    """What ``_gather_state_dict`` returns where ranks are simulated."""
    walk = Walk(state_dict)
    if type_check:
        check_leaf_types(walk)
    results: list[Any] = []
    known: dict[int, torch.Tensor] = {}
    for value in walk.leaves:
        if not isinstance(value, torch.Tensor):
            results.append(copy_leaf_value(value))
            continue
        if id(value) not in known:
            whole = value
            if isinstance(value, DTensor):
                placements = [Replicate()] * value.device_mesh.ndim
                whole = settled_result(value.redistribute(placements=placements).to_local())
            device = torch.device("cpu") if cpu_offload else whole.device
            known[id(value)] = snapshot(whole, device)
        results.append(known[id(value)])
    if not on_this_rank(ranks_only, pg):
        return {}
    result: dict[str, Any] = walk.rebuilt(results)
    return result


def land_simulated(
    held: DTensor, full: torch.Tensor, device: torch.device, in_place: bool
) -> DTensor:
    """The DTensor ``held`` with the values of a full tensor, where ranks are simulated."""
    full = full.to(device=device, dtype=held.dtype)
    # Each rank that is played cuts its part itself.
    landed = distribute_tensor(full, held.device_mesh, held.placements, src_data_rank=None)
    if not in_place or held._local_tensor.is_meta:
        return landed
    held._local_tensor.copy_(landed._local_tensor)
    return held


def load_simulated(
    full: dict[Any, Any],
    local: dict[Any, Any],
    keys: Iterable[Any],
    device: torch.device,
    cpu_offload: bool,
) -> None:
    """What ``_broadcast_state_dict`` does for ``keys`` where ranks are simulated."""
    landed: dict[Any, Any] = {}
    for key in keys:
        if key not in local:
            continue
        held, value = local[key], full[key]
        if not isinstance(value, torch.Tensor):
            landed[key] = copy.deepcopy(value)
        elif isinstance(held, DTensor):
            landed[key] = land_simulated(held, value, device, in_place=not cpu_offload)
        elif held is not None or not value.dim():
            landed[key] = snapshot(value, device).detach()
        if cpu_offload and isinstance(landed.get(key), torch.Tensor):
            landed[key] = landed[key].cpu()
    local.update(landed)
