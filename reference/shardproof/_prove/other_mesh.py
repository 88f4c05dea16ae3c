"""Load a checkpoint's files on another mesh: all ranks in a row, tensors cut by rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from shardproof._prove import saved
from shardproof._prove.compare import Difference
from shardproof._prove.digests import digest, sum_of
from shardproof._prove.exchange import Exchange
from shardproof._prove.placements import part_of
from shardproof._prove.roads import Job


def load(
    job: Job, folder: Path, known: dict[str, tuple[list[int], str, int]], exchange: Exchange
) -> list[Difference]:
    """Read the files into other shards, and compare the digests of the whole tensors.

    Nothing live is written: the shards are new, and go again.
    """
    state = job.get()
    keys = [
        (key, path)
        for key, path in _paths(state, job.side)
        if key in known and isinstance(_at(state, path), torch.Tensor)
    ]
    every = exchange.all("tensors for another mesh", [key for key, _ in keys])
    common = set(every[0]).intersection(*every[1:])
    device = next((p.device.type for p in job.model.parameters()), "cpu")
    # Of a group that is there: one made here would stay with the job.
    everybody = dist.group.WORLD
    assert everybody is not None
    mesh = DeviceMesh.from_group(everybody, device, mesh_dim_names=("prove",))
    template: dict[str, Any] = {}
    parts = {}
    for key, path in keys:
        if key not in common:
            continue
        shape, _, _ = known[key]
        placement = Shard(0) if shape else Replicate()
        part = part_of(shape, [placement], (job.size,), (job.rank,))
        dtype = _at(state, path).dtype
        local = torch.zeros(part.local_shape, dtype=dtype, device=device)
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
    state_dict_loader.load(template, checkpoint_id=folder, no_dist=job.size == 1)
    mine = {key: digest(local, part.places()) for key, (part, local) in parts.items()}
    said = exchange.all("digests on another mesh", {key: f"{mine[key]:x}" for key in mine})
    found = []
    for key in mine:
        shape, _, expected = known[key]
        got = [int(one[key], 16) for one in said]
        if (sum_of(got) if shape else got[0]) != expected:
            what = "has other values when its files are read on another mesh"
            found.append(Difference(job.side, "values", key, what))
    return found


def _paths(state: dict[str, Any], side: str) -> list[tuple[str, tuple[str, ...]]]:
    if side == "model":
        return [(key, ("model", name)) for key, name, _ in saved.entries(state, side)]
    return [
        (key, ("optimizer", "state", name, key.removesuffix(f" of {name}")))
        for key, name, _ in saved.entries(state, side)
    ]


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
