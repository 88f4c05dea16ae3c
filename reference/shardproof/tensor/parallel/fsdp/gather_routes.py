"""Which ranks hold the elements that one rank gathers from a DTensor over the root mesh.

Arithmetic on sizes: no tensor data, no process group, no communication. A model has few distinct
sizes, so it is remembered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from shardproof._core.sharding.blocks import Block, Cut, Region, block_at
from shardproof._core.sharding.ranks import coordinates_along

__all__ = ["Route", "route_of"]


class Route(NamedTuple):
    """How a rank gets its part.

    Attributes:
        target: the part.
        dims: the mesh dimensions to gather over; none where the rank holds the part.
        coordinates: of the ranks that send, in the order in which their rows arrive.
        blocks: what each of them holds.
        width: elements of the largest block.
        stacked: whether the rows, one after the other, are the part.
        writes: for each row, (where in the part, from where in the block) of what it contributes.

    """

    target: Block
    dims: tuple[int, ...]
    coordinates: tuple[tuple[int, ...], ...] = ()
    blocks: tuple[Block, ...] = ()
    width: int = 0
    stacked: bool = False
    writes: tuple[tuple[tuple[Region, Region], ...], ...] = ()


@lru_cache(maxsize=4096)
def route_of(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    cuts: tuple[Cut, ...],
    here: tuple[int, ...],
) -> Route:
    """The way of what the rank at ``here`` needs, where it needs all but the last dimension's cut.

    Args:
        shape: the global shape.
        mesh_shape: of the root mesh.
        cuts: how the tensor is sharded over it.
        here: this rank's coordinate.

    """
    kept = len(mesh_shape) - 1
    outer = sorted({cut.mesh_dim for cut in cuts} - {kept})
    dims = [d for d in outer if mesh_shape[d] > 1]
    inner = tuple(cut for cut in cuts if cut.mesh_dim == kept)
    target = block_at(shape, mesh_shape, inner, here)
    if not dims or target.region is None:
        return Route(target, tuple(dims))
    if not _line_holds_target(shape, mesh_shape, cuts, kept):
        dims.append(kept)
    coordinates = coordinates_along(here, dims, mesh_shape)
    blocks = tuple(block_at(shape, mesh_shape, cuts, c) for c in coordinates)
    return Route(
        target,
        tuple(dims),
        tuple(coordinates),
        blocks,
        max(block.numel for block in blocks),
        _rows_are_target(blocks, target),
        tuple(tuple(_common_regions(target, block)) for block in blocks),
    )


def _common_regions(target: Block, block: Block) -> Iterator[tuple[Region, Region]]:
    """(region of ``target``, region of ``block``) of what is in both."""
    assert target.region is not None
    for there, source in block.regions(tuple((0, size) for size in block.shape)):
        into, out = [], []
        for goal, found, held in zip(target.region, there, source, strict=True):
            start, stop = max(goal.start, found.start), min(goal.stop, found.stop)
            if start >= stop:
                break
            into.append(slice(start - goal.start, stop - goal.start))
            shift = held.start - found.start
            out.append(slice(start + shift, stop + shift))
        else:
            yield tuple(into), tuple(out)


def _rows_are_target(blocks: Sequence[Block], target: Block) -> bool:
    """Whether equal blocks, one after the other, are the row-major bytes of ``target``."""
    start, size = target.starts, blocks[0].shape
    if start is None or any(block.shape != size for block in blocks):
        return False
    dim = next((d for d, length in enumerate(target.shape) if length > 1), 0)
    if (*target.shape[:dim], *target.shape[dim + 1 :]) != (*size[:dim], *size[dim + 1 :]):
        return False
    if size[dim] * len(blocks) != target.shape[dim]:
        return False
    expected = (
        (*start[:dim], start[dim] + index * size[dim], *start[dim + 1 :])
        for index in range(len(blocks))
    )
    return all(block.starts == at for block, at in zip(blocks, expected, strict=True))


@lru_cache(maxsize=4096)
def _line_holds_target(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], cuts: tuple[Cut, ...], kept: int
) -> bool:
    """Whether the ranks that differ in all dimensions but ``kept`` hold what one of them needs."""
    inner = [cut for cut in cuts if cut.mesh_dim == kept]
    outer = [cut for cut in cuts if cut.mesh_dim != kept]
    if {cut.tensor_dim for cut in inner}.isdisjoint(cut.tensor_dim for cut in outer):
        return True
    dims = [cut.mesh_dim for cut in outer]
    for here in coordinates_along([0] * len(mesh_shape), [kept], mesh_shape):
        target = block_at(shape, mesh_shape, tuple(inner), here)
        line = coordinates_along(here, dims, mesh_shape)
        if sum(_common(target, block_at(shape, mesh_shape, cuts, c)) for c in line) < target.numel:
            return False
    return True


def _common(one: Block, other: Block) -> int:
    """How many elements are in both."""
    return math.prod(
        sum(max(min(b, d) - max(a, c), 0) for a, b in ours for c, d in theirs)
        for ours, theirs in zip(one.runs, other.runs, strict=True)
    )
