"""Bytes between ranks: who takes part, in what order, and how tensors share a bucket.

All data travels as uint8, since a backend may refuse a dtype but not its bytes. The tensors of a
call are laid end to end, widest elements first so that nothing needs padding, and the stream is
cut into buckets: the number of collectives grows with the bytes, never with the tensors, and the
extra memory of a rank is about one bucket.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardproof._state_dict_utils.layout import Block, mesh_ranks, rectangles
from shardproof._state_dict_utils.tensors import CPU, bit_dtype, bits

#: The bytes that one bucket may take on a rank, all participants together.
BUCKET_BYTES = 64 * 1024 * 1024

# The widest element: a cut at a multiple of it is a cut between elements of every dtype.
_WIDEST = 16


@dataclass(frozen=True)
class Stage:
    """One group to communicate over. ``places[i]`` is the position of group rank ``i``."""

    group: dist.ProcessGroup
    places: tuple[int, ...]


@dataclass(frozen=True)
class Domain:
    """A set of ranks that hold parts of the same tensors.

    Attributes:
        members: global ranks in the order of the domain's own numbering.
        shape: the mesh shape; ``(size,)`` for a group.
        groups: the group of each dimension, None where the dimension has one member.
        device: where the bytes have to be for these groups.

    """

    members: tuple[int, ...]
    shape: tuple[int, ...]
    groups: tuple[dist.ProcessGroup | None, ...] = field(compare=False)
    device: torch.device = field(compare=False)

    @property
    def key(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Sorts domains the same way on every rank, small ones first."""
        return len(self.members), self.members, self.shape

    def index(self) -> int:
        """This rank's position."""
        return self.members.index(dist.get_rank())

    def coordinate(self, index: int) -> tuple[int, ...]:
        """The coordinate of a position, row-major."""
        found: list[int] = []
        for size in reversed(self.shape):
            index, place = divmod(index, size)
            found.append(place)
        return tuple(reversed(found))

    def position(self, coordinate: Sequence[int]) -> int:
        """The position of a coordinate."""
        index = 0
        for size, place in zip(self.shape, coordinate, strict=True):
            index = index * size + place
        return index

    def stage(self, dim: int) -> Stage:
        """The communication along one dimension, from this rank's coordinate."""
        group = self.groups[dim]
        assert group is not None
        ranks = dist.get_process_group_ranks(group)
        return Stage(group, tuple(self.coordinate(self.members.index(r))[dim] for r in ranks))

    def name(self, index: int) -> str:
        """How an error message calls a member."""
        return f"rank {index} (global rank {self.members[index]})"


def group_domain(group: dist.ProcessGroup, device: torch.device | None = None) -> Domain:
    """The ranks of a process group, in its own numbering."""
    members = tuple(dist.get_process_group_ranks(group))
    used = group if len(members) > 1 else None
    return Domain(members, (len(members),), (used,), transport_device(group, device))


def mesh_domain(mesh: DeviceMesh) -> Domain:
    """The ranks of a device mesh, row-major. This rank has to be one of them."""
    shape = tuple(int(size) for size in mesh.shape)
    groups = tuple(mesh.get_group(dim) if size > 1 else None for dim, size in enumerate(shape))
    device = torch.device(mesh.device_type)
    for group in groups:
        if group is not None:
            device = transport_device(group, device)
            break
    return Domain(mesh_ranks(mesh), shape, groups, device)


def transport_device(
    group: dist.ProcessGroup, preferred: torch.device | None = None
) -> torch.device:
    """A device that the group's backends can communicate from; ``preferred`` where they can.

    It depends on nothing that differs between the ranks but the device's index.
    """
    kinds = [device.type for device in group._device_types]
    kind = preferred.type if preferred is not None else None
    if kind not in kinds:
        kind = "cpu" if "cpu" in kinds or not kinds else kinds[0]
    if kind == "cpu":
        return CPU
    if preferred is not None and preferred.type == kind and preferred.index is not None:
        return preferred
    return torch.device(str(kind), torch.get_device_module(kind).current_device())


def all_gather(group: dist.ProcessGroup, payload: torch.Tensor) -> torch.Tensor:
    """The 1-D byte tensors of all ranks, one row per group rank. One collective."""
    size = dist.get_world_size(group)
    rows = torch.empty(size * payload.numel(), dtype=torch.uint8, device=payload.device)
    if payload.numel():
        # Renamed upstream; the old name warns where the new one exists.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(rows, payload, group=group)
    return rows.view(size, -1)


def collect(stages: Sequence[Stage], payload: torch.Tensor) -> torch.Tensor:
    """All-gather over one group after another: rows in row-major order of the stages' places.

    One collective a stage; the innermost dimension is the last of ``stages``.
    """
    rows = payload
    for stage in reversed(stages):
        rows = _placed(all_gather(stage.group, rows.reshape(-1)), stage)
    return rows.reshape(-1, payload.numel())


def collect_to(
    stages: Sequence[Stage], payload: torch.Tensor, mine: Sequence[int], dest: Sequence[int]
) -> torch.Tensor | None:
    """As :func:`collect`, towards the rank at place ``dest`` only; None on the others.

    A rank drops out after the first stage in which it is not on the destination's line.
    """
    rows = payload
    for stage, place, target in reversed(list(zip(stages, mine, dest, strict=True))):
        size, flat = len(stage.places), rows.reshape(-1)
        into = torch.empty(size * flat.numel(), dtype=torch.uint8, device=flat.device)
        parts = list(into.view(size, -1)) if place == target else None
        dist.gather(flat, parts, group=stage.group, group_dst=stage.places.index(target))
        if place != target:
            return None
        rows = _placed(into.view(size, -1), stage)
    return rows.reshape(-1, payload.numel())


def _placed(rows: torch.Tensor, stage: Stage) -> torch.Tensor:
    """Rows in group order -> rows in the order of places."""
    if stage.places == tuple(range(len(stage.places))):
        return rows
    order = sorted(range(len(stage.places)), key=stage.places.__getitem__)
    return rows[order]


@dataclass
class Parcel:
    """One tensor that travels: its dtype and, per participant, the blocks it sends or gets."""

    name: str
    dtype: torch.dtype
    blocks: Sequence[Sequence[Block]]


@dataclass(frozen=True)
class Piece:
    """A part of one block in one bucket: elements [start, stop), at byte ``at`` of the bucket."""

    parcel: int
    block: int
    start: int
    stop: int
    at: int
    end: int


def stream_order(parcels: Sequence[Parcel]) -> list[Parcel]:
    """The order in which tensors follow each other, the same on every rank."""
    return sorted(parcels, key=lambda parcel: (-parcel.dtype.itemsize, parcel.name))


class Stream:
    """The byte streams of all participants, cut into buckets.

    Args:
        parcels: in :func:`stream_order`.
        participants: how many streams there are.

    """

    def __init__(self, parcels: Sequence[Parcel], participants: int) -> None:
        self.parcels = parcels
        self.participants = participants
        self.lengths = [
            sum(p.dtype.itemsize * block.numel for p in parcels for block in p.blocks[i])
            for i in range(participants)
        ]
        self.longest = max(self.lengths, default=0)
        share = BUCKET_BYTES // max(participants, 1) // _WIDEST * _WIDEST
        self.width = max(share, _WIDEST)

    def buckets(self) -> Iterator[tuple[int, list[list[Piece]]]]:
        """(bytes of the bucket per participant, pieces per participant), bucket by bucket."""
        walks = [self._pieces(i) for i in range(self.participants)]
        pending = [next(walk, None) for walk in walks]
        for number in range(math.ceil(self.longest / self.width)):
            pieces: list[list[Piece]] = [[] for _ in walks]
            for i, walk in enumerate(walks):
                while (head := pending[i]) is not None and head[0] == number:
                    pieces[i].append(head[1])
                    pending[i] = next(walk, None)
            left = min(self.width, self.longest - number * self.width)
            # Rows follow each other in one buffer, and each has to start where any dtype may.
            yield -(-left // _WIDEST) * _WIDEST, pieces

    def _pieces(self, participant: int) -> Iterator[tuple[int, Piece]]:
        at = 0
        for index, parcel in enumerate(self.parcels):
            size = parcel.dtype.itemsize
            for number, block in enumerate(parcel.blocks[participant]):
                done, end = 0, at + block.numel * size
                while at < end:
                    bucket, offset = divmod(at, self.width)
                    stop = min(end, (bucket + 1) * self.width)
                    count = (stop - at) // size
                    yield (
                        bucket,
                        Piece(index, number, done, done + count, offset, offset + stop - at),
                    )
                    done, at = done + count, stop


def pack(
    pieces: Sequence[Piece],
    source: Callable[[Piece], list[torch.Tensor]],
    bucket: torch.Tensor,
) -> None:
    """Write pieces into a bucket. ``source`` gives the 1-D byte tensors that make up a piece."""
    parts = [part.to(bucket.device) for piece in pieces for part in source(piece)]
    if parts:
        torch.cat(parts, out=bucket[: pieces[-1].end])


def as_bytes(values: torch.Tensor) -> torch.Tensor:
    """The elements of an integer tensor as 1-D bytes, row-major; a view where it is contiguous."""
    flat = values.reshape(-1)
    if flat.stride(0) != 1:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def shard_bytes(tensor: torch.Tensor, start: int, stop: int) -> list[torch.Tensor]:
    """The bytes of the row-major elements [start, stop) of a tensor of any strides."""
    whole = bits(tensor)
    if whole.is_contiguous():
        return [as_bytes(whole.view(-1)[start:stop])]
    return [
        as_bytes(whole[tuple(slice(lo, hi) for lo, hi in box)])
        for box, _, _ in rectangles(tensor.shape, start, stop)
    ]


def block_bytes(full: torch.Tensor, block: Block, start: int, stop: int) -> list[torch.Tensor]:
    """As :func:`shard_bytes`, for the shard ``block`` of the global tensor ``full``."""
    whole = bits(full)
    if block.region is not None and stop - start == block.numel:
        return [as_bytes(whole[block.region])]
    found: list[torch.Tensor] = []
    for box, _, _ in rectangles(block.shape, start, stop):
        regions = list(block.regions(box))
        if len(regions) == 1:
            part = whole[regions[0][0]]
        else:
            part = torch.empty([hi - lo for lo, hi in box], dtype=whole.dtype, device=whole.device)
            for there, here in regions:
                part[here] = whole[there]
        found.append(as_bytes(part))
    return found


def broadcast(group: dist.ProcessGroup, data: torch.Tensor) -> None:
    """Broadcast bytes from the group's first rank. One collective."""
    if data.numel() and dist.get_world_size(group) > 1:
        dist.broadcast(data, group=group, group_src=0)


def scatter(group: dist.ProcessGroup, into: torch.Tensor, rows: torch.Tensor | None) -> None:
    """Scatter one row of bytes to each rank from the group's first rank. One collective."""
    dist.scatter(into, None if rows is None else list(rows), group=group, group_src=0)


def deliver(
    data: torch.Tensor,
    block: Block,
    piece: Piece,
    write: Callable[[tuple[slice, ...], torch.Tensor], object],
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


def as_bits(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes as the integers that carry ``dtype``."""
    return data.view(bit_dtype(dtype))
