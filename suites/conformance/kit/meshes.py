"""Several meshes in one call: beside each other, overlapping, nested, of one rank.

Ranks of one mesh hear of each other in it. Through a rank of two meshes they hear of further ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from conformance.kit.data import numbers
from conformance.kit.layouts import R, S, dtensor

MakeMesh = Callable[..., DeviceMesh]


@dataclass(frozen=True)
class Several:
    """Meshes of some ranks of a world.

    Attributes:
        size: how many ranks they take.
        make: gives (name, mesh, placements) for each; every rank makes all of them.
        near: the ranks that have to hear what goes wrong on `bad`: those of its meshes, and of the
            meshes of these, and so on.
        bad: ranks of which one leaf may be wrong, in the mesh named.

    """

    size: int
    make: Callable[[MakeMesh], list[tuple[str, DeviceMesh, list[Any]]]]
    bad: tuple[tuple[int, str], ...]
    near: tuple[int, ...] | None = None


def _chain(*pairs: tuple[int, int]) -> Callable[[MakeMesh], list[tuple[str, DeviceMesh, Any]]]:
    return lambda mesh: [(f"on {a} and {b}", mesh(2, ranks=[a, b]), [S(0)]) for a, b in pairs]


def _slices(*shape: int) -> Callable[[MakeMesh], list[tuple[str, DeviceMesh, Any]]]:
    """A leaf along each dimension of a mesh, and none over all of it."""

    def make(mesh: MakeMesh) -> list[tuple[str, DeviceMesh, Any]]:
        whole = mesh(*shape, ranks=range(math.prod(shape)))
        return [(name, whole[name], [S(0)]) for name in whole.mesh_dim_names or ()]

    return make


MESHES: dict[str, Several] = {
    "two in a row": Several(3, _chain((0, 1), (1, 2)), ((0, "on 0 and 1"), (2, "on 1 and 2"))),
    "three in a row": Several(
        4, _chain((0, 1), (1, 2), (2, 3)), ((0, "on 0 and 1"), (3, "on 2 and 3"))
    ),
    "in a zigzag": Several(
        5,
        _chain((0, 4), (1, 3), (2, 3), (1, 4)),
        ((0, "on 0 and 4"), (2, "on 2 and 3"), (4, "on 1 and 4")),
    ),
    "apart": Several(4, _chain((0, 1), (2, 3)), ((1, "on 0 and 1"),), near=(0, 1)),
    "each way through a cube": Several(
        8, _slices(2, 2, 2), ((0, "rep"), (7, "tp")), near=tuple(range(8))
    ),
    "nested": Several(
        4,
        lambda mesh: [
            ("all", mesh(4, ranks=range(4)), [S(0)]),
            ("middle", mesh(2, ranks=[1, 2]), [S(0)]),
            ("one", mesh(1, ranks=[3]), [S(0)]),
        ],
        ((2, "middle"), (3, "one"), (0, "all")),
    ),
    "a line and a grid": Several(
        4,
        lambda mesh: [
            ("line", mesh(4, ranks=range(4)), [S(0)]),
            ("grid", mesh(2, 2, ranks=range(4)), [S(0), S(1)]),
            ("turned", mesh(2, 2, ranks=[0, 2, 1, 3]), [S(1), R]),
        ],
        ((3, "grid"), (0, "turned")),
    ),
    "grids of the same ranks": Several(
        4,
        lambda mesh: [
            ("square", mesh(2, 2, ranks=range(4)), [S(0), S(1)]),
            ("tall", mesh(4, 1, ranks=range(4)), [S(0), S(1)]),
            ("wide", mesh(1, 4, ranks=range(4)), [S(1), S(0)]),
        ],
        ((3, "wide"), (0, "tall")),
    ),
    "odd beside even": Several(
        4,
        lambda mesh: [
            ("three", mesh(3, ranks=[1, 2, 3]), [S(0)]),
            ("two", mesh(2, ranks=[0, 1]), [S(1)]),
        ],
        ((3, "three"), (0, "two")),
    ),
}
"""Name -> meshes."""


def fulls(several: Several, mesh: MakeMesh) -> dict[str, torch.Tensor]:
    """The whole tensors by the name of their mesh."""
    return {name: numbers(7, 5, salt=n) for n, (name, _, _) in enumerate(several.make(mesh))}


def leaves(several: Several, mesh: MakeMesh, rank: int, *, blank: bool = False) -> dict[str, Any]:
    """A DTensor on each mesh that this rank is in."""
    found: dict[str, Any] = {}
    wholes = fulls(several, mesh)
    for name, over, placements in several.make(mesh):
        if over.get_coordinate() is not None:
            full = torch.zeros_like(wholes[name]) if blank else wholes[name]
            found[name] = dtensor(full, over, placements)
    return found


def spoilt(leaf: DTensor) -> DTensor:
    """The same, around a local tensor of another shape."""
    leaf._local_tensor = numbers(1, 9)
    return leaf
