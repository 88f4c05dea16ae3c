"""Calls of what FSDP1 asks of tensor parallelism: boxes, metadata and chunks, for `tp_roads`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec

from conformance.kit import fsdp1
from conformance.kit.boxes import assert_box, boxes
from conformance.kit.compare import assert_same, local
from conformance.kit.data import DTYPES
from conformance.kit.layouts import ONE_D, THREE_D, TWO_D, R, S
from conformance.kit.roads import Road
from conformance.kit.tp_calls import Roads, each
from conformance.kit.tp_kinds import (
    Kind,
    Seat,
    chunked,
    cut,
    dtensors,
    flat,
    nested,
    place_on,
    plain,
)


def _line_kinds(full: torch.Tensor, seat: Seat) -> Iterator[Kind]:
    layouts = [(mesh, p) for mesh in seat.lines() for p in ONE_D]
    return dtensors(full, seat, layouts, partial=False)


def _described(call: Callable[[Any, Kind, Seat], Any], check: Callable[..., None]) -> Any:
    def make(full: torch.Tensor, seat: Seat) -> Roads:
        return each(
            _line_kinds(full, seat),
            lambda judged, kind: call(judged, kind, seat),
            lambda got, whole, kind: check(got, whole, kind, seat),
        )

    return make


def _place(kind: Kind, full: torch.Tensor, idx: int | None = None) -> Any:
    assert kind.placements is not None
    found = boxes(full.shape, kind.mesh.size(), kind.placements[0])
    return found[place_on(kind.mesh) if idx is None else idx]


def _check_box(got: Any, full: torch.Tensor, kind: Kind, seat: Seat) -> None:
    assert tuple(got[1]) == _place(kind, full)[1], f"{kind.name}: {got}"


def _check_local_box(got: Any, full: torch.Tensor, kind: Kind, seat: Seat) -> None:
    assert_box(got, _place(kind, full), full.shape, kind.name)


def _check_last_box(got: Any, full: torch.Tensor, kind: Kind, seat: Seat) -> None:
    assert_box(got, _place(kind, full, kind.mesh.size() - 1), full.shape, kind.name)


def _check_shard(got: Any, full: torch.Tensor, kind: Kind, seat: Seat) -> None:
    box = (got.shard_offsets, got.shard_sizes)
    assert_box(box, _place(kind, full), full.shape, kind.name)


def _check_metadata(got: Any, full: torch.Tensor, kind: Kind, seat: Seat) -> None:
    assert got.tensor_properties.dtype == full.dtype, f"{kind.name}: {got.tensor_properties}"
    assert tuple(got.size) == tuple(full.shape), f"{kind.name}: {got.size}"
    for number, shard in enumerate(got.shards_metadata):
        box = (shard.shard_offsets, shard.shard_sizes)
        assert_box(box, _place(kind, full, number), full.shape, f"{kind.name} {number}")
        owner = kind.mesh.mesh.tolist()[number]
        assert shard.placement.rank() == owner, f"{kind.name} {number}: {shard.placement}"


def _check_group(got: Any, full: torch.Tensor, kind: Kind, seat: Seat) -> None:
    assert got is kind.mesh.get_group(), f"{kind.name}: another group"


def rewrite_spec(full: torch.Tensor, seat: Seat) -> Roads:
    places: Any = [f"rank:{rank}/cuda:0" for rank in range(seat.world.size)]
    rank = seat.world.rank
    wanted = ["cpu" if at == rank else "cuda:0" for at in range(seat.world.size)]
    shards = [ShardMetadata([at, 0], [1, 2], place) for at, place in enumerate(places)]
    specs = ChunkShardingSpec(0, places), EnumerableShardingSpec(shards)

    def call(judged: Any, kind: Kind) -> Any:
        return [judged(spec, kind.leaf, rank) for spec in specs]

    def check(got: Any, _: torch.Tensor, kind: Kind) -> None:
        for new, spec in zip(got, specs, strict=True):
            assert _devices(new) == wanted, f"{kind.name}: {_devices(new)}"
            assert set(_devices(spec)) == {"cuda:0"}, f"{kind.name}: the spec is changed"

    return each(plain(full, seat), call, check)


def _devices(spec: Any) -> list[str]:
    shards = [shard.placement for shard in getattr(spec, "shards", ())]
    return [str(place.device()) for place in shards or spec.placements]


box = _described(lambda f, k, _: f(k.leaf), _check_box)
box_for = _described(lambda f, k, _: f(k.leaf, k.mesh.size() - 1), _check_last_box)
local_box = _described(lambda f, k, _: f(k.leaf), _check_local_box)
shard_metadata = _described(lambda f, k, seat: f(k.leaf, seat.world.rank), _check_shard)
metadata = _described(lambda f, k, _: f(k.leaf, k.mesh.get_group()), _check_metadata)
group = _described(lambda f, k, _: f(k.leaf), _check_group)


def _column(root: Any) -> Any:
    """The group over which FSDP1 shards."""
    return root.get_group(root.ndim - 2)


def _tp_kinds(full: torch.Tensor, seat: Seat) -> Iterator[Kind]:
    tp = fsdp1.tp_mesh(seat.root())
    yield from plain(full, seat)
    yield from dtensors(full, seat, [(tp, p) for p in ONE_D], partial=False)


def _rows_of(mine: torch.Tensor, group: Any, place: int | None = None) -> torch.Tensor:
    """The rows that torch.chunk gives to this rank of the group, or to another place in it."""
    counts, at = chunked(len(mine), group.size()), group.rank() if place is None else place
    start = sum(counts[:at])
    return mine[start : start + counts[at]]


def innermost(tensor: Any) -> Any:
    """The plain tensor of the one shard here, in a ShardedTensor that may hold others."""
    (shard,) = tensor.local_shards()
    return innermost(shard.tensor) if hasattr(shard.tensor, "local_shards") else shard.tensor


def chunk_tensor(full: torch.Tensor, seat: Seat) -> Roads:
    root = seat.root()
    group, tp = _column(root), fsdp1.tp_mesh(root)
    rank, size = group.rank(), group.size()

    def road(name: str, leaf: Any, mine: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        def check(got: Any, whole: torch.Tensor) -> None:
            assert_same(innermost(got), _rows_of(mine(whole), group), name)

        return name, Road(lambda judged: judged(leaf, rank, size, 0, group), {"w": leaf}, check)

    for kind in _tp_kinds(full, seat):
        yield road(kind.name, kind.leaf, kind.local)
    sharded = flat(full, tp.get_group(), chunked(len(full), tp.size()))
    sharded.metadata().tensor_properties.requires_grad = True
    said = repr(sharded.metadata())

    def check(got: Any, whole: torch.Tensor) -> None:
        ours, theirs = got.metadata(), sharded.metadata()
        assert ours.tensor_properties is not theirs.tensor_properties, "the metadata is shared"
        assert repr(sharded.metadata()) == said, "the metadata of what is chunked changed"
        mine = _rows_of(_rows_of(whole, tp.get_group()), group)
        assert_same(innermost(got), mine, "ShardedTensor")

    yield (
        "ShardedTensor",
        Road(lambda judged: judged(sharded, rank, size, 0, group), {"w": sharded}, check),
    )


def chunk_dtensor(full: torch.Tensor, seat: Seat) -> Roads:
    root = seat.root()
    column, rank = fsdp1.fsdp_mesh(root), fsdp1.fsdp_rank(root)

    def check(got: Any, whole: torch.Tensor, kind: Kind) -> None:
        held = None if kind.placements is None else kind.placements[0]
        tp_local = cut(whole, root, fsdp1.unsharded(root, held))
        assert_same(local(got), _rows_of(tp_local, _column(root), place_on(root, -2)), kind.name)

    # Of other row counts no placement may tell the truth, and another dimension is cut.
    told = len(full) % root.size() == 0
    kinds = (k for k in _tp_kinds(full, seat) if told or k.placements != (S(0),))
    return each(kinds, lambda judged, kind: judged(kind.leaf, rank, column), check)


def all_gather(full: torch.Tensor, seat: Seat) -> Roads:
    root = seat.root()
    # Each dtype meets half of the placements, the next dtype the other half.
    known = TWO_D if root.ndim == 2 else THREE_D
    some = known[DTYPES.index(full.dtype) % 2 :: 2]

    def check(got: Any, whole: torch.Tensor, kind: Kind) -> None:
        assert kind.placements is not None
        assert type(got) is torch.Tensor, f"{kind.name}: a {type(got).__name__}"
        kept = [*[R] * (root.ndim - 1), kind.placements[-1]]
        assert_same(got, cut(whole, root, kept), kind.name)

    kinds = dtensors(full, seat, [(root, p) for p in some], partial=False)
    return each(kinds, lambda judged, kind: judged(kind.leaf, root), check)


def pre_load(full: torch.Tensor, seat: Seat) -> Roads:
    root = seat.root()
    tp = fsdp1.tp_mesh(root)
    alone = flat(full, None, chunked(len(full), seat.world.size))

    def check(got: Any, whole: torch.Tensor) -> None:
        mine = _rows_of(whole, dist.group.WORLD)
        assert got[0] is alone, "another tensor"
        assert_same(got[1][0].tensor, mine)

    yield "flat", Road(lambda judged: judged(alone), {"w": alone}, check)
    outer, inner = nested(full, tp, _column(root))

    def check_inner(got: Any, whole: torch.Tensor) -> None:
        assert got[0] is inner, "not the inner one"
        assert_same(got[1][0].tensor, _rows_of(cut(whole, tp, [S(0)]), _column(root)))

    yield "nested", Road(lambda judged: judged(outer), {"w": inner}, check_inner)
    few = nested(full[: tp.size()], tp, _column(root))  # one row for several ranks of FSDP

    def check_few(got: Any, whole: torch.Tensor) -> None:
        assert got[0] is few[1], "not the inner one"
        mine = _rows_of(cut(whole[: tp.size()], tp, [S(0)]), _column(root))
        assert_same(got[1][0].tensor, mine)

    yield "nested, few rows", Road(lambda judged: judged(few[0]), {"w": few[1]}, check_few)
