"""Buckets: how small tensors share collectives, and large ones are cut.

Tensors that are laid out alike make a parcel. The parcels of a call are laid end to end, widest
elements first so that nothing needs padding, and the stream is cut into buckets: the number of
collectives grows with the bytes, never with the tensors, and the extra memory of a rank is about
one bucket. Parcels of which all participants hold equally much come first: they lie at the same
place in every participant's bucket, and are planned, packed and unpacked for all participants, and
for many tensors, at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from shardproof._core.limits import BUCKET_BYTES
from shardproof._core.sharding.blocks import Block, Region, rectangles
from shardproof._core.tensors.values import as_carrier, carrier_dtype, copy_all, stack_into

# The widest element: a cut at a multiple of it is a cut between elements of every dtype.
_WIDEST = 16

# A tensor of which a participant has at most this share of a row of a bucket is not cut: what the
# end of a row then leaves empty is less.
_UNCUT = 16


@dataclass(slots=True)
class Parcel:
    """Tensors that travel, laid out alike.

    Attributes:
        name: sorts parcels the same way on every rank.
        dtype: of all of them.
        blocks: per participant, the blocks that it sends or gets of each tensor. Parcels that are
            laid out alike should share it: what follows from it is found once.
        items: the tensors, by what the caller knows them, in the same order on every rank.

    """

    name: str
    dtype: torch.dtype
    blocks: Sequence[Sequence[Block]]
    items: Sequence[Any]


@dataclass(slots=True)
class Piece:
    """What a bucket has of a parcel, from byte ``at`` to byte ``end``.

    Attributes:
        parcel: which one.
        first: its first tensor.
        count: how many whole tensors, of one block each. 1 also where it is only a part of one.
        block: which of the tensor's blocks.
        start: the first element of that block.
        stop: behind the last one.
        at: its first byte in the bucket.
        end: behind the last one.

    """

    parcel: int
    first: int
    count: int
    block: int
    start: int
    stop: int
    at: int
    end: int


class BucketStream:
    """The byte streams of all participants, cut into buckets.

    Args:
        parcels: what travels, in any order.
        participants: how many streams there are.
        held: how many participants' shares of a bucket a rank holds at once, at most, the
            backend's own copies included.

    Attributes:
        parcels: in the order of the stream, the same on every rank.

    """

    def __init__(self, parcels: Sequence[Parcel], participants: int, held: int) -> None:
        self.participants = participants
        share = BUCKET_BYTES // held // _WIDEST * _WIDEST
        self.width = max(share, _WIDEST)
        # By identity: the caller's parcels keep the blocks alive.
        kinds = {id(p.blocks): p.blocks for p in parcels}
        self._even = {key for key, blocks in kinds.items() if _alike(blocks)}
        self.parcels = sorted(
            parcels,
            key=lambda p: (id(p.blocks) not in self._even, -p.dtype.itemsize, str(p.dtype), p.name),
        )

    def buckets(self) -> Iterator[tuple[int, Sequence[list[Piece]]]]:
        """(bytes of the bucket per participant, pieces per participant), bucket by bucket.

        Where the pieces are alike for all participants each has the very same list.
        """
        even = sum(id(p.blocks) in self._even for p in self.parcels)
        for width, (pieces,) in self._cut([self._even_pieces(range(even))]):
            yield width, [pieces] * self.participants
        uneven = range(even, len(self.parcels))
        yield from self._cut([self._pieces(uneven, i) for i in range(self.participants)])

    def _cut(
        self, walks: Sequence[Iterator[tuple[int, Piece]]]
    ) -> Iterator[tuple[int, list[list[Piece]]]]:
        heads = [next(walk, None) for walk in walks]
        number = 0
        while any(head is not None for head in heads):
            pieces: list[list[Piece]] = [[] for _ in walks]
            for index, walk in enumerate(walks):
                head = heads[index]
                while head is not None and head[0] == number:
                    pieces[index].append(head[1])
                    head = next(walk, None)
                heads[index] = head
            width = max((found[-1].end for found in pieces if found), default=0)
            # Rows follow each other in one buffer, and each has to start where any dtype may.
            yield -(-width // _WIDEST) * _WIDEST, pieces
            number += 1

    def _even_pieces(self, parcels: range) -> Iterator[tuple[int, Piece]]:
        """As :meth:`_pieces`, for all participants at once and small tensors many at a time."""
        at, width = 0, self.width
        for index in parcels:
            parcel = self.parcels[index]
            (block,) = parcel.blocks[0]
            size = block.numel * parcel.dtype.itemsize
            first, count = 0, len(parcel.items) if size else 0
            while first < count:
                bucket, offset = divmod(at, width)
                fit = min((width - offset) // size, count - first)
                if fit:
                    end = offset + fit * size
                    yield bucket, Piece(index, first, fit, 0, 0, block.numel, offset, end)
                    first, at = first + fit, at + fit * size
                elif size <= width // _UNCUT:
                    at = (bucket + 1) * width
                else:
                    yield from self._cut_block(index, first, 0, block.numel, at)
                    first, at = first + 1, at + size

    def _pieces(self, parcels: range, participant: int) -> Iterator[tuple[int, Piece]]:
        """(number of the bucket, piece), in the order of a participant's stream."""
        at = 0
        for index in parcels:
            parcel = self.parcels[index]
            for item in range(len(parcel.items)):
                for number, block in enumerate(parcel.blocks[participant]):
                    yield from self._cut_block(index, item, number, block.numel, at)
                    at += block.numel * parcel.dtype.itemsize

    def _cut_block(
        self, parcel: int, item: int, block: int, numel: int, at: int
    ) -> Iterator[tuple[int, Piece]]:
        """The pieces of one block, which begins at byte ``at`` of the stream."""
        size, width = self.parcels[parcel].dtype.itemsize, self.width
        done = 0
        while done < numel:
            bucket, offset = divmod(at, width)
            count = min((width - offset) // size, numel - done)
            end = offset + count * size
            yield bucket, Piece(parcel, item, 1, block, done, done + count, offset, end)
            done, at = done + count, at + count * size


def _alike(blocks: Sequence[Sequence[Block]]) -> bool:
    """Whether all participants have one block, of equal size."""
    return all(len(held) == 1 for held in blocks) and len({held[0].numel for held in blocks}) == 1


def piece_views(
    data: torch.Tensor, pieces: Sequence[Piece], parcels: Sequence[Parcel]
) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Each piece with its part of a bucket, in the dtype that carries its dtype.

    ``data`` is the bytes of a bucket, or one row of them a participant; then so are the parts.
    """
    for dtype, group in groupby(pieces, key=lambda piece: parcels[piece.parcel].dtype):
        run = list(group)
        part = data[..., run[0].at : run[-1].end].view(carrier_dtype(dtype))
        sizes = [(piece.end - piece.at) // dtype.itemsize for piece in run]
        yield from zip(run, part.split_with_sizes(sizes, dim=-1), strict=True)


def pack(
    bucket: torch.Tensor,
    pieces: Sequence[Piece],
    parcels: Sequence[Parcel],
    source: Callable[[Any, int], torch.Tensor],
) -> None:
    """Write pieces into a bucket.

    ``source(item of a parcel, number of a block)`` gives the tensor that is this block.
    """
    into: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    for piece, room in piece_views(bucket, pieces, parcels):
        items = parcels[piece.parcel].items[piece.first : piece.first + piece.count]
        parts = [source(item, piece.block) for item in items]
        if len(parts) > 1:
            stack_into(room, parts)
        elif piece.stop - piece.start == parts[0].numel():
            into.append(room.view(parts[0].shape))
            values.append(as_carrier(parts[0]))
        else:
            found = row_major_elements(parts[0], piece.start, piece.stop)
            torch.cat([part.to(room.device) for part in found], out=room)
    copy_all(into, values)


def row_major_elements(tensor: torch.Tensor, start: int, stop: int) -> list[torch.Tensor]:
    """The row-major elements [start, stop) of a tensor of any strides, in 1-D parts."""
    whole = as_carrier(tensor)
    if whole.is_contiguous():
        flat = whole.view(-1)
        return [flat if stop - start == flat.numel() else flat[start:stop]]
    return [
        whole[tuple(slice(lo, hi) for lo, hi in box)].reshape(-1)
        for box, _, _ in rectangles(tensor.shape, start, stop)
    ]


def block_elements(full: torch.Tensor, block: Block, start: int, stop: int) -> list[torch.Tensor]:
    """As :func:`row_major_elements`, for the shard ``block`` of the global tensor ``full``."""
    whole = as_carrier(full)
    if block.region is not None and stop - start == block.numel:
        return [whole[block.region].reshape(-1)]
    found: list[torch.Tensor] = []
    for box, _, _ in rectangles(block.shape, start, stop):
        regions = list(block.regions(box))
        if len(regions) == 1:
            part = whole[regions[0][0]]
        else:
            part = torch.empty([hi - lo for lo, hi in box], dtype=whole.dtype, device=whole.device)
            for there, here in regions:
                part[here] = whole[there]
        found.append(part.reshape(-1))
    return found


def regions_of_piece(
    data: torch.Tensor, block: Block, piece: Piece
) -> Iterator[tuple[Region, torch.Tensor]]:
    """(region of the global tensor, values for it) of the elements of a piece."""
    if block.region is not None and piece.stop - piece.start == block.numel:
        yield block.region, data.view(block.shape)
        return
    for box, at, count in rectangles(block.shape, piece.start, piece.stop):
        part = data[at - piece.start : at - piece.start + count]
        part = part.view([hi - lo for lo, hi in box])
        for there, here in block.regions(box):
            yield there, part[here]
