"""Shards of equal size, seen all at once.

Most tensors are cut evenly. Then the parts of all participants are one view of the whole tensor,
and one operation moves them, where rectangles would have to be moved one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product

import torch

from shardproof._state_dict_utils.layout import Block


@dataclass(frozen=True)
class Grid:
    """Equal blocks that tile a tensor, one a participant, in the participants' order.

    With it all blocks are read or written by one operation on a view of the whole tensor.

    Attributes:
        parts: how many blocks there are, per tensor dimension that is cut, outermost first.
        block: the shape of one block.
        numel: the number of its elements.
        stacked: the blocks follow each other in a contiguous tensor.

    """

    parts: tuple[int, ...]
    block: tuple[int, ...]
    numel: int
    stacked: bool
    _split: tuple[int, ...]
    _order: tuple[int, ...]

    def of(self, full: torch.Tensor) -> torch.Tensor:
        """A view of the tensor with one block a row: of shape ``(*parts, *block)``, or flatter."""
        if self.stacked and full.is_contiguous():
            return full.view(self.parts[0], -1)
        return full.view(self._split).permute(self._order)

    def rows(self, data: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Rows of elements, shaped as the view ``like`` that :meth:`of` gave."""
        return data if like.dim() == 2 and self.stacked else data.view(like.shape)


def grid_of(shape: Sequence[int], blocks: Sequence[Sequence[Block]]) -> Grid | None:
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
    if math.prod(counts) != len(cells) or not cut:
        return None
    starts = [cell.starts for cell in cells]
    for dims in permutations(cut):
        places = product(*(range(counts[dim]) for dim in dims))
        expected = []
        for place in places:
            start = [0] * len(size)
            for dim, index in zip(dims, place, strict=True):
                start[dim] = index * size[dim]
            expected.append(tuple(start))
        if starts == expected:
            break
    else:
        return None
    split: list[int] = []
    at: dict[int, int] = {}
    rest: list[int] = []
    for dim, (count, part) in enumerate(zip(counts, size, strict=True)):
        if dim in dims:
            at[dim] = len(split)
            split.append(count)
        rest.append(len(split))
        split.append(part)
    stacked = len(dims) == 1 and all(size[dim] == 1 for dim in range(dims[0]))
    order = (*(at[dim] for dim in dims), *rest)
    return Grid(
        tuple(counts[dim] for dim in dims), size, cells[0].numel, stacked, tuple(split), order
    )
