"""The ranks along which tensors are gathered, and how the bytes get from each to all, or to one.

Small tensors share buckets; a large one is gathered from where it lies right to where it belongs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

import torch

from shardproof._state_dict_utils import stream
from shardproof._state_dict_utils.agreement import Entries
from shardproof._state_dict_utils.grid import Grid, grid_of
from shardproof._state_dict_utils.layout import Block
from shardproof._state_dict_utils.leaves import Layout, Leaf
from shardproof._state_dict_utils.reduction import reduced
from shardproof._state_dict_utils.stream import (
    Parcel,
    Piece,
    Stream,
    carried,
    deliver,
    elements,
    pack,
    sections,
)
from shardproof._state_dict_utils.tensors import (
    CPU,
    carrier,
    copy_all,
)
from shardproof._state_dict_utils.wire import (
    Domain,
    all_gather_into,
    collect,
    collect_to,
)


class Agreed(NamedTuple):
    """What all ranks know of each other before tensors move.

    Attributes:
        details: the members' entries, in the domains where they are not all the same.
        in_buckets: the domains of which a member cannot take a large tensor but by the bucket.

    """

    details: Mapping[Domain, Sequence[Entries]]
    in_buckets: Sequence[Domain]

    def whole(self, domain: Domain) -> bool:
        """Whether large tensors of the domain can travel whole, each by itself."""
        members = set(domain.members)
        return not any(members <= set(other.members) for other in self.in_buckets)


def needs_bucket(leaf: Leaf, cpu_offload: bool) -> bool:
    """Whether on this rank a tensor cannot be gathered right from and into its memory.

    Then it would need a copy of all of it, where the bucket needs a part.
    """
    domain = leaf.layout.domain
    if domain is None:
        return True
    direct = all(part.is_contiguous() and part.device == domain.device for part in leaf.local)
    offloaded = cpu_offload and domain.device != CPU
    return not direct or offloaded or leaf.layout.stride is not None


def carried_view(full: torch.Tensor) -> torch.Tensor:
    """A view of a result that takes values as they travel."""
    dtype = carrier(full.dtype)
    return full if dtype is full.dtype else full.view(dtype)


def write(whole: torch.Tensor, region: tuple[slice, ...], values: torch.Tensor) -> None:
    whole[region].copy_(values)


class _Copies:
    """Copies that are found one by one and made in one call."""

    def __init__(self) -> None:
        self._targets: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def add(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """Remember one."""
        self._targets.append(target)
        self._values.append(values)

    def run(self) -> None:
        """Make them."""
        copy_all(self._targets, self._values)


class Line:
    """The ranks over which leaves are gathered: those that differ in some dimensions of a domain.

    Args:
        leaves: of one domain, with the same dimensions and reductions.
        wanted: the global ranks that want results; None for all.
        agreed: what the ranks know of each other.

    """

    def __init__(
        self, leaves: Sequence[Leaf], wanted: frozenset[int] | None, agreed: Agreed
    ) -> None:
        layout = leaves[0].layout
        domain, dims = layout.domain, layout.dims
        assert domain is not None
        self.domain, self.reductions = domain, layout.reductions
        self.may_travel_alone = agreed.whole(domain) and len(dims) == 1
        here = domain.here
        self.places = list(product(*(range(domain.shape[d]) for d in dims)))
        self.coordinates = [_with(here, dims, place) for place in self.places]
        self.me = self.coordinates.index(here)
        line = [domain.members[domain.position(c)] for c in self.coordinates]
        self.takers = [i for i, rank in enumerate(line) if wanted is None or rank in wanted]
        self.stages = [domain.stage(d) for d in dims]
        self.peers = _peers(self.places, dims, self.reductions)
        self.leaves = {leaf.path: leaf for leaf in leaves}
        self._blocks: dict[int, list[list[Block]]] = {}
        self._grids: dict[int, Grid | None] = {}

    def blocks(self, layout: Layout) -> list[list[Block]]:
        """What each rank of the line holds of a tensor."""
        held = self._blocks.get(id(layout))
        if held is None:
            held = self._blocks[id(layout)] = [layout.blocks(c) for c in self.coordinates]
        return held

    def grid(self, layout: Layout) -> Grid | None:
        """The grid that these make, if they make one and are not to be reduced."""
        if id(layout) not in self._grids:
            held = None if self.reductions else grid_of(layout.shape, self.blocks(layout))
            self._grids[id(layout)] = held
        return self._grids[id(layout)]

    def gather(self, results: dict[str, torch.Tensor]) -> None:
        """Run the collectives; fill the results, where this rank wants any."""
        if not self.takers:
            return
        alone = {leaf.path for leaf in self.leaves.values() if self._travels_alone(leaf.layout)}
        for path in sorted(alone):
            self._gather_alone(self.leaves[path], results.get(path))
        parcels = [
            Parcel(leaf.path, leaf.layout.dtype, self.blocks(leaf.layout))
            for leaf in self.leaves.values()
            if leaf.path not in alone
        ]
        if parcels:
            # What a rank sends, and all rows twice: Gloo receives them into its own first.
            size = len(self.places)
            self._gather_stream(Stream(parcels, size, held=1 + 2 * size), results)

    def _travels_alone(self, layout: Layout) -> bool:
        """Whether a tensor is so large that it fills collectives of its own, without a bucket.

        That saves two copies of it, but works only where the rows of an all-gather are the tensor.
        The answer rests on what all ranks have agreed on.
        """
        if len(self.takers) < len(self.places) or not self.may_travel_alone:
            return False
        if not layout.large:
            return False
        grid = self.grid(layout)
        return grid is not None and grid.stacked and self.stages[0].in_order

    def _gather_alone(self, leaf: Leaf, out: torch.Tensor | None) -> None:
        assert out is not None
        payload = carried(leaf.local[0]).view(-1).view(torch.uint8)
        into = carried_view(out).view(-1).view(torch.uint8)
        all_gather_into(self.stages[0].group, payload, into, stream.BUCKET_BYTES // 2)

    def _gather_stream(self, todo: Stream, results: dict[str, torch.Tensor]) -> None:
        parcels = todo.parcels
        sources = [self.leaves[parcel.name].local for parcel in parcels]
        outputs = [results.get(parcel.name) for parcel in parcels]

        def part(piece: Piece) -> list[torch.Tensor]:
            return elements(sources[piece.parcel][piece.block], piece.start, piece.stop)

        for width, pieces in todo.buckets():
            bucket = torch.empty(width, dtype=torch.uint8, device=self.domain.device)
            pack(pieces[self.me], parcels, part, bucket)
            if len(self.takers) == 1:
                taker = self.places[self.takers[0]]
                rows = collect_to(self.stages, bucket, self.places[self.me], taker)
            else:
                rows = collect(self.stages, bucket)
            if rows is not None and self.me in self.takers:
                self._unpack(rows, pieces, parcels, outputs)
            # Else they would still be there when the next bucket's are made.
            del bucket, rows

    def _unpack(
        self,
        rows: torch.Tensor,
        pieces: Sequence[Sequence[Piece]],
        parcels: Sequence[Parcel],
        outputs: Sequence[torch.Tensor | None],
    ) -> None:
        devices = {out.device for out in outputs if out is not None}
        if len(devices) == 1:
            # One copy of the bucket instead of one per tensor.
            rows = rows.to(devices.pop())
        todo = _Copies()
        if pieces[0] is pieces[-1]:
            self._unpack_grids(rows, pieces[0], parcels, outputs, todo)
            todo.run()
            return
        for group in self.peers:
            for number, piece in enumerate(pieces[group[0]]):
                peers = [pieces[i][number] for i in group]
                self._unpack_piece(rows, group, peers, parcels[piece.parcel], outputs, todo)
        todo.run()

    def _unpack_grids(
        self,
        rows: torch.Tensor,
        pieces: Sequence[Piece],
        parcels: Sequence[Parcel],
        outputs: Sequence[torch.Tensor | None],
        todo: _Copies,
    ) -> None:
        """Unpack pieces that lie at the same place in all rows, most of them all rows at once."""
        for dtype, run in sections(pieces, parcels):
            data = rows[:, run[0].at : run[-1].end].view(carrier(dtype))
            parts = data.split_with_sizes([p.stop - p.start for p in run], dim=1)
            for piece, part in zip(run, parts, strict=True):
                parcel, out = parcels[piece.parcel], outputs[piece.parcel]
                if out is None:
                    continue
                grid = self.grid(self.leaves[parcel.name].layout)
                if grid is None or part.size(1) != grid.numel:
                    for group in self.peers:
                        peers = [piece] * len(group)
                        self._unpack_piece(rows, group, peers, parcel, outputs, todo)
                    continue
                target = grid.of(carried_view(out))
                todo.add(target, grid.rows(part, target))

    def _unpack_piece(
        self,
        rows: torch.Tensor,
        group: Sequence[int],
        pieces: Sequence[Piece],
        parcel: Parcel,
        outputs: Sequence[torch.Tensor | None],
        todo: _Copies,
    ) -> None:
        """Unpack one piece of one rank, or of the ranks whose values are reduced into one."""
        piece = pieces[0]
        out = outputs[piece.parcel]
        if out is None:
            return
        parts = [rows[i, p.at : p.end] for i, p in zip(group, pieces, strict=True)]
        if self.reductions:
            ops = [op for _, op in sorted(self.reductions.items())]
            data = carried_view(reduced([p.view(parcel.dtype) for p in parts], ops, len(group)))
        else:
            data = parts[0].view(carrier(parcel.dtype))
        block = parcel.blocks[group[0]][piece.block]
        whole = carried_view(out)
        deliver(data, block, piece, lambda region, values: todo.add(whole[region], values))


def _with(here: Sequence[int], dims: Sequence[int], place: Sequence[int]) -> tuple[int, ...]:
    coordinate = list(here)
    for dim, index in zip(dims, place, strict=True):
        coordinate[dim] = index
    return tuple(coordinate)


def _peers(
    places: Sequence[tuple[int, ...]], dims: Sequence[int], reductions: Mapping[int, str]
) -> list[list[int]]:
    """The participants whose values are reduced into one, in row-major order."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, place in enumerate(places):
        kept = tuple(p for dim, p in zip(dims, place, strict=True) if dim not in reductions)
        groups[kept].append(index)
    return list(groups.values())
