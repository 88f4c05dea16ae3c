"""Load a checkpoint's files on another mesh: all ranks in a row, tensors cut by rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from shardproof._prove import roads, saved
from shardproof._prove.compare import Difference
from shardproof._prove.digests import digest, sum_of
from shardproof._prove.placements import part_of
from shardproof._prove.roads import Job

_QUANTIZED = (torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4)
Whole = dict[str, tuple[list[int], str, int]]
"""Of whole tensors: shape, dtype and digest."""


def keys_of(job: Job, known: Whole) -> list[str]:
    """The tensors that this rank's state dict has, and whose whole digests are known."""
    return [
        key
        for key, _, value in saved.entries(job.get(), job.side)
        if key in known and value.dtype not in _QUANTIZED
    ]


def load(job: Job, folder: Path, known: Whole, keys: set[str]) -> dict[str, int]:
    """Read the files into other shards: the digests of this rank's part of each tensor.

    Nothing live is written: the shards are new, and go again.
    """
    state = job.get()
    params = (param for model in job.models for param in model.parameters())
    device = next((param.device.type for param in params), "cpu")
    # Of a group that is there: one made here would stay with the job.
    everybody = dist.group.WORLD
    assert everybody is not None
    mesh = DeviceMesh.from_group(everybody, device, mesh_dim_names=("prove",))
    template: dict[str, Any] = {}
    parts = {}
    for key, path in _paths(state, job.side):
        if key not in keys:
            continue
        shape, _, _ = known[key]
        placement = Shard(0) if shape else Replicate()
        part = part_of(shape, [placement], (job.size,), (job.rank,))
        local = torch.zeros(part.local_shape, dtype=_at(state, path).dtype, device=device)
        made = DTensor.from_local(
            local,
            mesh,
            [placement],
            run_check=False,
            shape=torch.Size(shape),
            stride=_strides(shape),
        )
        parts[key] = (part, local)
        _put(template, path, made)
    roads.dcp.load(template, checkpoint_id=folder)
    return {key: digest(local, part.places()) for key, (part, local) in parts.items()}


def differences(side: str, known: Whole, every: list[dict[str, str]]) -> list[Difference]:
    """What differs from the job, from the digests of all ranks."""
    found = []
    for key in every[0]:
        shape, _, expected = known[key]
        got = [int(one[key], 16) for one in every]
        if (sum_of(got) if shape else got[0]) != expected:
            what = "has other values when its files are read on another mesh"
            found.append(Difference(side, "values", key, what))
    return found


def _paths(state: dict[str, Any], side: str) -> list[tuple[str, tuple[str, ...]]]:
    if side == "model":
        return [(key, ("model", name)) for key, name, _ in saved.entries(state, side)]
    found: list[tuple[str, tuple[str, ...]]] = []
    for key, name, _ in saved.entries(state, side):
        entry = key.removesuffix(f" of {name}")
        if entry in state["optimizer"]["state"][name]:  # others lie in containers
            found.append((key, ("optimizer", "state", name, entry)))
    return found


def _at(state: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        state = state[key]
    return state


def _put(state: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        state = state.setdefault(key, {})
    state[path[-1]] = value


def _strides(shape: list[int]) -> tuple[int, ...]:
    found = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        found[dim] = found[dim + 1] * shape[dim + 1]
    return tuple(found)
