"""What FSDP1 hands over when its mesh is cut out of a larger one, and what it expects back.

FSDP1 flattens the TP-local tensor, the part of a weight that tensor parallelism leaves to this
rank, and cuts its rows over the ranks of its own mesh. The last dimension of the root mesh is
TP's, the one before it FSDP's, and those further out hold replicas.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from conformance.kit.compare import assert_same
from conformance.kit.layouts import SS, R, S, dtensor, part, placement_id

HELD: list[Placement | None] = [None, R, S(0), S(1)]
"""How TP holds a weight; None: TP leaves its module alone, and the weight is a plain tensor."""

WHOLE_AND_ROWS = pytest.mark.thorough(but=["R", "S0"])
PLAIN_AND_COLUMNS = pytest.mark.thorough(but=["plain", "S1"])
"""Two of `HELD` each run, one whole and one sharded; the others with --thorough."""

EVEN = [(8, 4), (4, 2, 3), (6, 4), (12, 2)]
"""Shapes that two ranks of TP share alike; FSDP's chunks of them may be uneven."""

UNEVEN = [(5, 3), (7, 5), (3, 1), (1, 1), (2, 7), (9, 3, 2)]
"""Shapes that two ranks do not share alike, in one dimension or in both."""


def held_id(held: Placement | None) -> str:
    """How TP holds a weight, for a check's id."""
    return "plain" if held is None else placement_id([held])


def fsdp_mesh(root: DeviceMesh) -> DeviceMesh:
    """The mesh that FSDP1 was made with: all dimensions of the root but TP's."""
    names = root.mesh_dim_names or ()
    return root[names[:-1]] if root.ndim > 2 else root[names[0]]


def tp_mesh(root: DeviceMesh) -> DeviceMesh:
    """The mesh that the weights' DTensors lie on."""
    return root[(root.mesh_dim_names or ())[-1]]


def fsdp_rank(root: DeviceMesh) -> int:
    """What FSDP1 passes as `rank`: this rank's number in the group that it shards over."""
    return int(root.get_group(root.ndim - 2).rank())


def given(full: torch.Tensor, root: DeviceMesh, held: Placement | None) -> torch.Tensor:
    """The tensor that FSDP1 asks to be chunked: plain, or a DTensor over TP's mesh."""
    tp = tp_mesh(root)
    return full.clone() if held is None else dtensor(full, tp, [held], at=tp.get_coordinate())


def unsharded(root: DeviceMesh, held: Placement | None) -> list[Placement]:
    """Placements over the root mesh before FSDP cuts."""
    return [*[R] * (root.ndim - 1), held or R]


def sharded(root: DeviceMesh, held: Placement | None) -> list[Placement]:
    """Placements over the root mesh after FSDP has cut the TP-local tensor."""
    tp = int(root.shape[-1])
    cut: Placement = SS(0, tp) if held == S(0) and tp > 1 else S(0)
    return [*[R] * (root.ndim - 2), cut, held or R]


def tp_local(full: torch.Tensor, root: DeviceMesh, held: Placement | None) -> torch.Tensor:
    """The part of `full` that TP leaves to this rank."""
    return part(full, root, unsharded(root, held), root.get_coordinate())


def chunk(full: torch.Tensor, root: DeviceMesh, held: Placement | None) -> torch.Tensor:
    """The rows of the TP-local tensor that FSDP leaves to this rank."""
    rows = [*[R] * (root.ndim - 2), S(0), R]
    return part(tp_local(full, root, held), root, rows, root.get_coordinate())


def shards(placement: Placement, dim: int) -> bool:
    """Whether the placement shards that dimension, in whatever spelling."""
    return isinstance(placement, (Shard, _StridedShard)) and placement.dim == dim


def assert_chunked(
    got: Any, full: torch.Tensor, root: DeviceMesh, held: Placement | None, what: str = "result"
) -> None:
    """`got` is the DTensor over the root mesh that holds this rank's chunk of `full`.

    What it says of the other ranks' data shows in `read_whole` only.
    """
    assert isinstance(got, DTensor), f"{what}: expected a DTensor, got {type(got).__name__}"
    assert got.device_mesh == root, f"{what}: on {got.device_mesh}, expected {root}"
    assert got.shape == full.shape, f"{what}: shape {tuple(got.shape)} not {tuple(full.shape)}"
    assert got.dtype == full.dtype, f"{what}: dtype {got.dtype}, expected {full.dtype}"
    *outer, fsdp, tp = got.placements
    assert all(isinstance(p, Replicate) for p in outer), f"{what}: replicas are {got.placements}"
    assert shards(fsdp, 0), f"{what}: FSDP's dimension is {fsdp}; all: {got.placements}"
    same = shards(tp, held.dim) if isinstance(held, Shard) else isinstance(tp, Replicate)
    assert same, f"{what}: TP's dimension is {tp}, expected {held or R}"
    mine = got._local_tensor
    assert not isinstance(mine, AsyncCollectiveTensor), f"{what}: not waited for"
    assert_same(mine, chunk(full, root, held), f"{what}, local tensor")
