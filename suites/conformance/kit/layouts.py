"""Where the elements of a global tensor lie: DTensors and ShardedTensors made without a collective.

The oracle is torch.chunk: `part` cuts what a rank holds out of the whole tensor, and a check
compares with that. Nothing is distributed by the code under test.

Where a mesh lists its ranks out of order, a rank's coordinate and its number in the group of a mesh
dimension differ. What torch moves goes by the number: shards of `fully_shard`, `full_tensor()`.
So do parts here. Functions of FSDP1 go by the coordinate, which their checks pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import (
    ShardedTensorMetadata,
    TensorProperties,
)
from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, _dtensor_spec
from torch.distributed.tensor.placement_types import _StridedShard

R = Replicate()


def S(dim: int) -> Shard:  # noqa: N802 -- the field writes S(0)
    return Shard(dim)


def SS(dim: int, factor: int) -> _StridedShard:  # noqa: N802
    return _StridedShard(dim, split_factor=factor)


ONE_D: list[list[Placement]] = [[R], [S(0)], [S(1)]]
TWO_D: list[list[Placement]] = [
    [R, R],
    [S(0), R],
    [R, S(0)],
    [S(0), S(0)],
    [S(0), S(1)],
    [S(1), S(0)],
    [S(1), S(1)],
    [R, S(1)],
    [SS(0, 2), S(0)],
    [SS(1, 2), S(1)],
]
"""Placements over a 2x2 mesh; [SS(0, 2), S(0)] is FSDP over a weight that TP shards by row."""
SOME_OF_TWO_D = pytest.mark.thorough(but=["R-S1", "S0-S0", "S0-S1", "SS0x2-S0"])
"""One of each kind each run: on one dimension, on both the same, on both others, and strided."""
THREE_D: list[list[Placement]] = [
    [R, S(0), S(1)],
    [R, SS(0, 2), S(0)],
    [S(0), R, S(1)],
    [S(0), S(0), S(0)],
    [R, R, S(0)],
]


def placement_id(placements: Sequence[Placement]) -> str:
    """Placements for a check's id: S0-R, SS0x2-S0."""

    def one(p: Placement) -> str:
        if isinstance(p, _StridedShard):
            return f"SS{p.dim}x{p.split_factor}"
        return f"S{p.dim}" if isinstance(p, Shard) else "R" if isinstance(p, Replicate) else "P"

    return "-".join(map(one, placements))


def _pieces(tensor: torch.Tensor, count: int, dim: int) -> list[torch.Tensor]:
    """torch.chunk, filled up with empty pieces."""
    found = list(torch.chunk(tensor, count, dim))
    empty = tensor.narrow(dim, tensor.shape[dim], 0)
    return found + [empty] * (count - len(found))


def number_in_groups(mesh: DeviceMesh) -> list[int]:
    """This rank's number in the group of each mesh dimension."""
    assert mesh.get_coordinate() is not None, "this rank is not in the mesh"
    return [dist.get_rank(mesh.get_group(dim)) for dim in range(mesh.ndim)]


def part(
    full: torch.Tensor,
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    at: Sequence[int] | None = None,
) -> torch.Tensor:
    """What the rank that is `at` (default: this one, by its numbers) holds of `full`."""
    place = at if at is not None else number_in_groups(mesh)
    for size, index, placement in zip(map(int, mesh.shape), place, placements, strict=True):
        if isinstance(placement, _StridedShard):
            groups = _pieces(full, int(placement.split_factor), placement.dim)
            full = torch.cat(
                [_pieces(g, size, placement.dim)[index] for g in groups], placement.dim
            )
        elif isinstance(placement, Shard):
            full = _pieces(full, size, placement.dim)[index]
    return full


def dtensor(
    full: torch.Tensor,
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    *,
    local: torch.Tensor | None = None,
    at: Sequence[int] | None = None,
) -> DTensor:
    """A DTensor that holds `full`; no collective runs. `local` replaces this rank's `part`."""
    if local is None:
        inside = mesh.get_coordinate() is not None
        local = part(full, mesh, placements, at).clone() if inside else full.new_empty(0)
    return DTensor.from_local(
        local,
        mesh,
        list(placements),
        run_check=False,
        shape=full.shape,
        stride=full.new_empty(full.shape, device="meta").stride(),
    )


def parameter(tensor: torch.Tensor, trains: bool) -> nn.Parameter:
    """The new tensor as a Parameter. A DTensor becomes one itself.

    nn.Parameter() would call its detach(), which torch plays through with fake tensors for each
    layout that it has not met: 5 ms, more than most calls that are judged take.
    """
    if not isinstance(tensor, DTensor):
        return nn.Parameter(tensor, trains)
    found: Any = tensor.requires_grad_(trains)
    found._is_param = True
    return cast(nn.Parameter, found)


def in_another_order(full: torch.Tensor, mesh: DeviceMesh) -> DTensor | None:
    """`full` cut by the second of two mesh dimensions first; None where torch has no such order."""
    entry = getattr(_dtensor_spec, "ShardOrderEntry", None)
    coordinate = mesh.get_coordinate()
    if entry is None or coordinate is None:
        return None
    mine = full.chunk(mesh.size(1))[coordinate[1]].chunk(mesh.size(0))[coordinate[0]]
    spec = _dtensor_spec.DTensorSpec(
        mesh,
        (S(0), S(0)),
        tensor_meta=_dtensor_spec.TensorMeta(full.shape, full.stride(), full.dtype),
        shard_order=(entry(tensor_dim=0, mesh_dims=(1, 0)),),
    )
    return DTensor(mine.clone(), spec, requires_grad=False)


def read_whole(tensor: DTensor) -> torch.Tensor:
    """The global tensor as torch reads it out of the shards; all ranks of the world call it.

    Gloo ends a process in which a DTensor on a device is gathered
    (https://github.com/pytorch/pytorch/issues/152645): there copies are gathered on the CPU.
    """
    mesh = tensor.device_mesh
    if mesh.device_type == "cpu" or dist.get_backend() != "gloo":
        return tensor.full_tensor()
    there = DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
    local = tensor.to_local().detach().cpu()
    whole: torch.Tensor = DTensor.from_local(
        local,
        there,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    ).full_tensor()
    return whole


def sharded_tensor(
    full: torch.Tensor,
    boxes: Sequence[tuple[Sequence[int], Sequence[int], int]],
    group: dist.ProcessGroup | None = None,
) -> ShardedTensor:
    """A ShardedTensor that holds `full` in boxes of (offsets, sizes, owner); no collective runs.

    `owner` is the rank in `group`'s numbering; a shard's placement states the global rank, as
    torch's own constructors have it.
    """
    me = dist.get_rank(group)
    kind = full.device.type
    device = kind if kind == "cpu" else f"{kind}:{full.device.index}"

    def seat(owner: int) -> int:
        return owner if group is None else dist.get_global_rank(group, owner)

    metadata = [ShardMetadata(list(o), list(s), f"rank:{seat(r)}/{device}") for o, s, r in boxes]
    mine = []
    for meta, (offsets, sizes, owner) in zip(metadata, boxes, strict=True):
        if owner == me:
            slices = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            mine.append(LocalShard(full[slices].clone(), meta))
    properties = TensorProperties(dtype=full.dtype)
    with warnings.catch_warnings():
        # torch warns of every new ShardedTensor that the class will go.
        warnings.simplefilter("ignore", FutureWarning)
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            mine,
            ShardedTensorMetadata(metadata, full.size(), properties),
            process_group=group,
        )


def rows(
    size: Sequence[int], counts: Sequence[int], owners: Sequence[int] | None = None, dim: int = 0
) -> list[tuple[list[int], list[int], int]]:
    """Boxes of `counts` slices along `dim`, one after the other, owned by ranks in that order."""
    boxes, start = [], 0
    for index, count in enumerate(counts):
        offsets, sizes = [0] * len(size), list(size)
        offsets[dim], sizes[dim] = start, count
        boxes.append((offsets, sizes, owners[index] if owners else index))
        start += count
    assert start == size[dim], f"{counts} do not add up to {size[dim]}"
    return boxes
