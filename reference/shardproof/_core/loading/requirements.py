"""Which shards of the source's tensors each rank requires, and whether they form a uniform grid."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from shardproof._core.sharding.blocks import Block, full_block
from shardproof._core.sharding.target_part import TargetPart
from shardproof._core.sharding.uniform_grid import grid_of

Requirement = tuple[TargetPart, bool]
"""(what is needed of a full tensor, whether it can be received right where it belongs)."""


class RequiredBlocks:
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
        ranks: tuple[int, ...],
        needs: tuple[tuple[Requirement, ...], ...],
    ) -> None:
        """``needs`` is per rank what it needs; one entry where all need the same."""
        held = {need[0]: need[0].blocks(size, ranks) for mine in set(needs) for need in mine}
        everyone = needs if len(needs) > 1 else needs * len(ranks)
        self.blocks: list[list[Block]] = []
        for index, mine in enumerate(everyone):
            found = (held[part][index] for part, _ in mine)
            self.blocks.append(list(dict.fromkeys(b for b in found if b is not None and b.numel)))
        others = self.blocks[1:]
        self.elsewhere = any(others)
        whole = [full_block(size)]
        self.everywhere = all(blocks == whole for blocks in others)
        single = [len(mine) == 1 and mine[0][1] for mine in everyone]
        self.direct = all(single[1:]), single[0]
        self.grid = grid_of(size, self.blocks)
        self.once = [whole]


def required_blocks_of(
    size: tuple[int, ...],
    ranks: tuple[int, ...],
    kinds: Sequence[Requirement],
    wants: tuple[tuple[int, ...], ...],
) -> RequiredBlocks:
    """What the ranks need of tensors of one shape; remembered for small worlds."""
    needs = tuple([tuple([kinds[kind] for kind in mine]) for mine in wants])
    make = _cached_required_blocks if len(ranks) <= _CACHED_RANKS else RequiredBlocks
    return make(size, ranks, needs)


# A large world's parts would fill the memory.
_CACHED_RANKS = 64
_cached_required_blocks = lru_cache(maxsize=1024)(RequiredBlocks)
