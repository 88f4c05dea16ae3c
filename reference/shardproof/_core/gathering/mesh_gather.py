"""The gather over some dimensions of a mesh: whole tensors on all ranks, or on one.

Small tensors share buckets; a large one is gathered from where it lies right to where it belongs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from shardproof._core import limits
from shardproof._core.comms.buckets import (
    BucketStream,
    Parcel,
    Piece,
    pack,
    piece_views,
    regions_of_piece,
)
from shardproof._core.comms.collectives import all_gather_into, collect, collect_to
from shardproof._core.gathering.leaf_entries import Agreement
from shardproof._core.gathering.sharded_leaves import ShardedLeaf
from shardproof._core.sharding.partial_reduction import reduce_partials
from shardproof._core.sharding.ranks import coordinates_along
from shardproof._core.sharding.tensor_layout import TensorLayout
from shardproof._core.sharding.uniform_grid import UniformGrid
from shardproof._core.tensors.pinned_copy import copy_to_pinned, is_on_gpu
from shardproof._core.tensors.properties import CPU, is_lazy
from shardproof._core.tensors.values import allocate, as_carrier, carrier_dtype, copy_all


def needs_bucket(leaf: ShardedLeaf, cpu_offload: bool) -> bool:
    """Whether on this rank a tensor cannot be gathered right from and into its memory.

    Then it would need a copy of all of it, where the bucket needs a part.
    """
    domain = leaf.layout.domain
    assert domain is not None
    direct = all(
        part.is_contiguous() and part.device == domain.device and not is_lazy(part)
        for part in leaf.local
    )
    offloaded = cpu_offload and domain.device != CPU
    return not direct or offloaded or leaf.layout.stride is not None


def carrier_view(full: torch.Tensor) -> torch.Tensor:
    """A view of a result that takes values as they travel."""
    dtype = carrier_dtype(full.dtype)
    return full if dtype is full.dtype else full.view(dtype)


Copies = list[tuple[torch.Tensor, torch.Tensor]]
"""(target, values) of copies that are found one by one and made in one call."""

# Up to how many bytes whole tensors are put together many at a time: they are copied twice then,
# and a larger one costs more to copy than to look at.
_TOGETHER = 1 << 16


class MeshGather:
    """The ranks over which leaves are gathered: those that differ in some dimensions of a domain.

    Args:
        kinds: leaves of one domain, with the same dimensions and reductions. Those of one kind are
            laid out alike; kinds, and leaves within them, have the same order on every rank.
        destinations: the global ranks that want results; None for all.
        agreed: what the ranks know of each other.
        cpu_offload: whether results are to be in CPU memory.

    """

    def __init__(
        self,
        kinds: Sequence[Sequence[ShardedLeaf]],
        destinations: frozenset[int] | None,
        agreed: Agreement,
        cpu_offload: bool,
    ) -> None:
        layout = kinds[0][0].layout
        domain, dims = layout.domain, layout.dims
        assert domain is not None
        self.domain, self.dims, self.reductions = domain, dims, layout.reductions
        self.may_travel_alone = agreed.allows_whole(domain) and len(dims) == 1
        here = domain.my_coordinate
        self.coordinates = tuple(coordinates_along(here, dims, domain.shape))
        self.me = self.coordinates.index(here)
        ranks = [domain.members[domain.position(c)] for c in self.coordinates]
        self.takers = [
            i for i, rank in enumerate(ranks) if destinations is None or rank in destinations
        ]
        self.stages = [domain.stage(d) for d in dims]
        self.peers = _peers(layout.shard_numbers(self.coordinates), dims, self.reductions)
        self.kinds = kinds
        self.cpu_offload = cpu_offload

    def gather(self, results: dict[str, torch.Tensor]) -> None:
        """Run the collectives; fill the results, where this rank wants any."""
        if not self.takers:
            return
        parcels: list[Parcel] = []
        grids: dict[int, UniformGrid | None] = {}
        for kind in self.kinds:
            layout = kind[0].layout
            blocks, grid = layout.blocks_and_grid(self.coordinates)
            grid = None if self.reductions else grid
            if self._travels_alone(layout, grid):
                for leaf in kind:
                    self._gather_alone(leaf, results)
            else:
                parcel = Parcel(kind[0].path, layout.dtype, blocks, kind)
                parcels.append(parcel)
                grids[id(parcel)] = grid
        if parcels:
            # What a rank sends, and all rows twice: Gloo receives them into its own first.
            size = len(self.coordinates)
            todo = BucketStream(parcels, size, held=1 + 2 * size)
            self._gather_stream(todo, [grids[id(parcel)] for parcel in todo.parcels], results)
        if self.me in self.takers:
            for kind in self.kinds:
                for leaf in kind:
                    if leaf.path not in results:  # none of its elements has travelled: it has none
                        results[leaf.path] = result_for(leaf, self.cpu_offload)

    def _travels_alone(self, layout: TensorLayout, grid: UniformGrid | None) -> bool:
        """Whether a tensor is so large that it fills collectives of its own, without a bucket.

        That saves two copies of it, but works only where the rows of an all-gather are the tensor.
        The answer rests on what all ranks have agreed on.
        """
        if len(self.takers) < len(self.coordinates) or not self.may_travel_alone:
            return False
        if not layout.large:
            return False
        return grid is not None and grid.stacked

    def _gather_alone(self, leaf: ShardedLeaf, results: dict[str, torch.Tensor]) -> None:
        out = results[leaf.path] = result_for(leaf, self.cpu_offload)
        payload = as_carrier(leaf.local[0]).view(-1).view(torch.uint8)
        into = carrier_view(out).view(-1).view(torch.uint8)
        all_gather_into(self.stages[0].group, payload, into, limits.BUCKET_BYTES // 2)

    def _gather_stream(
        self,
        todo: BucketStream,
        grids: Sequence[UniformGrid | None],
        results: dict[str, torch.Tensor],
    ) -> None:
        parcels = todo.parcels
        layouts = {leaf.layout for parcel in parcels for leaf in parcel.items}
        devices = {result_device(layout, self.cpu_offload) for layout in layouts}
        for width, pieces in todo.buckets():
            bucket = torch.empty(width, dtype=torch.uint8, device=self.domain.device)
            pack(bucket, pieces[self.me], parcels, _part)
            if len(self.takers) == 1:
                at = [self.coordinates[index] for index in (self.me, self.takers[0])]
                mine, dest = ([place[dim] for dim in self.dims] for place in at)
                rows = collect_to(self.stages, bucket, mine, dest)
            else:
                rows = collect(self.stages, bucket)
            if rows is not None and self.me in self.takers:
                # One copy of the bucket instead of one per tensor.
                if devices == {CPU} and is_on_gpu(rows):
                    rows = copy_to_pinned(rows)  # Not reached on a CPU: no rows lie elsewhere.
                elif len(devices) == 1:
                    rows = rows.to(next(iter(devices)))
                self._unpack(rows, pieces, parcels, grids, results)
            # Else they would still be there when the next bucket's are made.
            del bucket, rows

    def _unpack(
        self,
        rows: torch.Tensor,
        pieces: Sequence[Sequence[Piece]],
        parcels: Sequence[Parcel],
        grids: Sequence[UniformGrid | None],
        results: dict[str, torch.Tensor],
    ) -> None:
        todo: Copies = []
        if pieces[0] is pieces[-1]:
            for piece, room in piece_views(rows, pieces[0], parcels):
                parcel = parcels[piece.parcel]
                leaves: Sequence[ShardedLeaf] = parcel.items[
                    piece.first : piece.first + piece.count
                ]
                grid = grids[piece.parcel]
                if grid is None or piece.stop - piece.start != grid.numel:
                    for index, leaf in enumerate(leaves):
                        parts = list(room.view(len(room), len(leaves), -1)[:, index])
                        for group in self.peers:
                            mine = [parts[i] for i in group]
                            self._unpack_piece(parcel, leaf, group, piece, mine, results, todo)
                elif self._come_together(leaves, rows.device):
                    made = grid.assemble(room, len(leaves))
                    if room.dtype is not leaves[0].layout.dtype:
                        made = [whole.view(leaves[0].layout.dtype) for whole in made]
                    results.update(zip([leaf.path for leaf in leaves], made, strict=True))
                else:
                    each = [room]
                    if len(leaves) > 1:
                        each = list(room.view(len(room), len(leaves), -1).unbind(1))
                    for leaf, part in zip(leaves, each, strict=True):
                        target = grid.block_rows(carrier_view(self._result(leaf, results)))
                        todo.append((target, grid.rows(part, target)))
        else:
            for group in self.peers:
                for number, piece in enumerate(pieces[group[0]]):
                    peers = [pieces[i][number] for i in group]
                    parcel = parcels[piece.parcel]
                    leaf = parcel.items[piece.first]
                    parts = [rows[i, p.at : p.end] for i, p in zip(group, peers, strict=True)]
                    self._unpack_piece(parcel, leaf, group, piece, parts, results, todo)
        copy_all([target for target, _ in todo], [values for _, values in todo])

    def _come_together(self, leaves: Sequence[ShardedLeaf], device: torch.device) -> bool:
        """Whether the results of these leaves are best made many at a time."""
        if len(leaves) == 1 or device != CPU or leaves[0].layout.nbytes > _TOGETHER:
            return False
        layouts = {leaf.layout for leaf in leaves}
        return all(
            layout.stride is None and result_device(layout, self.cpu_offload) == CPU
            for layout in layouts
        )

    def _result(self, leaf: ShardedLeaf, results: dict[str, torch.Tensor]) -> torch.Tensor:
        out = results.get(leaf.path)
        if out is None:
            out = results[leaf.path] = result_for(leaf, self.cpu_offload)
        return out

    def _unpack_piece(
        self,
        parcel: Parcel,
        leaf: ShardedLeaf,
        group: Sequence[int],
        piece: Piece,
        parts: Sequence[torch.Tensor],
        results: dict[str, torch.Tensor],
        todo: Copies,
    ) -> None:
        """Unpack one piece of one rank, or of the ranks whose values are reduced into one."""
        dtype = leaf.layout.dtype
        if self.reductions:
            ops = [op for _, op in sorted(self.reductions.items())]
            data = carrier_view(reduce_partials([p.view(dtype) for p in parts], ops, len(group)))
        else:
            data = parts[0].view(carrier_dtype(dtype))
        block = parcel.blocks[group[0]][piece.block]
        whole = carrier_view(self._result(leaf, results))
        for region, values in regions_of_piece(data, block, piece):
            todo.append((whole[region], values))


def _part(leaf: ShardedLeaf, block: int) -> torch.Tensor:
    return leaf.local[block]


def result_device(layout: TensorLayout, cpu_offload: bool) -> torch.device:
    """The device on which the whole tensors of a layout are made."""
    return CPU if cpu_offload else layout.device


def result_for(leaf: ShardedLeaf, cpu_offload: bool) -> torch.Tensor:
    """A tensor that takes the values of a leaf."""
    layout = leaf.layout
    device = result_device(layout, cpu_offload)
    return allocate(layout.shape, layout.dtype, device, layout.stride)


def _peers(
    numbers: Sequence[tuple[int, ...]], dims: Sequence[int], reductions: Mapping[int, str]
) -> list[list[int]]:
    """The participants whose values are reduced into one, in row-major order."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, shard in enumerate(numbers):
        groups[tuple(shard[dim] for dim in dims if dim not in reductions)].append(index)
    return list(groups.values())
