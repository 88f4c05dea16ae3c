"""The ranks that hold parts of the same tensors: those of a mesh or a process group, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardproof._core.sharding.ranks import coordinates_along, mesh_ranks
from shardproof._core.tensors.properties import CPU


@dataclass(frozen=True)
class Stage:
    """One group to communicate over: that of one mesh dimension.

    ``coordinates[i]`` is the coordinate of group rank ``i`` along that dimension.
    """

    group: dist.ProcessGroup
    coordinates: tuple[int, ...]

    @property
    def in_order(self) -> bool:
        """Whether the group counts its ranks as the dimension does."""
        return self.coordinates == tuple(range(len(self.coordinates)))


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

    @cached_property
    def positions(self) -> dict[int, int]:
        """Global rank -> its position."""
        return {rank: index for index, rank in enumerate(self.members)}

    def index(self) -> int:
        """This rank's position."""
        return self.positions[dist.get_rank()]

    @cached_property
    def coordinates(self) -> list[tuple[int, ...]]:
        """The coordinate of each position: row-major."""
        return list(product(*map(range, self.shape)))

    @cached_property
    def my_coordinate(self) -> tuple[int, ...]:
        """This rank's coordinate."""
        return self.coordinates[self.index()]

    def position(self, coordinate: Sequence[int]) -> int:
        """The position of a coordinate."""
        index = 0
        for size, at in zip(self.shape, coordinate, strict=True):
            index = index * size + at
        return index

    @cached_property
    def _members_along(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        return {}

    def along(self, dims: tuple[int, ...]) -> tuple[int, ...]:
        """The members that differ from this rank in these dimensions alone, this rank included."""
        found = self._members_along.get(dims)
        if found is None:
            indices = map(self.position, coordinates_along(self.my_coordinate, dims, self.shape))
            found = self._members_along[dims] = tuple([self.members[index] for index in indices])
        return found

    def stage(self, dim: int) -> Stage:
        """The communication along one dimension, from this rank's coordinate."""
        group = self.groups[dim]
        assert group is not None
        ranks = dist.get_process_group_ranks(group)
        return Stage(group, tuple(self.coordinates[self.positions[r]][dim] for r in ranks))

    def stages(self) -> list[Stage]:
        """The communication along each dimension that has more than one member."""
        return [self.stage(d) for d, group in enumerate(self.groups) if group is not None]

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
    # Not reached on a CPU: there is no other device to choose.
    if preferred is not None and preferred.type == kind and preferred.index is not None:
        return preferred
    return torch.device(str(kind), torch.get_device_module(kind).current_device())
