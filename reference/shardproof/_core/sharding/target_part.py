"""Which part of a full tensor each rank takes, by the placements of its target."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import product
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from shardproof._core.sharding.blocks import (
    Block,
    Cut,
    block_at,
    cuts_of,
    full_block,
    partial_dims,
    spec_block,
    split_dims,
)
from shardproof._core.sharding.ranks import (
    group_orders,
    mesh_ranks,
    my_coordinate,
    my_shard_number,
    shard_numbers,
)


class TargetPart(NamedTuple):
    """Which part of full tensors a target takes, on whatever rank.

    Attributes:
        members: the global ranks of the target's mesh, row-major; none for a plain target.
        mesh: the mesh's shape.
        cuts: how it is sharded.
        numbers: which shard each member takes, where its coordinate does not say it.

    """

    members: tuple[int, ...] = ()
    mesh: tuple[int, ...] = ()
    cuts: tuple[Cut, ...] = ()
    numbers: tuple[tuple[int, ...], ...] = ()

    def blocks(self, size: tuple[int, ...], ranks: Sequence[int]) -> list[Block | None]:
        """What each global rank takes of a full tensor; None where it is outside the mesh."""
        if not self.members:
            return [full_block(size)] * len(ranks)
        numbers = self.numbers or product(*map(range, self.mesh))
        of_rank = dict(zip(self.members, numbers, strict=True))
        at = [of_rank.get(rank) for rank in ranks]
        return [None if c is None else block_at(size, self.mesh, self.cuts, c) for c in at]


WHOLE = TargetPart()

# Weak: a mesh holds process groups.
_TARGET_PARTS: WeakKeyDictionary[DeviceMesh, dict[Hashable, tuple[TargetPart, Block | None, bool]]]
_TARGET_PARTS = WeakKeyDictionary()


def target_part_of(spec: DTensorSpec) -> tuple[TargetPart, Block | None, bool]:
    """(the part, this rank's block, whether a reduction is pending).

    Models have few layouts, and loads ask for the same again and again.
    """
    known = _TARGET_PARTS.setdefault(spec.mesh, {})
    # The types, too: a kind of partial of its own may equal the plain one.
    kinds = tuple(map(type, spec.placements))
    # An equal mesh of an earlier world may still be there, in which this process was another rank.
    # There may be one of other groups, too.
    coordinate, orders = my_coordinate(spec.mesh), group_orders(spec.mesh)
    key = coordinate, orders, spec.placements, kinds, spec.shape, getattr(spec, "shard_order", None)
    found = known.get(key)
    if found is None:
        shape, cuts = tuple(spec.mesh.shape), cuts_of(spec)
        dims = split_dims(cuts, shape)
        numbers, mine = shard_numbers(spec.mesh, dims), my_shard_number(spec.mesh, dims)
        part = TargetPart(mesh_ranks(spec.mesh), shape, cuts, numbers)
        block = None if mine is None else spec_block(spec, mine)
        found = known[key] = part, block, bool(partial_dims(spec.placements))
    return found
