"""From one rank to all: what each needs of the source's full tensors, and how it gets there.

Broadcast where every rank needs a tensor whole, scattered where each needs a part. Small tensors
share buckets; a large one is sent from where it lies to where it belongs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from shardproof._state_dict_utils import stream
from shardproof._state_dict_utils.grid import Grid, grid_of
from shardproof._state_dict_utils.layout import Block, full_block
from shardproof._state_dict_utils.stream import (
    Parcel,
    Piece,
    Stream,
    block_elements,
    carried,
    rooms,
)
from shardproof._state_dict_utils.targets import Place, Target
from shardproof._state_dict_utils.tensors import MOVABLE, copy_all
from shardproof._state_dict_utils.wire import Domain, broadcast, finish, scatter


class Offer(NamedTuple):
    """What the source has for one key.

    Attributes:
        kind: ``tensor``, ``scalar`` (0-dim, its bytes travel in the offer) or ``value``.
        size: of a tensor.
        dtype: of a tensor.
        value: the bytes of a scalar, or a value.
        root: for a tensor, the first key with the same memory.
        flat: whether a tensor's memory can be sent as it is.

    """

    kind: str
    size: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    value: Any = None
    root: Any = None
    flat: bool = False


# From how many bytes on leaving out a row of them costs less than writing it.
_WORTH_A_VIEW = 1 << 16

Need = tuple[Place, bool]
"""(what is needed of a full tensor, whether it can be received right where it belongs)."""


class _Parts:
    """What the ranks need of tensors that are needed alike.

    Attributes:
        blocks: per rank the distinct blocks.
        elsewhere: whether a rank other than the source needs any.
        everywhere: whether they all need all of it.
        direct: whether they all need one part, received where it belongs; and whether the source
            does.
        grid: that of the blocks, if they make one.

    """

    def __init__(
        self,
        size: tuple[int, ...],
        ranks: Sequence[int],
        kinds: Sequence[Need],
        wants: tuple[tuple[int, ...], ...],
    ) -> None:
        """``wants`` is per rank which of the kinds it needs; one entry where all need the same."""
        held = {k: kinds[k][0].blocks(size, ranks) for needs in set(wants) for k in needs}
        everyone = wants if len(wants) > 1 else wants * len(ranks)
        self.blocks: list[list[Block]] = []
        for index, needs in enumerate(everyone):
            mine = (held[kind][index] for kind in needs)
            self.blocks.append(list(dict.fromkeys(b for b in mine if b is not None and b.numel)))
        others = self.blocks[1:]
        self.elsewhere = any(others)
        whole = [full_block(size)]
        self.everywhere = all(held == whole for held in others)
        single = [len(needs) == 1 and kinds[needs[0]][1] for needs in everyone]
        self.direct = all(single[1:]), single[0]
        self.grid = grid_of(size, self.blocks)
        self.once = [whole]


class Transport:
    """Moves the bytes, once all ranks know what all ranks need.

    Args:
        domain: the ranks.
        group: theirs; its first rank is the source.
        full: the full tensors, on the source.
        targets: root key -> what this rank fills from it.

    """

    def __init__(
        self,
        domain: Domain,
        group: dist.ProcessGroup,
        full: dict[str, Any] | None,
        targets: dict[Any, list[Target]],
    ) -> None:
        self.domain, self.group, self.full, self.targets = domain, group, full, targets
        self.me = domain.index()
        self._known: dict[Hashable, _Parts] = {}
        self._grids: dict[int, Grid | None] = {}

    def run(
        self,
        offers: dict[Any, Offer],
        kinds: Sequence[Need],
        wanted: Sequence[Sequence[tuple[int, ...]]],
    ) -> None:
        """Run the collectives.

        Args:
            offers: what the source has, by key.
            kinds: the distinct needs.
            wanted: per rank, or once where all need the same, per key which kinds are needed.

        """
        together: list[Parcel] = []
        apart: list[Parcel] = []
        for number, (key, offer) in enumerate(offers.items()):
            if offer.kind != "tensor":
                continue
            wants = tuple([needs[number] for needs in wanted])
            parts = self._parts(offer.size, kinds, wants)
            if not parts.elsewhere:
                self._keep(key)
                continue
            assert offer.dtype is not None
            name = f"{number:012d}"
            if _travels_alone(offer, parts):
                self._send_alone(key, scattered=not parts.everywhere)
            elif parts.everywhere:
                self._keep(key)
                together.append(Parcel(name, offer.dtype, parts.once, [key]))
            else:
                apart.append(Parcel(name, offer.dtype, parts.blocks, [key]))
        for parcels, scattered in ((together, False), (apart, True)):
            self._run_stream(parcels, scattered)

    def _parts(
        self, size: tuple[int, ...], kinds: Sequence[Need], wants: tuple[tuple[int, ...], ...]
    ) -> _Parts:
        """The same object for what is needed alike."""
        found = self._known.get((size, wants))
        if found is None:
            found = self._known[size, wants] = _Parts(size, self.domain.members, kinds, wants)
            self._grids[id(found.blocks)] = found.grid
        return found

    def _keep(self, key: Any) -> None:
        """What the source needs itself of a tensor that it has whole."""
        if self.full is not None:
            for target in self.targets.get(key, ()):
                target.take(self.full[key].detach())

    def _send_alone(self, key: Any, scattered: bool) -> None:
        memory = None
        for target in self.targets.get(key, ()):
            assert target.memory is not None
            memory = target.memory.view(-1).view(torch.uint8)
        data = None
        if self.full is not None:
            data = self.full[key].detach().view(-1).view(torch.uint8).to(self.domain.device)
        if not scattered:
            data = memory if data is None else data
            assert data is not None
            work = broadcast(self.group, data)
            # What is sent is only read, so the source may copy it for itself at the same time.
            self._keep(key)
            finish(work)
            return
        assert memory is not None
        rows = None if data is None else data.view(len(self.domain.members), -1)
        finish(scatter(self.group, memory, rows))

    def _run_stream(self, parcels: Sequence[Parcel], scattered: bool) -> None:
        participants = len(self.domain.members) if scattered else 1
        # Two buckets at a time: one is on its way while another is packed, or unpacked.
        todo = Stream(parcels, participants, held=2 * participants)
        if self.full is None:
            self._receive_stream(todo, scattered)
        else:
            self._send_stream(todo, scattered)

    def _send_stream(self, todo: Stream, scattered: bool) -> None:
        work = None
        for width, pieces in todo.buckets():
            shape = (todo.participants, width)
            rows = torch.empty(shape, dtype=torch.uint8, device=self.domain.device)
            self._fill(rows, pieces, todo.parcels)
            finish(work)
            if scattered:
                # The source takes its own part from where it is: its row is not looked at.
                work = scatter(self.group, rows[0], rows)
            else:
                work = broadcast(self.group, rows[0])
        if scattered:
            self._keep_all([key for parcel in todo.parcels for key in parcel.items])
        finish(work)

    def _receive_stream(self, todo: Stream, scattered: bool) -> None:
        column = self.me if scattered else 0
        here: tuple[torch.Tensor, Sequence[Piece]] | None = None
        for width, pieces in todo.buckets():
            mine = torch.empty(width, dtype=torch.uint8, device=self.domain.device)
            group = self.group
            work = scatter(group, mine, None) if scattered else broadcast(group, mine)
            if here is not None:
                self._unpack(*here, todo.parcels, column)
            finish(work)
            here = mine, pieces[column]
        if here is not None:
            self._unpack(*here, todo.parcels, column)

    def _keep_all(self, keys: Sequence[Any]) -> None:
        """As :meth:`_keep` for many keys, in one call where it can be."""
        assert self.full is not None
        memories: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for key in keys:
            full = self.full[key].detach()
            for target in self.targets.get(key, ()):
                memory, block = target.memory, target.block
                plain = memory is not None and memory.dtype == full.dtype and full.dtype in MOVABLE
                if plain and block is not None and block.region is not None:
                    assert memory is not None
                    memories.append(memory)
                    values.append(full[block.region])
                else:
                    target.take(full)
        copy_all(memories, values)

    def _unpack(
        self,
        mine: torch.Tensor,
        pieces: Sequence[Piece],
        parcels: Sequence[Parcel],
        column: int,
    ) -> None:
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for piece, room in rooms(mine, pieces, parcels):
            parcel = parcels[piece.parcel]
            block = parcel.blocks[column][piece.block]
            keys = parcel.items[piece.first : piece.first + piece.count]
            for key, part in zip(keys, room.view(len(keys), -1).unbind(), strict=True):
                for target in self.targets.get(key, ()):
                    if target.block is block or target.block == block:
                        pairs.extend(target.landing(piece.start, piece.stop, part))
        copy_all([memory for memory, _ in pairs], [part for _, part in pairs])

    def _fill(
        self,
        rows: torch.Tensor,
        pieces: Sequence[Sequence[Piece]],
        parcels: Sequence[Parcel],
    ) -> None:
        """Write what each participant gets into its row of a bucket.

        The source's own row may stay as it is where there are others.
        """
        assert self.full is not None
        first = 1 if len(rows) > 1 else 0
        into: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        if pieces[0] is not pieces[-1]:
            for taker, row in enumerate(rows[first:], first):
                for piece, room in rooms(row, pieces[taker], parcels):
                    self._fill_part(room, piece, parcels[piece.parcel], 0, taker)
            return
        for piece, room in rooms(rows, pieces[0], parcels):
            parcel = parcels[piece.parcel]
            grid = self._grids.get(id(parcel.blocks))
            for index in range(piece.count):
                part = room.view(len(rows), piece.count, -1)[:, index]
                if grid is None or part.size(1) != grid.numel:
                    for taker, row in enumerate(part[first:], first):
                        self._fill_part(row, piece, parcel, index, taker)
                    continue
                source = grid.of(carried(self.full[parcel.items[piece.first + index]].detach()))
                space = grid.rows(part, source)
                if len(grid.parts) == 1 and part.nbytes > _WORTH_A_VIEW:
                    source, space = source[first:], space[first:]
                into.append(space)
                values.append(source)
        copy_all(into, values)

    def _fill_part(
        self, room: torch.Tensor, piece: Piece, parcel: Parcel, index: int, taker: int
    ) -> None:
        assert self.full is not None
        block = parcel.blocks[taker][piece.block]
        full = self.full[parcel.items[piece.first + index]].detach()
        found = block_elements(full, block, piece.start, piece.stop)
        torch.cat([part.to(room.device) for part in found], out=room)


def _travels_alone(offer: Offer, parts: _Parts) -> bool:
    """Whether a tensor is so large that it is sent from where it lies to where it belongs.

    That saves the copies into and out of a bucket. The answer rests on what all ranks know.
    """
    assert offer.dtype is not None
    if math.prod(offer.size) * offer.dtype.itemsize < stream.alone_bytes():
        return False
    others, source = parts.direct
    if not offer.flat or not others:
        return False
    if parts.everywhere:
        return True
    return parts.grid is not None and parts.grid.stacked and source
