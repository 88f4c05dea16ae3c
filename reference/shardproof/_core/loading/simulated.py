"""The broadcast where one process plays all ranks, or tensors have no values.

Under torch's ``LocalTensorMode`` sizes and coordinates are symbolic and every tensor holds the
values of each rank; under ``FakeTensorMode`` tensors have no values. There is nobody to agree with,
and nothing that arithmetic on this rank's coordinate could say: DTensor's own operations do it all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from shardproof._core.containers.leaf_values import copy_or_value
from shardproof._core.copies.snapshots import snapshot


def check_simulated(key: Any, held: Any, full: Any) -> None:
    """Refuse a full tensor of another shape than the DTensor that is to take its values.

    Raises:
        ValueError: the shapes differ; the message names the key.

    """
    if not isinstance(held, DTensor) or not isinstance(full, torch.Tensor):
        return
    # torch's modules take one element for a scalar.
    if held.shape != full.shape and not (held.dim() == 0 and full.shape == (1,)):
        raise ValueError(
            f"{key!r}: the target has shape {tuple(held.shape)}, expected {tuple(full.shape)} "
            "as the full tensor has"
        )


def fill_simulated(
    held: DTensor, full: torch.Tensor, device: torch.device, in_place: bool
) -> DTensor:
    """The DTensor ``held`` with the values of a full tensor, where ranks are simulated."""
    full = full.reshape(held.shape).to(device=device, dtype=held.dtype)
    # Each rank that is played cuts its part itself.
    filled = distribute_tensor(full, held.device_mesh, held.placements, src_data_rank=None)
    if not in_place or held._local_tensor.is_meta:
        return filled
    held._local_tensor.copy_(filled._local_tensor)
    return held


def load_simulated(
    full: dict[Any, Any],
    local: dict[Any, Any],
    keys: Iterable[Any],
    device: torch.device,
    cpu_offload: bool,
) -> None:
    """What ``_broadcast_state_dict`` does for ``keys`` where ranks are simulated."""
    filled: dict[Any, Any] = {}
    wanted = [key for key in keys if key in local]
    for key in wanted:
        check_simulated(key, local[key], full[key])
    for key in wanted:
        held, value = local[key], full[key]
        if not isinstance(value, torch.Tensor):
            filled[key] = copy_or_value(value)
        elif isinstance(held, DTensor):
            filled[key] = fill_simulated(held, value, device, in_place=not cpu_offload)
        elif held is not None or not value.dim():
            filled[key] = snapshot(value, device).detach()
        if cpu_offload and isinstance(filled.get(key), torch.Tensor):
            filled[key] = filled[key].cpu()
    local.update(filled)
