"""The gather where one process plays all ranks, or tensors have no values."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from shardproof._core.containers.leaf_values import check_leaf_types, copy_leaf_value
from shardproof._core.containers.walk import Walk
from shardproof._core.copies.snapshots import snapshot
from shardproof._core.sharding.ranks import wants_result_here
from shardproof._core.tensors.subclasses import unwrap_pending


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
                whole = unwrap_pending(value.redistribute(placements=placements).to_local())
            device = torch.device("cpu") if cpu_offload else whole.device
            known[id(value)] = snapshot(whole, device)
        results.append(known[id(value)])
    here = wants_result_here(ranks_only, pg)
    result: dict[str, Any] = walk.rebuilt(results) if here else walk.nothing()
    return result
