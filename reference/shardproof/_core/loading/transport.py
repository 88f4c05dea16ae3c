"""Full tensors from the source rank to all: broadcast whole, or scattered as shards.

Broadcast where every rank needs a tensor whole, scattered where each needs a part. Small tensors
share buckets; a large one is sent from where it lies to where it belongs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from shardproof._core import limits
from shardproof._core.comms.buckets import BucketStream, Parcel, Piece, block_elements, piece_views
from shardproof._core.comms.collectives import (
    broadcast,
    finish,
    scatter,
    scatter_into,
    scatter_takes_room,
)
from shardproof._core.loading.manifest import Manifest, ManifestEntry
from shardproof._core.loading.requirements import RequiredBlocks, Requirement, required_blocks_of
from shardproof._core.loading.targets import Target
from shardproof._core.sharding.domain import Domain
from shardproof._core.sharding.uniform_grid import UniformGrid
from shardproof._core.tensors.pinned_copy import (
    PinnedUpload,
    copy_to_pinned,
    is_on_gpu,
    uses_pinned_memory,
)
from shardproof._core.tensors.properties import CPU
from shardproof._core.tensors.values import (
    MOVABLE,
    bits,
    copies_of_each,
    copy_all,
    copy_each,
    stack_into,
)

# From how many tensors on a copy of their own costs less than views for one of all tensors.
_MANY = 8

# From how many bytes on leaving out a row of them costs less than writing it.
_WORTH_A_VIEW = 1 << 16


class Transport:
    """Moves the bytes, once all ranks know what all ranks need.

    Args:
        domain: the ranks.
        group: theirs; its first rank is the source.
        wholes: the full tensors, detached, on the source.
        targets: root key -> what this rank fills from it.

    """

    def __init__(
        self,
        domain: Domain,
        group: dist.ProcessGroup,
        wholes: dict[Any, torch.Tensor] | None,
        targets: dict[Any, list[Target]],
    ) -> None:
        self.domain, self.group, self.wholes, self.targets = domain, group, wholes, targets
        self.me = domain.index()
        # By the identity of a parcel; all live until the call ends.
        self._grids: dict[int, UniformGrid | None] = {}
        self._with_own_row: set[int] = set()
        # One copy of a bucket to the CPU instead of one per tensor.
        self._lands_in_pinned = uses_pinned_memory(domain.device) and {CPU} == {
            target.spec.device for each in targets.values() for target in each
        }

    def run(
        self,
        manifest: Manifest,
        kinds: Sequence[Requirement],
        required: Sequence[Sequence[tuple[int, ...]]],
    ) -> None:
        """Run the collectives.

        Args:
            manifest: what the source has.
            kinds: the distinct needs.
            required: per rank, or once where all need the same, per key which kinds are needed.

        """
        alike: dict[tuple[int, tuple[tuple[int, ...], ...]], list[Any]] = defaultdict(list)
        columns = zip(*required, strict=True)
        for key, number, needed in zip(manifest.keys, manifest.numbers, columns, strict=True):
            if any(needed):
                alike[number, needed].append(key)
        together: list[Parcel] = []
        apart: list[Parcel] = []
        for index, ((number, wants), keys) in enumerate(alike.items()):
            entry = manifest.kinds[number]
            assert entry.dtype is not None
            parts = required_blocks_of(entry.size, self.domain.members, kinds, wants)
            name = f"{index:012d}"
            if not parts.elsewhere:
                self._copy_for_source(keys)
                continue
            if _travels_alone(entry, parts):
                for key in keys:
                    self._send_alone(key, scattered=not parts.everywhere)
                continue
            small = math.prod(entry.size) * entry.dtype.itemsize <= _SMALL
            if parts.everywhere:
                parcel = Parcel(name, entry.dtype, parts.once, keys)
                together.append(parcel)
            else:
                parcel = Parcel(name, entry.dtype, parts.blocks, keys)
                self._grids[id(parcel)] = parts.grid
                apart.append(parcel)
            if small and len(keys) > 1:
                self._with_own_row.add(id(parcel))
        for parcels, scattered in ((together, False), (apart, True)):
            self._run_stream(parcels, scattered)

    def _copy_for_source(self, keys: Sequence[Any]) -> None:
        """What the source needs itself of tensors that it has whole."""
        if self.wholes is None:
            return
        memories: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for key in keys:
            whole = self.wholes[key]
            for target in self.targets.get(key, ()):
                spec, block = target.spec, target.spec.block
                as_it_is = spec.dtype == whole.dtype and whole.dtype in MOVABLE
                if as_it_is and block is not None and block.region is not None:
                    memories.append(target.ensure_memory())
                    values.append(whole[block.region])
                else:
                    target.take_part_of(whole)
        copy_all(memories, values)

    def _send_alone(self, key: Any, scattered: bool) -> None:
        memory = None
        for target in self.targets.get(key, ()):
            memory = target.ensure_memory().view(-1).view(torch.uint8)
        data = None
        if self.wholes is not None:
            data = self.wholes[key].view(-1).view(torch.uint8)
        if not scattered:
            data = memory if data is None else data
            assert data is not None
            work = broadcast(self.group, data)
            # What is sent is only read, so the source may copy it for itself at the same time.
            self._copy_for_source([key])
            finish(work)
            return
        assert memory is not None
        rows = None if data is None else data.view(len(self.domain.members), -1)
        scatter_into(self.group, memory, rows, limits.BUCKET_BYTES)

    def _run_stream(self, parcels: Sequence[Parcel], scattered: bool) -> None:
        participants = len(self.domain.members) if scattered else 1
        # Two buckets at a time: one is on its way while another is packed, or unpacked.
        held = 2
        if scattered and scatter_takes_room(self.group, self.domain.device):
            held += 1  # Not reached on a CPU: its memory is given when it is written.
        todo = BucketStream(parcels, participants, held=held * participants)
        if self.wholes is None:
            self._receive_stream(todo, scattered)
        else:
            self._send_stream(todo, scattered)

    def _send_stream(self, todo: BucketStream, scattered: bool) -> None:
        work = None
        buffers = _Buffers(self.domain.device)
        outgoing = self._outgoing(todo.parcels)
        for width, pieces in todo.buckets():
            rows = buffers.next(todo.participants * width).view(todo.participants, width)
            if outgoing is None:
                self._fill(rows, pieces, todo.parcels)
            else:  # Not reached on a CPU: nothing is sent to a device.
                packed = outgoing.next(rows.numel()).view(rows.shape)
                self._fill(packed, pieces, todo.parcels)
                outgoing.send(packed, rows)
            finish(work)
            if scattered:
                work = scatter(self.group, rows[0], rows)
            else:
                work = broadcast(self.group, rows[0])
            # What is sent is only read, so the source may take its own part at the same time.
            self._unpack(rows[0], pieces[0], todo.parcels, 0)
        # Large ones the source takes from where they are: its row was not looked at.
        rest = [parcel for parcel in todo.parcels if not self._own_row(parcel)]
        self._copy_for_source([key for parcel in rest for key in parcel.items])
        finish(work)

    def _outgoing(self, parcels: Sequence[Parcel]) -> PinnedUpload | None:
        """Where tensors are packed that lie on the CPU and travel from a device; None elsewhere."""
        assert self.wholes is not None
        if not uses_pinned_memory(self.domain.device):
            return None
        # Not reached on a CPU: nothing is sent to a device.
        wholes = [self.wholes[key] for parcel in parcels for key in parcel.items]
        return None if any(map(is_on_gpu, wholes)) else PinnedUpload(self.domain.device)

    def _own_row(self, parcel: Parcel) -> bool:
        """Whether the source packs its own part, too: of small tensors that saves work."""
        return id(parcel) in self._with_own_row

    def _receive_stream(self, todo: BucketStream, scattered: bool) -> None:
        column = self.me if scattered else 0
        here: tuple[torch.Tensor, Sequence[Piece]] | None = None
        buffers = _Buffers(self.domain.device)
        for width, pieces in todo.buckets():
            mine = buffers.next(width)
            group = self.group
            work = scatter(group, mine, None) if scattered else broadcast(group, mine)
            if here is not None:
                self._unpack(*here, todo.parcels, column)
            finish(work)
            here = mine, pieces[column]
        if here is not None:
            self._unpack(*here, todo.parcels, column)

    def _unpack(
        self,
        mine: torch.Tensor,
        pieces: Sequence[Piece],
        parcels: Sequence[Parcel],
        column: int,
    ) -> None:
        """Write what has arrived into the targets."""
        if self._lands_in_pinned:
            mine = copy_to_pinned(mine)  # Not reached on a CPU: there is no page-locked memory.
        memories: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for piece, room in piece_views(mine, pieces, parcels):
            parcel = parcels[piece.parcel]
            if self.wholes is not None and not self._own_row(parcel):
                continue
            block = parcel.blocks[column][piece.block]
            keys = parcel.items[piece.first : piece.first + piece.count]
            held = [self.targets.get(key, ()) for key in keys]
            targets = [targets[0] for targets in held if len(targets) == 1]
            parts = room.view(len(keys), -1)
            if len(targets) == len(keys) and piece.stop - piece.start == block.numel:
                specs = {target.spec for target in targets}
                spec = targets[0].spec
                # Whether the elements of the block are but to be copied.
                fits = spec.block == block and spec.source_dtype is room.dtype
                if len(specs) == 1 and fits:
                    parts = parts.view(len(keys), *block.shape)
                    if spec.copies and spec.device == room.device:
                        for target, memory in zip(targets, copies_of_each(parts), strict=True):
                            target.memory = memory
                        continue
                    if spec.keeps and spec.ordinary and not spec.by_class:
                        opened = [target.value._local_tensor for target in targets]
                    else:
                        opened = [target.ensure_memory() for target in targets]
                    alike = room.device == CPU == spec.device and spec.dtype is room.dtype
                    if alike and len(keys) >= _MANY:
                        copy_each(parts, opened)
                        continue
                    memories += opened
                    values += parts.unbind()
                    continue
            for targets_of_key, part in zip(held, parts.unbind(), strict=True):
                for target in targets_of_key:
                    if target.spec.block == block:
                        for memory, value in target.copies_for_range(piece.start, piece.stop, part):
                            memories.append(memory)
                            values.append(value)
        copy_all(memories, values)

    def _fill(
        self,
        rows: torch.Tensor,
        pieces: Sequence[Sequence[Piece]],
        parcels: Sequence[Parcel],
    ) -> None:
        """Write what each participant gets into its row of a bucket.

        Where there are others the source's own row may stay as it is, but for small tensors.
        """
        assert self.wholes is not None
        several = len(rows) > 1
        if pieces[0] is not pieces[-1]:
            for taker, row in enumerate(rows):
                for piece, room in piece_views(row, pieces[taker], parcels):
                    parcel = parcels[piece.parcel]
                    if taker or self._own_row(parcel):
                        self._fill_part(room, piece, parcel, 0, taker)
            return
        into: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for piece, room in piece_views(rows, pieces[0], parcels):
            parcel = parcels[piece.parcel]
            first = 1 if several and not self._own_row(parcel) else 0
            keys = parcel.items[piece.first : piece.first + piece.count]
            wholes = [self.wholes[key] for key in keys]
            if parcel.dtype not in MOVABLE:
                wholes = [bits(whole) for whole in wholes]
            grid = self._grids.get(id(parcel))
            if not several and len(wholes) > 1:
                stack_into(room[0], wholes)
                continue
            if grid is not None and len(wholes) > 1 and self._own_row(parcel):
                grid.fill(room, wholes)
                continue
            each = [room]
            if len(wholes) > 1:
                each = list(room.view(len(rows), len(wholes), -1).unbind(1))
            for index, (whole, part) in enumerate(zip(wholes, each, strict=True)):
                if grid is None or part.size(1) != grid.numel:
                    for taker, row in enumerate(part[first:], first):
                        self._fill_part(row, piece, parcel, index, taker)
                    continue
                source = grid.block_rows(whole)
                space = grid.rows(part, source)
                if grid.parts[0] == len(rows) and part.nbytes > _WORTH_A_VIEW:
                    source, space = source[first:], space[first:]
                into.append(space)
                values.append(source)
        copy_all(into, values)

    def _fill_part(
        self, room: torch.Tensor, piece: Piece, parcel: Parcel, index: int, taker: int
    ) -> None:
        assert self.wholes is not None
        block = parcel.blocks[taker][piece.block]
        whole = self.wholes[parcel.items[piece.first + index]]
        found = block_elements(whole, block, piece.start, piece.stop)
        torch.cat([part.to(room.device) for part in found], out=room)


class _Buffers:
    """Two buckets of memory in turn: one is on its way while the other is packed, or unpacked.

    New memory for each bucket would have to be mapped anew, which costs as much as to fill it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made = [torch.empty(0, dtype=torch.uint8, device=device)] * 2

    def next(self, nbytes: int) -> torch.Tensor:
        """The bytes that were used the longest ago."""
        buffer = self._made.pop(0)
        if buffer.numel() < nbytes:
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        self._made.append(buffer)
        return buffer[:nbytes]


# Up to how many bytes whole tensors are cut many at a time: they are copied twice then, and a
# larger one costs more to copy than to look at.
_SMALL = 1 << 16


def _travels_alone(entry: ManifestEntry, parts: RequiredBlocks) -> bool:
    """Whether a tensor is so large that it is sent from where it lies to where it belongs.

    That saves the copies into and out of a bucket. The answer rests on what all ranks know.
    """
    others, source = parts.direct
    if not entry.flat or not others:
        return False
    if parts.everywhere:
        return True
    return parts.grid is not None and parts.grid.stacked and source
