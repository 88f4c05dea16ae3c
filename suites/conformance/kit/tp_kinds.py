"""Every kind of tensor that tensor parallelism hands to data parallelism, made of one full tensor.

A kind is added here once, and every sweep over the functions of `tensor.parallel` meets it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import (
    ShardedTensorMetadata,
    TensorProperties,
)
from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from conformance.kit.layouts import (
    ONE_D,
    SS,
    THREE_D,
    TWO_D,
    R,
    S,
    dtensor,
    parameter,
    part,
    placement_id,
    rows,
    sharded_tensor,
)
from conformance.kit.patterns import CARRIERS
from conformance.kit.subclasses import inside, subclass_with


@dataclass(frozen=True)
class Seat:
    """Where a call is made: the world, its meshes and the subject, as the fixtures give them."""

    mesh: Any
    world: Any
    subject: Any

    def root(self) -> DeviceMesh:
        """The mesh of FSDP1 over tensor parallelism; both cut where the world has ranks for it."""
        size = self.world.size
        root: DeviceMesh = self.mesh(2, 2) if size == 4 else self.mesh(1, size)
        return root

    def line(self) -> DeviceMesh:
        """A mesh of one dimension over all ranks."""
        line: DeviceMesh = self.mesh(self.world.size)
        return line

    def lines(self) -> list[DeviceMesh]:
        """Meshes of one dimension that this rank is on."""
        return [self.line()]

    def layouts(self) -> Iterator[tuple[DeviceMesh, list[Placement]]]:
        """Placements over meshes of one, two and three dimensions."""
        size = self.world.size
        yield from ((self.line(), p) for p in ONE_D)
        if size == 4:
            yield from ((self.mesh(2, 2), p) for p in TWO_D)
            yield from ((self.mesh(1, 2, 2), p) for p in THREE_D)
            return
        wide: list[list[Placement]] = [[R, S(0)], [S(1), S(0)], [S(0), S(1)]]
        high: list[list[Placement]] = [[S(0), R], [SS(0, 1), S(0)]]
        yield from ((self.mesh(1, size), p) for p in wide)
        yield from ((self.mesh(size, 1), p) for p in high)
        yield self.mesh(1, 1, size), [R, R, S(0)]


@dataclass(frozen=True)
class Unusual(Seat):
    """Meshes in another rank order, of odd size, of some ranks, of one, all within one call."""

    shape: tuple[int, ...] = (3, 1)
    """Of the root mesh."""

    def _order(self) -> list[int]:
        return [self.world.size - 1, *range(self.world.size - 1)]

    def root(self) -> DeviceMesh:
        root: DeviceMesh = self.mesh(*self.shape, ranks=self._order())
        return root

    def line(self) -> DeviceMesh:
        line: DeviceMesh = self.mesh(self.world.size, ranks=self._order())
        return line

    def lines(self) -> list[DeviceMesh]:
        last = self.world.size - 1
        found = [self.line(), *(self.mesh(2, ranks=ranks) for ranks in ([last, 0], [0, 1]))]
        return [mesh for mesh in found if mesh.get_coordinate() is not None]

    def layouts(self) -> Iterator[tuple[DeviceMesh, list[Placement]]]:
        last = self.world.size - 1
        for ranks in ([0, 1], [1, last], [last, 0], [1], [last]):
            line = self.mesh(len(ranks), ranks=ranks)
            yield from ((line, p) for p in ONE_D)
        yield from ((self.line(), p) for p in ONE_D)
        size, order = self.world.size, self._order()
        wide: list[list[Placement]] = [[R, S(0)], [S(1), S(0)]]
        high: list[list[Placement]] = [[S(0), R], [SS(0, 1), S(0)]]
        yield from ((self.mesh(1, size, ranks=order), p) for p in wide)
        yield from ((self.mesh(size, 1, ranks=order), p) for p in high)
        yield self.mesh(1, 1, size, ranks=order), [R, R, S(0)]


def cut(
    full: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement] | None
) -> torch.Tensor:
    """What this rank's coordinate holds of `full`, in memory of its own, of any dtype; None: all.

    On a rank outside of the mesh that is an empty tensor.
    """
    if placements is not None and mesh.get_coordinate() is None:
        return full.new_empty((0,))
    plain = full.detach().resolve_conj().resolve_neg()
    carrier = CARRIERS.get(full.dtype.itemsize)  # none of the widest, which are cut as they are
    whole = plain if carrier is None else plain.view(carrier)
    held = whole if placements is None else part(whole, mesh, placements, mesh.get_coordinate())
    return held.clone(memory_format=torch.contiguous_format).view(full.dtype)


def place_on(mesh: DeviceMesh, dim: int = 0) -> int:
    """This rank's place along a dimension; its number in the group may be another."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "this rank is not in the mesh"
    return coordinate[dim]


def laid(full: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A DTensor that holds `full`, of any dtype; no collective runs."""
    return dtensor(full, mesh, placements, local=cut(full, mesh, placements))


@dataclass(frozen=True)
class Kind:
    """One tensor, and how it lies: on no mesh and with no placements where it is plain."""

    name: str
    leaf: torch.Tensor
    mesh: DeviceMesh
    placements: tuple[Placement, ...] | None

    @property
    def is_parameter(self) -> bool:
        return isinstance(self.leaf, nn.Parameter)

    @property
    def spec(self) -> DTensorSpec:
        """What the DTensor says of itself."""
        assert isinstance(self.leaf, DTensor)
        return self.leaf._spec

    def local(self, full: torch.Tensor) -> torch.Tensor:
        """What this rank must hold, were it made of `full`."""
        return cut(full, self.mesh, self.placements)


def trainable(dtype: torch.dtype) -> bool:
    """Whether a tensor of it can require grad, in every torch."""
    return (dtype.is_floating_point and dtype.itemsize > 1) or dtype.is_complex


def plain(full: torch.Tensor, seat: Seat) -> Iterator[Kind]:
    """No DTensors: a tensor, and Parameters that are frozen, or train where they can."""
    line = seat.line()
    yield Kind("plain", cut(full, line, None), line, None)
    for trains in {False, trainable(full.dtype)}:
        weight = nn.Parameter(cut(full, line, None), requires_grad=trains)
        yield Kind(f"{'trained' if trains else 'frozen'} plain Parameter", weight, line, None)


def dtensors(
    full: torch.Tensor, seat: Seat, layouts: Any = None, partial: bool = True
) -> Iterator[Kind]:
    """A DTensor of each layout: in turn a tensor, a frozen Parameter and one that trains."""
    found = layouts if layouts is not None else seat.layouts()
    fitting = [x for x in found if all(getattr(p, "dim", 0) < full.dim() for p in x[1])]
    for number, (mesh, placements) in enumerate(fitting):
        name, where = f"{placement_id(placements)} on {tuple(mesh.shape)}", tuple(placements)
        leaf: torch.Tensor = laid(full, mesh, placements)
        if role := number % 3:
            trains = role == 2 and trainable(full.dtype)
            leaf = parameter(leaf, trains)
            name = f"{'trained' if trains else 'frozen'} Parameter {name}"
        yield Kind(name, leaf, mesh, where)
    if partial:
        line = seat.line()
        pending = dtensor(full, line, [Partial()], local=cut(full, line, None))
        yield Kind("Partial", pending, line, (Partial(),))


def wrapper(full: torch.Tensor, seat: Seat, placement: Placement | None = None) -> DTensor:
    """A DTensor around a wrapper of two tensors, replicated unless said otherwise."""
    mesh, where = seat.line(), [placement or R]
    kind = subclass_with(None, flatten=True)
    return inside(kind.of(cut(full, mesh, where)), full, mesh, where)


def flat(
    full: torch.Tensor, group: dist.ProcessGroup | None, counts: Sequence[int]
) -> ShardedTensor:
    """A ShardedTensor of any dtype whose rows the ranks of the group hold in turn."""
    return sharded_tensor(full, rows(full.shape, counts), group)


def chunked(length: int, parts: int) -> list[int]:
    """The sizes that torch.chunk gives, zeros for pieces that it does not make."""
    sizes = [len(piece) for piece in torch.arange(length, device="cpu").chunk(parts)]
    return sizes + [0] * (parts - len(sizes))


def nested(
    full: torch.Tensor, tp: DeviceMesh, group: dist.ProcessGroup
) -> tuple[ShardedTensor, ShardedTensor]:
    """(outer, inner) of a weight that tensor parallelism shards by row, and FSDP cuts once more."""
    mine = cut(full, tp, [S(0)])
    inner = flat(mine, group, chunked(len(mine), group.size()))
    metadata, start = [], 0
    for count, owner in zip(chunked(len(full), tp.size()), tp.mesh.tolist(), strict=True):
        box = [count, *full.shape[1:]]
        place = f"rank:{owner}/{full.device}"
        metadata.append(ShardMetadata([start, *[0] * (full.dim() - 1)], box, place))
        start += count
    outer = ShardedTensor._init_from_local_shards_and_global_metadata(
        [LocalShard(inner, metadata[place_on(tp)])],
        ShardedTensorMetadata(metadata, full.size(), TensorProperties(dtype=full.dtype)),
        process_group=tp.get_group(),
    )
    return outer, inner
