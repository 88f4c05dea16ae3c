"""How tensors share a bucket on their way between ranks.

The tensors of a call are laid end to end, widest elements first so that nothing needs padding,
and the stream is cut into buckets: the number of collectives grows with the bytes, never with the
tensors, and the extra memory of a rank is about one bucket. Tensors of which all participants
hold equally much come first: they lie at the same place in every participant's bucket, and are
planned, packed and unpacked for all participants at once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from shardproof._state_dict_utils.layout import Block, Region, rectangles
from shardproof._state_dict_utils.tensors import MOVABLE, bits, carrier

_SETTING = "SHARDPROOF_BUCKET_MIB"


def _bucket_bytes() -> int:
    text = os.environ.get(_SETTING, "32")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{_SETTING}={text!r}: expected a whole number of MiB, 1 or more")
    return int(text) * 1024 * 1024


BUCKET_BYTES = _bucket_bytes()
"""The most bytes that a call needs on a rank besides its result, all participants together and
what the backend copies included.

All ranks need the same value: set SHARDPROOF_BUCKET_MIB before the import, on every rank. More
saves collectives, less saves memory. 32 MiB: over 4 Gloo ranks a gather of 4 x 64 MiB took 0.80 of
torch's time with 16 MiB, 0.73 with 32 and 1.07 with 64, where glibc maps the memory of each
collective anew; a broadcast of the model-like shapes 136 ms with 16, 99 ms with 32.
"""

# A tensor of this share of a bucket fills collectives well enough to have its own.
_ALONE = 16


def alone_bytes() -> int:
    """From how many bytes on a tensor travels without a bucket, if it can."""
    return BUCKET_BYTES // _ALONE


# The widest element: a cut at a multiple of it is a cut between elements of every dtype.
_WIDEST = 16


@dataclass(slots=True)
class Parcel:
    """One tensor that travels: its dtype and, per participant, the blocks it sends or gets.

    Parcels that are laid out alike should share ``blocks``: what follows from it is found once.
    """

    name: str
    dtype: torch.dtype
    blocks: Sequence[Sequence[Block]]


@dataclass(slots=True)
class Piece:
    """A part of one block in one bucket: elements [start, stop), at byte ``at`` of the bucket."""

    parcel: int
    block: int
    start: int
    stop: int
    at: int
    end: int


class Stream:
    """The byte streams of all participants, cut into buckets.

    Args:
        parcels: what travels, in any order.
        participants: how many streams there are.
        held: how many participants' shares of a bucket a rank holds at once, at most, the
            backend's own copies included; participants where nothing is said.

    Attributes:
        parcels: in the order of the stream, the same on every rank.

    """

    def __init__(self, parcels: Sequence[Parcel], participants: int, held: int = 0) -> None:
        self.participants = participants
        share = BUCKET_BYTES // max(held or participants, 1) // _WIDEST * _WIDEST
        self.width = max(share, _WIDEST)
        # By identity: the caller's parcels keep the blocks alive.
        kinds = {id(p.blocks): p.blocks for p in parcels}
        self._counts = {key: _counts(blocks) for key, blocks in kinds.items()}
        self._even = {
            key
            for key, blocks in kinds.items()
            if len(set(self._counts[key])) == 1 and all(len(held) == 1 for held in blocks)
        }
        self.parcels = sorted(
            parcels,
            key=lambda p: (id(p.blocks) not in self._even, -p.dtype.itemsize, str(p.dtype), p.name),
        )

    def buckets(self) -> Iterator[tuple[int, Sequence[list[Piece]]]]:
        """(bytes of the bucket per participant, pieces per participant), bucket by bucket.

        Where the pieces are alike for all participants each has the very same list.
        """
        even = sum(id(p.blocks) in self._even for p in self.parcels)
        for width, (pieces,) in self._cut(range(even), [0]):
            yield width, [pieces] * self.participants
        yield from self._cut(range(even, len(self.parcels)), range(self.participants))

    def _cut(
        self, parcels: range, streams: Sequence[int]
    ) -> Iterator[tuple[int, list[list[Piece]]]]:
        longest = max(
            (
                sum(
                    self._counts[id(p.blocks)][i] * p.dtype.itemsize
                    for p in self.parcels[parcels.start : parcels.stop]
                )
                for i in streams
            ),
            default=0,
        )
        walks = [self._pieces(parcels, i) for i in streams]
        pending = [next(walk, None) for walk in walks]
        for number in range(math.ceil(longest / self.width)):
            pieces: list[list[Piece]] = [[] for _ in walks]
            for walk, found, i in zip(walks, pieces, range(len(walks)), strict=True):
                head = pending[i]
                while head is not None and head[0] == number:
                    found.append(head[1])
                    head = next(walk, None)
                pending[i] = head
            left = min(self.width, longest - number * self.width)
            # Rows follow each other in one buffer, and each has to start where any dtype may.
            yield -(-left // _WIDEST) * _WIDEST, pieces

    def _pieces(self, parcels: range, participant: int) -> Iterator[tuple[int, Piece]]:
        at, width = 0, self.width
        for index in parcels:
            parcel = self.parcels[index]
            size = parcel.dtype.itemsize
            for number, block in enumerate(parcel.blocks[participant]):
                done, end = 0, at + block.numel * size
                while at < end:
                    bucket, offset = divmod(at, width)
                    stop = min(end, (bucket + 1) * width)
                    count = (stop - at) // size
                    piece = Piece(index, number, done, done + count, offset, offset + stop - at)
                    yield bucket, piece
                    done, at = done + count, stop


def _counts(blocks: Sequence[Sequence[Block]]) -> list[int]:
    """Elements per participant."""
    return [sum(block.numel for block in held) for held in blocks]


def sections(
    pieces: Sequence[Piece], parcels: Sequence[Parcel]
) -> Iterator[tuple[torch.dtype, list[Piece]]]:
    """Runs of pieces of one dtype: each lies in a bucket as one array."""
    for dtype, run in groupby(pieces, key=lambda piece: parcels[piece.parcel].dtype):
        yield dtype, list(run)


def pack(
    pieces: Sequence[Piece],
    parcels: Sequence[Parcel],
    source: Callable[[Piece], list[torch.Tensor]],
    bucket: torch.Tensor,
) -> None:
    """Write pieces into a bucket.

    ``source`` gives the 1-D tensors that make up a piece, in the dtype that carries its dtype.
    """
    for dtype, run in sections(pieces, parcels):
        parts = [part for piece in run for part in source(piece)]
        if any(part.device != bucket.device for part in parts):
            parts = [part.to(bucket.device) for part in parts]
        torch.cat(parts, out=bucket[run[0].at : run[-1].end].view(carrier(dtype)))


def carried(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype that carries its dtype between ranks: mostly itself."""
    return tensor if tensor.dtype in MOVABLE else bits(tensor)


def elements(tensor: torch.Tensor, start: int, stop: int) -> list[torch.Tensor]:
    """The row-major elements [start, stop) of a tensor of any strides, carried, in 1-D parts."""
    whole = carried(tensor)
    if whole.is_contiguous():
        flat = whole.view(-1)
        return [flat if stop - start == flat.numel() else flat[start:stop]]
    return [
        whole[tuple(slice(lo, hi) for lo, hi in box)].reshape(-1)
        for box, _, _ in rectangles(tensor.shape, start, stop)
    ]


def block_elements(full: torch.Tensor, block: Block, start: int, stop: int) -> list[torch.Tensor]:
    """As :func:`elements`, for the shard ``block`` of the global tensor ``full``."""
    whole = carried(full)
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


def deliver(
    data: torch.Tensor,
    block: Block,
    piece: Piece,
    write: Callable[[Region, torch.Tensor], object],
) -> None:
    """Hand the elements of a piece to ``write(region of the global tensor, values)``."""
    if block.region is not None and piece.stop - piece.start == block.numel:
        write(block.region, data.view(block.shape))
        return
    for box, at, count in rectangles(block.shape, piece.start, piece.stop):
        part = data[at - piece.start : at - piece.start + count]
        part = part.view([hi - lo for lo, hi in box])
        for there, here in block.regions(box):
            write(there, part[here])
