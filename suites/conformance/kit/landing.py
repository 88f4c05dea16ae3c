"""Whole tensors that land in sharded ones: targets to land in, and what must be in them after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from conformance.kit.compare import assert_same, local
from conformance.kit.data import numbers
from conformance.kit.layouts import dtensor, part


def blank(full: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor of the same shape with other values."""
    return numbers(*full.shape, dtype=dtype or full.dtype, salt=2, device=full.device)


def target(
    full: torch.Tensor,
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    *,
    dtype: torch.dtype | None = None,
    meta: bool = False,
) -> DTensor:
    """A DTensor that `full` can land in: of its shape, with other values, on meta with none."""
    other = torch.empty(full.shape, dtype=dtype or full.dtype, device="meta")
    return dtensor(other if meta else blank(full, dtype), mesh, placements)


def assert_landed(
    got: Any, full: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement], what: str
) -> None:
    """`got` is the DTensor with this mesh and placements that holds `full`, bit for bit."""
    assert isinstance(got, DTensor), f"{what}: expected a DTensor, got {type(got).__name__}"
    assert got.device_mesh == mesh, f"{what}: on {got.device_mesh}, expected {mesh}"
    assert got.placements == tuple(placements), (
        f"{what}: placed {got.placements}, expected {tuple(placements)}"
    )
    assert got.shape == full.shape, (
        f"{what}: shape {tuple(got.shape)}, expected {tuple(full.shape)}"
    )
    assert got.dtype == full.dtype, f"{what}: dtype {got.dtype}, expected {full.dtype}"
    mine = local(got)
    assert not isinstance(mine, AsyncCollectiveTensor), f"{what}: not waited for"
    if mesh.get_coordinate() is not None:
        assert_same(mine, part(full, mesh, placements), f"{what}, local tensor")
