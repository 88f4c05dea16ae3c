"""Which elements of a global tensor each shard holds, by mesh coordinate and placements.

Everything here is arithmetic on sizes: no tensor data, no process group, no communication. A
shard is described per tensor dimension by *runs*, half-open intervals of global indices in the
order in which the shard stores them. A plain ``Shard`` yields one run, a ``_StridedShard`` one
per split, and a dimension that is not sharded the whole interval.

An element range of a shard (row-major, as bytes travel) is cut into rectangles by
:func:`rectangles`, and a rectangle of a shard into rectangles of the global tensor by
:meth:`Block.regions`. Together they let a byte stream be cut anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise, product
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.placement_types import (
    Partial,
    Placement,
    Replicate,
    Shard,
    _StridedShard,
)

from shardproof._core.sharding.ranks import my_shard_number
from shardproof._core.sharding.simulated_ranks import for_each_rank

_LOCAL_SHAPES: WeakKeyDictionary[DeviceMesh, dict[Hashable, tuple[int, ...]]] = WeakKeyDictionary()

Run = tuple[int, int]
Runs = tuple[Run, ...]
Region = tuple[slice, ...]


class Cut(NamedTuple):
    """One application of sharding: ``splits`` pieces, each chunked over the mesh dimension."""

    tensor_dim: int
    mesh_dim: int
    splits: int


@dataclass(frozen=True)
class Block:
    """One shard: the runs of global indices that it holds, per tensor dimension.

    Where it is one rectangle, ``region`` is that part of the global tensor and ``starts`` its
    offset there.
    """

    runs: tuple[Runs, ...]
    shape: tuple[int, ...]
    numel: int
    region: Region | None = field(compare=False, hash=False)
    starts: tuple[int, ...] | None = field(compare=False, hash=False)

    def regions(self, box: Sequence[Run]) -> Iterator[tuple[Region, Region]]:
        """Pairs (region of the global tensor, region of ``box``) that cover ``box``."""
        per_dim = [_overlaps(runs, lo, hi) for runs, (lo, hi) in zip(self.runs, box, strict=True)]
        for choice in product(*per_dim):
            yield tuple(pair[0] for pair in choice), tuple(pair[1] for pair in choice)


def make_block(runs: Sequence[Runs]) -> Block:
    """A block from its runs."""
    shape = tuple(_length(dim_runs) for dim_runs in runs)
    region = starts = None
    if all(len(dim_runs) == 1 for dim_runs in runs):
        region = tuple(slice(*dim_runs[0]) for dim_runs in runs)
        starts = tuple(dim_runs[0][0] for dim_runs in runs)
    return Block(tuple(runs), shape, math.prod(shape), region, starts)


def box_block(offsets: Sequence[int], sizes: Sequence[int]) -> Block:
    """The block of one rectangle of the global tensor."""
    return make_block([((o, o + s),) for o, s in zip(offsets, sizes, strict=True)])


@lru_cache(maxsize=4096)
def full_block(shape: tuple[int, ...]) -> Block:
    """The block that is the whole tensor."""
    return box_block((0,) * len(shape), shape)


def cuts_of(spec: DTensorSpec) -> tuple[Cut, ...]:
    """The shardings of ``spec`` in the order in which they apply.

    Raises:
        ValueError: a placement of unknown kind.

    """
    return _cuts(len(spec.shape), tuple(spec.placements), getattr(spec, "shard_order", None))


def has_other_order(spec: DTensorSpec) -> bool:
    """Whether mesh dimensions of one tensor dimension apply in another order than the mesh's."""
    return any(
        first > then
        for entry in getattr(spec, "shard_order", None) or ()
        for first, then in pairwise(entry.mesh_dims)
    )


@lru_cache(maxsize=4096)
def _cuts(ndim: int, placements: tuple[Placement, ...], order: Any) -> tuple[Cut, ...]:
    found: list[Cut] = []
    for mesh_dim, placement in enumerate(placements):
        if isinstance(placement, _StridedShard):
            splits = int(placement.split_factor)
            found.append(Cut(placement.dim % max(ndim, 1), mesh_dim, splits))
        elif isinstance(placement, Shard):
            found.append(Cut(placement.dim % max(ndim, 1), mesh_dim, 1))
        elif not isinstance(placement, (Replicate, Partial)):
            raise ValueError(f"placement {placement} of unknown kind {type(placement).__name__}")
    strided = any(cut.splits != 1 for cut in found)
    if order is None or strided:
        return tuple(found)
    # The spec may have the mesh dimensions of one tensor dimension apply in another order.
    rank_of = {
        (int(entry.tensor_dim), int(mesh_dim)): order_in_dim
        for entry in order
        for order_in_dim, mesh_dim in enumerate(entry.mesh_dims)
    }
    return tuple(
        sorted(found, key=lambda cut: rank_of.get((cut.tensor_dim, cut.mesh_dim), cut.mesh_dim))
    )


def split_dims(cuts: Sequence[Cut], mesh_shape: Sequence[int]) -> tuple[int, ...]:
    """The mesh dimensions along which ranks hold different shards."""
    return tuple(sorted({cut.mesh_dim for cut in cuts if mesh_shape[cut.mesh_dim] > 1}))


@lru_cache(maxsize=16384)
def block_at(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    cuts: tuple[Cut, ...],
    coordinate: tuple[int, ...],
) -> Block:
    """The shard that the mesh coordinate holds of a tensor of ``shape``."""
    runs: list[Runs] = [((0, size),) for size in shape]
    for cut in cuts:
        parts, index = mesh_shape[cut.mesh_dim], coordinate[cut.mesh_dim]
        held = runs[cut.tensor_dim]
        kept: list[Run] = []
        length = _length(held)
        for split in range(cut.splits):
            start, stop = _chunk(length, cut.splits, split)
            lo, hi = _chunk(stop - start, parts, index)
            kept.extend((g.start, g.stop) for g, _ in _overlaps(held, start + lo, start + hi))
        runs[cut.tensor_dim] = tuple(kept) or ((0, 0),)
    return make_block([_merged(dim_runs) for dim_runs in runs])


def spec_block(spec: DTensorSpec, coordinate: Sequence[int]) -> Block:
    """The shard that ``spec`` gives to the mesh coordinate."""
    return block_at(
        tuple(spec.shape), tuple(spec.mesh.shape), cuts_of(spec), tuple(map(int, coordinate))
    )


def local_shape(spec: DTensorSpec) -> tuple[int, ...]:
    """The shape of this rank's local tensor; ``(0,)`` on a rank outside the mesh."""
    mesh = spec.mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return (0,)
    shapes = _LOCAL_SHAPES.setdefault(mesh, {})
    # Forwards ask for the same few shapes again and again.
    key = (tuple(coordinate), spec.placements, spec.shape, getattr(spec, "shard_order", None))
    try:
        shape = shapes.get(key)
    except TypeError:
        # Where one process plays all ranks a coordinate is no number, and has no hash.
        return _shape_at(spec, list(coordinate))
    if shape is None:
        shape = shapes[key] = spec_block(spec, coordinate).shape
    return shape


def may_be_local_shape(spec: DTensorSpec, shape: Sequence[int]) -> bool:
    """Whether torch makes local tensors of this shape here.

    On a mesh that lists its ranks out of order it takes the sizes of uneven shards now from the
    coordinate, as ``distribute_tensor`` does, now from the number in the group.
    """
    if tuple(shape) == local_shape(spec):
        return True
    mine = my_shard_number(spec.mesh, split_dims(cuts_of(spec), spec.mesh.shape))
    return mine is not None and tuple(shape) == spec_block(spec, mine).shape


@for_each_rank
def _shape_at(spec: DTensorSpec, coordinate: Sequence[int]) -> tuple[int, ...]:
    return spec_block(spec, coordinate).shape


def partial_dims(placements: Sequence[Placement]) -> dict[int, str | type[Partial]]:
    """Mesh dimension -> pending reduction, for the dimensions with one.

    A kind of partial of its own, as norms have, stands for its reduction: it needs more than an
    operation on the values.
    """
    return dict(_partial_dims(tuple(placements), tuple(map(type, placements))))


# Asking a placement for its class costs microseconds, and models have few distinct placements. The
# types are part of the question, because a kind of partial of its own may equal the plain one.
@lru_cache(maxsize=4096)
def _partial_dims(
    placements: tuple[Placement, ...], types: tuple[type, ...]
) -> tuple[tuple[int, str | type[Partial]], ...]:
    return tuple(
        (mesh_dim, str(placement.reduce_op) if kind is Partial else kind)
        for mesh_dim, (placement, kind) in enumerate(zip(placements, types, strict=True))
        if isinstance(placement, Partial)
    )


def rectangles(
    shape: Sequence[int], start: int, stop: int
) -> Iterator[tuple[tuple[Run, ...], int, int]]:
    """Cut the row-major element range [start, stop) of ``shape``, not empty, into rectangles.

    Yields (box, first element, element count) in element order; at most ``2 * ndim - 1`` of them.
    """
    if start == 0 and stop == math.prod(shape):
        yield tuple((0, size) for size in shape), 0, stop
        return
    row = math.prod(shape[1:])
    first, last = start // row, stop // row
    if first == last:
        for box, at, count in rectangles(shape[1:], start - first * row, stop - first * row):
            yield ((first, first + 1), *box), first * row + at, count
        return
    if start % row:
        for box, at, count in rectangles(shape[1:], start - first * row, row):
            yield ((first, first + 1), *box), first * row + at, count
        first += 1
    if first < last:
        body = tuple((0, size) for size in shape[1:])
        yield ((first, last), *body), first * row, (last - first) * row
    if stop % row:
        for box, at, count in rectangles(shape[1:], 0, stop - last * row):
            yield ((last, last + 1), *box), last * row + at, count


def _length(runs: Sequence[Run]) -> int:
    return sum(stop - start for start, stop in runs)


def _chunk(size: int, parts: int, index: int) -> Run:
    """One of the pieces that ``torch.chunk`` makes."""
    step = -(-size // parts)
    return min(index * step, size), min((index + 1) * step, size)


def _merged(runs: Sequence[Run]) -> Runs:
    merged: list[Run] = []
    for start, stop in runs:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def _overlaps(runs: Sequence[Run], lo: int, hi: int) -> list[tuple[slice, slice]]:
    """(global interval, interval relative to ``lo``) pairs for positions [lo, hi) of ``runs``."""
    found: list[tuple[slice, slice]] = []
    at = 0
    for start, stop in runs:
        begin, end = max(lo, at), min(hi, at + stop - start)
        if begin < end:
            found.append((slice(start + begin - at, start + end - at), slice(begin - lo, end - lo)))
        at += stop - start
    return found
