"""Shards of equal size, read or written by one operation on a view of the whole tensor.

Most tensors are cut evenly. Then the parts of all participants are one view of the whole tensor,
and one operation moves them, where rectangles would have to be moved one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, permutations
from operator import mul
from typing import Any

import torch

from shardproof._core.sharding.blocks import Block, Cut, block_at
from shardproof._core.sharding.ranks import coordinates_along
from shardproof._core.tensors.values import copies_of_each, stack_into

# Bytes that stay in the processor's second cache while they are written and read once.
_NEAR = 1 << 18


@dataclass(frozen=True)
class UniformGrid:
    """Equal blocks that tile a tensor, one a participant, in the participants' order.

    With it all blocks are read or written by one operation on a view of the whole tensor. Where
    it repeats several participants have the same block, and blocks can only be read.

    Attributes:
        shape: of the tensor.
        parts: how many blocks there are, per tensor dimension that is cut, outermost first; then 1
            for each of the others.
        block: the shape of one block.
        numel: the number of its elements.
        stacked: the blocks, without repetition, follow each other in a contiguous tensor.
        repeats: how often the participants go through all blocks, and how many in a row have the
            same one each time.

    """

    shape: tuple[int, ...]
    parts: tuple[int, ...]
    block: tuple[int, ...]
    numel: int
    stacked: bool
    repeats: tuple[int, int]
    _split: tuple[int, ...]
    _order: tuple[int, ...]

    def block_rows(self, full: torch.Tensor) -> torch.Tensor:
        """A view of the tensor with one block a row.

        Of shape ``(*parts, *block)``, or flatter; ``(repeats, *parts, repeats, *block)`` where it
        repeats.
        """
        if self.stacked and full.is_contiguous():
            return full.view(self.parts[0], -1)
        return self._repeated(full.view(self._split).permute(self._order))

    def rows(self, data: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Rows of elements, shaped as the view ``like`` that :meth:`block_rows` gave."""
        return data if like.dim() == 2 and self.stacked else data.view(like.shape)

    def assemble(self, data: torch.Tensor, count: int) -> list[torch.Tensor]:
        """New whole tensors from rows that hold the blocks of ``count`` of them.

        They are put together many at a time in memory that the processor keeps at hand: a tensor
        then costs a fraction of what views of it and of the rows would.
        """
        made: list[torch.Tensor] = []
        for _, rows, near in self._near(data, count):
            self._blocks_of(near).copy_(rows)
            made.extend(copies_of_each(near))
        return made

    def fill(self, data: torch.Tensor, wholes: Sequence[torch.Tensor]) -> None:
        """Write the blocks of whole tensors into rows: the inverse of :meth:`assemble`."""
        for at, rows, near in self._near(data, len(wholes)):
            stack_into(near.view(-1), list(wholes[at : at + len(near)]))
            rows.copy_(self._blocks_of(near))

    def _repeated(self, blocks: torch.Tensor) -> torch.Tensor:
        """A view of shape ``(*parts, ...)`` that shows each block as often as it is needed."""
        if self.repeats == (1, 1):
            return blocks
        outer, inner = self.repeats
        shown = blocks.unsqueeze(len(self.parts)).unsqueeze(0)
        return shown.expand(outer, *self.parts, inner, *blocks.shape[len(self.parts) :])

    @property
    def _participants(self) -> tuple[int, ...]:
        outer, inner = self.repeats
        return self.parts if self.repeats == (1, 1) else (outer, *self.parts, inner)

    def _near(
        self, data: torch.Tensor, count: int
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(first tensor, rows of some, room for them) until ``count`` of them are through.

        The rows are a view of shape ``(*participants, tensors, *block)``.
        """
        participants = self._participants
        rows = data.view(*participants, count, *self.block)
        step = max(1, min(count, _NEAR // (math.prod(self.shape) * data.itemsize)))
        near = torch.empty((step, *self.shape), dtype=data.dtype, device=data.device)
        for at in range(0, count, step):
            number = min(step, count - at)
            yield at, rows.narrow(len(participants), at, number), near[:number]

    def _blocks_of(self, wholes: torch.Tensor) -> torch.Tensor:
        """The same view of stacked whole tensors."""
        order = [dim + 1 for dim in self._order]
        order.insert(len(self.parts), 0)
        return self._repeated(wholes.view(len(wholes), *self._split).permute(order))


# Up to so many participants a line is remembered: more of them would fill the memory.
_CACHED_RANKS = 64


def blocks_and_grid_at(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    cuts: tuple[Cut, ...],
    coordinates: tuple[tuple[int, ...], ...],
) -> tuple[list[list[Block]], UniformGrid | None]:
    """What each mesh coordinate holds of a tensor, and the grid that these blocks make, if any."""
    compute = (
        _cached_blocks_and_grid if len(coordinates) <= _CACHED_RANKS else _find_blocks_and_grid
    )
    return compute(shape, mesh_shape, cuts, coordinates)


def _find_blocks_and_grid(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    cuts: tuple[Cut, ...],
    coordinates: tuple[tuple[int, ...], ...],
) -> tuple[list[list[Block]], UniformGrid | None]:
    blocks = [[block_at(shape, mesh_shape, cuts, coordinate)] for coordinate in coordinates]
    return blocks, grid_of(shape, blocks)


_cached_blocks_and_grid = lru_cache(maxsize=4096)(_find_blocks_and_grid)


def grid_of(shape: Sequence[int], blocks: Sequence[Sequence[Block]]) -> UniformGrid | None:
    """The grid that the participants' blocks make, None where they are no such thing.

    Args:
        shape: the global shape.
        blocks: per participant.

    """
    if not blocks or any(len(held) != 1 for held in blocks):
        return None
    cells = [held[0] for held in blocks]
    size = cells[0].shape
    if not cells[0].numel or any(cell.starts is None or cell.shape != size for cell in cells):
        return None
    if any(whole % part for whole, part in zip(shape, size, strict=True)):
        return None
    counts = [whole // part for whole, part in zip(shape, size, strict=True)]
    cut = [dim for dim, count in enumerate(counts) if count > 1]
    once = math.prod(counts)
    if len(cells) % once or not cut:
        return None
    repeats = _repeats([cell.starts for cell in cells], once)
    if repeats is None:
        return None
    starts = [cell.starts for cell in cells[:: repeats[1]][:once]]
    for dims in permutations(cut):
        cells_in_order = coordinates_along([0] * len(size), dims, counts)
        if starts == [tuple(map(mul, cell, size)) for cell in cells_in_order]:
            break
    else:
        return None
    follow = len(dims) == 1 and all(size[dim] == 1 for dim in range(dims[0]))
    # Each dimension is split into two: the number of its parts, and the size of one.
    dims = (*dims, *(dim for dim, count in enumerate(counts) if count == 1))
    return UniformGrid(
        shape=tuple(shape),
        parts=tuple(counts[dim] for dim in dims),
        block=size,
        numel=cells[0].numel,
        stacked=follow and repeats == (1, 1),
        repeats=repeats,
        _split=tuple(chain(*zip(counts, size, strict=True))),
        _order=(*(2 * dim for dim in dims), *range(1, 2 * len(size), 2)),
    )


def _repeats(starts: Sequence[Any], once: int) -> tuple[int, int] | None:
    """How often the participants go through all blocks, and how many in a row have the same."""
    inner = next((n for n, start in enumerate(starts) if start != starts[0]), len(starts))
    outer = len(starts) // (inner * once)
    repeated = [start for start in starts[::inner][:once] for _ in range(inner)] * outer
    return (outer, inner) if list(starts) == repeated else None
