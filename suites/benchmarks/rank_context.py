"""What a benchmark is given on a rank: exact data, meshes, the arm's functions, floors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from benchmarks.settings import Leaf
from benchmarks.work import Work
from conformance.kit.layouts import dtensor, part
from harness.settings.subjects import Subject

_PLACED: dict[str, Placement] = {"S0": Shard(0), "S1": Shard(1), "R": Replicate()}


def values(salt: int, leaf: Leaf) -> torch.Tensor:
    """The leaf's whole tensor on the CPU: whole numbers from 0 to 250, exact in every dtype."""
    count = math.prod(leaf.shape)
    index = torch.arange(count, dtype=torch.int32).mul_(7).add_(3 * salt).remainder_(251)
    return index.to(getattr(torch, leaf.dtype)).reshape(leaf.shape)


@dataclass
class RankContext:
    """One rank's view of a measurement; made once, used by all arms in turn."""

    rank: int
    size: int
    device: torch.device
    fake: bool
    leaves: Sequence[Leaf]
    data: dict[str, torch.Tensor]
    """Of each leaf the whole tensor, on the CPU, shared by all ranks: not to be written."""
    arm: str = ""
    """The arm whose work is being built: an import root, or `floor`."""
    _meshes: dict[tuple[int, ...], DeviceMesh] = field(default_factory=dict)

    # --- the arm

    def function(self, path: str) -> Any:
        """The arm's function: module.name, as upstream names them below torch.distributed."""
        return Subject(self.arm).function(path)

    # --- what ranks agree on

    def agree(self, text: str) -> str:
        """The first rank's text that is not empty; all ranks call it, one collective."""
        if self.fake or self.size == 1:
            return text
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, text)
        return next((f"rank {r}: {t}" for r, t in enumerate(told) if t), "")

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """Of each number the largest over the ranks; all ranks call it, one collective."""
        if self.fake or self.size == 1:
            return list(numbers)
        shared = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.tolist()

    def synchronize(self) -> None:
        """Wait for the device, so that the clock sees all of the work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    # --- data

    def mesh(self, *shape: int) -> DeviceMesh:
        """A mesh of that shape over all ranks (no shape: one dimension); the same each time."""
        shape = shape or (self.size,)
        if shape not in self._meshes:
            ranks = torch.arange(math.prod(shape)).reshape(shape)
            names = ("data", "outer")[: len(shape)]
            self._meshes[shape] = DeviceMesh(self.device.type, ranks, mesh_dim_names=names)
        return self._meshes[shape]

    def layout(self, leaf: Leaf) -> tuple[DeviceMesh, list[Placement]]:
        """The mesh and the placements of a leaf."""
        placed = [_PLACED[p] for p in leaf.placement.split("-")]
        return self.mesh(*((self.size // 2, 2) if len(placed) == 2 else ())), placed

    def full(self, leaf: Leaf) -> torch.Tensor:
        """The leaf's whole tensor, on the CPU, shared by all ranks: not to be written."""
        return self.data[leaf.name]

    def whole(self) -> dict[str, torch.Tensor]:
        """All leaves whole, this arm's own copies."""
        return {leaf.name: self.full(leaf).to(self.device, copy=True) for leaf in self.leaves}

    def sharded(self) -> dict[str, DTensor]:
        """All leaves as DTensors in their placements."""
        return {
            leaf.name: dtensor(self.full(leaf).to(self.device), *self.layout(leaf))
            for leaf in self.leaves
        }

    def mine(self, leaf: Leaf) -> torch.Tensor:
        """What this rank holds of a leaf, on the CPU."""
        return part(self.full(leaf), *self.layout(leaf))

    def gathered(self, leaf: Leaf) -> torch.Tensor:
        """What a gathered leaf must be; in a fake world every rank sends what this one holds."""
        if not self.fake:
            return self.full(leaf)
        mine = self.mine(leaf)
        return mine.repeat(self.size, *[1] * (mine.dim() - 1))

    @staticmethod
    def blank(tensors: Iterable[torch.Tensor]) -> None:
        """Zero them, so that a call that writes nothing into them cannot pass."""
        for tensor in tensors:
            tensor.zero_()

    # --- exactness

    def same(self, got: Any, expected: torch.Tensor, what: str) -> None:
        """`got` is a plain tensor with the shape, dtype and values of `expected`."""
        assert isinstance(got, torch.Tensor), f"{what}: a {type(got).__name__}"
        assert not isinstance(got, DTensor), f"{what}: a DTensor"
        assert got.dtype == expected.dtype, f"{what}: {got.dtype}, expected {expected.dtype}"
        assert got.shape == expected.shape, f"{what}: {got.shape}, expected {expected.shape}"
        there = expected.to(got.device)
        assert torch.equal(got.detach(), there), f"{what}: values differ"

    def of_each(self, check: Callable[[Any, Leaf], None]) -> Callable[[Any], None]:
        """The check of a list that has something of each leaf."""

        def check_all(got: Any) -> None:
            for one, leaf in zip(got, self.leaves, strict=True):
                check(one, leaf)

        return check_all

    def of_names(self, check: Callable[[Any, Leaf], None]) -> Callable[[Any], None]:
        """The check of a dict that has something of each leaf under its name."""

        def check_all(got: Any) -> None:
            assert list(got) == [leaf.name for leaf in self.leaves], "keys differ"
            self.of_each(check)(got.values())

        return check_all

    def are_whole(self, got: Any) -> None:
        """A dict of every leaf, whole."""
        self.of_names(lambda one, leaf: self.same(one, self.gathered(leaf), leaf.name))(got)

    def are_sharded(self, got: Any) -> None:
        """A dict of every leaf as the DTensor of its layout."""
        self.of_names(self.is_sharded)(got)

    def is_sharded(self, got: Any, leaf: Leaf) -> None:
        """The DTensor of the leaf's layout, with what this rank holds."""
        assert isinstance(got, DTensor), f"{leaf.name}: a {type(got).__name__}"
        mesh, placements = self.layout(leaf)
        assert got.placements == tuple(placements), f"{leaf.name}: {got.placements}"
        assert got.device_mesh == mesh, f"{leaf.name}: {got.device_mesh}"
        self.same(got._local_tensor, self.mine(leaf), leaf.name)

    # --- bytes, for floors and for the cost model

    @property
    def total(self) -> int:
        """Bytes of all leaves, whole."""
        return sum(leaf.nbytes for leaf in self.leaves)

    @property
    def held(self) -> int:
        """Bytes that this rank holds of them."""
        return sum(leaf.nbytes // leaf.parts(self.size) for leaf in self.leaves)

    # --- floors

    def copies(self, nbytes: int, *, fresh: bool = True, pinned: bool = False) -> Work:
        """One copy of that many bytes from the device to host memory, new or `fresh=False` old."""
        source = self.pattern(nbytes)
        there = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)

        def call() -> torch.Tensor:
            return (torch.empty(nbytes, dtype=torch.uint8) if fresh else there).copy_(source)

        return Work(call, lambda got: self.same(got, source.cpu(), "the copied bytes"))

    def moves(self, nbytes: int) -> Work:
        """One copy of that many bytes into new memory of the device."""
        source = self.pattern(nbytes)
        return Work(lambda: source.clone(), lambda got: self.same(got, source, "the copied bytes"))

    def gathers(self, nbytes: int, group: dist.ProcessGroup | None = None) -> Work:
        """One all-gather that brings that many bytes from others to each rank (of `group`)."""
        size = dist.get_world_size(group)
        share = math.ceil(nbytes / max(1, size - 1))
        mine = self.pattern(share, dist.get_rank(group))
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        expected = torch.cat([self.pattern(share, 0 if self.fake else r) for r in range(size)])

        def call() -> torch.Tensor:
            out = torch.empty(share * size, dtype=torch.uint8, device=self.device)
            gather(out, mine, group=group)
            return out

        return Work(call, lambda got: self.same(got, expected, "the gathered bytes"))

    def scatters(self, share: int, everywhere: int = 0) -> Work:
        """One scatter of `share` bytes to each rank; one broadcast of those that all need."""
        rows = [self.pattern(share, r) for r in range(self.size)] if self.rank == 0 else None
        expected = self.pattern(share, self.rank)
        shared = self.broadcasts(everywhere)

        def call() -> tuple[torch.Tensor, torch.Tensor | None]:
            out = torch.empty(share, dtype=torch.uint8, device=self.device)
            dist.scatter(out, rows, src=0)
            return out, shared.call() if everywhere else None

        def check(got: tuple[torch.Tensor, torch.Tensor | None]) -> None:
            if not self.fake:
                self.same(got[0], expected, "the scattered bytes")
                if everywhere:
                    shared.check(got[1])

        return Work(call, check)

    def broadcasts(self, nbytes: int) -> Work:
        """One broadcast of that many bytes from rank 0 into new memory."""
        shared = self.pattern(nbytes)

        def call() -> torch.Tensor:
            out = shared if self.rank == 0 else torch.empty_like(shared)
            dist.broadcast(out, src=0)
            return out

        return Work(call, lambda got: self.same(got, shared, "the broadcast bytes"))

    def sends_to_first(self, share: int) -> Work:
        """One gather of `share` bytes of each rank to rank 0."""
        mine = self.pattern(share, self.rank)

        def call() -> list[torch.Tensor] | None:
            rows = [torch.empty_like(mine) for _ in range(self.size)] if self.rank == 0 else None
            dist.gather(mine, rows, dst=0)
            return rows

        def check(got: list[torch.Tensor] | None) -> None:
            for number, row in enumerate(got or ()):
                self.same(row, self.pattern(share, number), f"the bytes of rank {number}")

        return Work(call, check)

    def each(self, items: Sequence[Any], least: Callable[[Any], Any]) -> Work:
        """The least that must be done for each item, in a bare loop."""

        def check(got: list[Any]) -> None:
            assert len(got) == len(items), f"{len(got)} of {len(items)} items"

        return Work(lambda: [least(item) for item in items], check)

    def pattern(self, nbytes: int, salt: int = 0) -> torch.Tensor:
        """That many bytes, which differ by place and salt, on the device."""
        made = torch.arange(nbytes, dtype=torch.int32).add_(salt).remainder_(251)
        return made.to(torch.uint8).to(self.device)
