"""Shards as boxes, (offsets, sizes), of the global tensor; torch.chunk is the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed.tensor import Placement, Shard

Box = tuple[tuple[int, ...], tuple[int, ...]]


def boxes(size: Sequence[int], count: int, placement: Placement) -> list[Box]:
    """The boxes of `count` shards in turn; of replicas each is the whole tensor.

    An empty shard's offset is the end of its dimension.
    """
    whole = ((0,) * len(size), tuple(size))
    if not isinstance(placement, Shard):
        return [whole] * count
    found, start = [], 0
    pieces = [len(p) for p in torch.arange(size[placement.dim]).chunk(count)]
    for piece in pieces + [0] * (count - len(pieces)):
        offsets, sizes = map(list, whole)
        offsets[placement.dim], sizes[placement.dim] = start, piece
        found.append((tuple(offsets), tuple(sizes)))
        start += piece
    return found


def assert_box(got: Any, expected: Box, size: Sequence[int], what: str) -> None:
    """`got` is that box; where it is empty, any box without elements inside the tensor is."""
    offsets, sizes = (tuple(map(int, part)) for part in got)
    assert sizes == expected[1], f"{what}: sizes {sizes}, expected {expected[1]}"
    if 0 not in sizes:
        assert offsets == expected[0], f"{what}: offsets {offsets}, expected {expected[0]}"
    assert len(offsets) == len(size), f"{what}: {len(offsets)} offsets for {len(size)} dimensions"
    inside = all(o >= 0 and o + s <= n for o, s, n in zip(offsets, sizes, size, strict=True))
    assert inside, f"{what}: offsets {offsets} with sizes {sizes} leave the tensor {tuple(size)}"


def assert_tile(found: Iterable[Any], size: Sequence[int], what: str) -> None:
    """Each element of a tensor of that size lies in exactly one of the boxes."""
    hits = torch.zeros(tuple(size), dtype=torch.int64)
    told = [tuple(tuple(map(int, part)) for part in box) for box in found]
    for offsets, sizes in told:
        hits[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
    volume = sum(int(torch.Size(sizes).numel()) for _, sizes in told)
    assert volume == hits.numel(), f"{what}: {volume} elements in the boxes {told} of {tuple(size)}"
    assert bool((hits == 1).all()), f"{what}: the boxes {told} overlap, or leave gaps"


def assert_of_its_own(make: Callable[[], Sequence[ShardMetadata]]) -> None:
    """What is written into the metadata of one result reaches no other's.

    Moving a ShardedTensor to another device writes them: the device and the lists.
    """
    spoilt, kept = list(make()), list(make())
    before = [str(shard) for shard in kept]
    for shard in spoilt:
        for numbers in (shard.shard_offsets, shard.shard_sizes):
            numbers[:] = [number + 100 for number in numbers]
        placement: Any = shard.placement
        placement._rank, placement._device = 100, torch.device("meta")
    for known, some in (("one that was there", kept), ("a later one", list(make()))):
        assert [str(shard) for shard in some] == before, f"{known} changed: {some}"
