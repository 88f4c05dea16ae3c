"""Where a full tensor lands on this rank: what part of it, in which memory, as what object.

Planning a target checks it and changes nothing; only :meth:`Target.open` allocates, and only the
writes that follow touch memory that existed before.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from shardproof._state_dict_utils.layout import (
    Block,
    Cut,
    block_at,
    cuts_of,
    full_block,
    mesh_ranks,
    my_coordinate,
    partial_dims,
    rectangles,
    spec_block,
)
from shardproof._state_dict_utils.tensors import (
    CPU,
    FSDP_FLATTENED,
    MOVABLE,
    allocate,
    allocate_like,
    is_ordinary,
    kind_of,
    put,
    settled,
    stood_for,
    tie_key,
    unwritable,
    with_local,
)


class Place(NamedTuple):
    """Which part of full tensors a target takes, on whatever rank.

    Attributes:
        members: the global ranks of the target's mesh, row-major; none for a plain target.
        mesh: the mesh's shape.
        cuts: how it is sharded.

    """

    members: tuple[int, ...] = ()
    mesh: tuple[int, ...] = ()
    cuts: tuple[Cut, ...] = ()

    def blocks(self, size: tuple[int, ...], ranks: Sequence[int]) -> list[Block | None]:
        """What each global rank takes of a full tensor; None where it is outside the mesh."""
        if not self.members:
            return [full_block(size)] * len(ranks)
        places = dict(zip(self.members, product(*map(range, self.mesh)), strict=True))
        at = [places.get(rank) for rank in ranks]
        return [None if c is None else block_at(size, self.mesh, self.cuts, c) for c in at]


WHOLE = Place()


class Places:
    """What the targets of a call have in common: most are laid out like another."""

    def __init__(self) -> None:
        self._found: dict[Hashable, tuple[Place, Block | None, bool]] = {}

    def of(self, spec: DTensorSpec) -> tuple[Place, Block | None, bool]:
        """(the place, this rank's block, whether a reduction is pending)."""
        key = (spec.mesh, spec.placements, spec.shape, getattr(spec, "shard_order", None))
        found = self._found.get(key)
        if found is None:
            place = Place(mesh_ranks(spec.mesh), tuple(spec.mesh.shape), cuts_of(spec))
            coordinate = my_coordinate(spec.mesh)
            block = None if coordinate is None else spec_block(spec, coordinate)
            found = self._found[key] = place, block, bool(partial_dims(spec.placements))
        return found


class Target:
    """One entry of a local state dict that takes a full tensor.

    Args:
        key: its key, for messages.
        value: what the local state dict holds: a tensor, a DTensor, or anything that is replaced.
            A Parameter that stands in for a DTensor (see ``tensor.parallel.ddp``) is taken for it.
            A piece of a flat parameter of FSDP1 has a shape that says nothing: there the full
            tensor is what FSDP's load hooks take.
        size: the shape of the full tensor.
        dtype: the dtype of the full tensor.
        device: where new tensors are made.
        in_place: write into the memory of a DTensor that has some on the right device; otherwise
            a new DTensor takes its place.
        cpu_offload: the result has to be in CPU memory.
        places: shared by the targets of a call.

    Raises:
        TypeError: the target is of a kind that cannot take a full tensor.
        ValueError: its shape, dtype or placements do not admit the full tensor.

    """

    __slots__ = (
        "block",
        "device",
        "dtype",
        "is_piece",
        "keeps",
        "key",
        "memory",
        "place",
        "size",
        "source_dtype",
        "tie",
        "value",
    )

    def __init__(
        self,
        key: Any,
        value: Any,
        size: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        in_place: bool,
        places: Places,
        cpu_offload: bool = False,
    ) -> None:
        distributed = isinstance(value, DTensor)
        if not distributed:
            value = stood_for(value)
            distributed = isinstance(value, DTensor)
        self.key = key
        self.value = value
        self.size = size
        self.source_dtype = dtype
        self.device = CPU if cpu_offload else device
        self.place = WHOLE
        self.block: Block | None = None
        self.is_piece = not distributed and getattr(value, FSDP_FLATTENED, False)
        self.dtype = value.dtype if isinstance(value, torch.Tensor) else dtype
        self.keeps = False
        self.memory: torch.Tensor | None = None
        self.tie = self._tie()
        """Equal for targets that are tied."""
        if distributed:
            self._check(value)
            self._plan_dtensor(value, in_place, cpu_offload, places)
            return
        self.block = full_block(size)
        if isinstance(value, torch.Tensor):
            if isinstance(value, ShardedTensor):
                raise TypeError(f"{key!r}: a {kind_of(value)} cannot take a full tensor")
            self._check(value)

    def _check(self, value: torch.Tensor) -> None:
        if not self.is_piece and value.size() != self.size:
            raise ValueError(
                f"{self.key!r}: the target has shape {tuple(value.size())}, expected {self.size} "
                "as the full tensor has"
            )
        if self.source_dtype.is_complex and not value.dtype.is_complex:
            raise ValueError(
                f"{self.key!r}: the target has dtype {value.dtype}, which cannot take the full "
                f"tensor's {self.source_dtype}"
            )

    def _plan_dtensor(
        self, value: DTensor, in_place: bool, cpu_offload: bool, places: Places
    ) -> None:
        spec = value._spec
        self.place, self.block, pending = places.of(spec)
        if pending:
            raise ValueError(
                f"{self.key!r}: the target has placements {spec.placements}; a pending reduction "
                "cannot take values"
            )
        local = value._local_tensor
        if self.block is not None and local.shape != self.block.shape:
            raise ValueError(
                f"{self.key!r}: the target's local shape is {tuple(local.shape)}, expected "
                f"{self.block.shape}"
            )
        self.keeps = (
            in_place and not local.is_meta and (not cpu_offload or local.device.type == "cpu")
        )
        if self.keeps and (reason := unwritable(value)):
            raise ValueError(f"{self.key!r}: {reason}")

    def _tie(self) -> Hashable:
        value = self.value
        # With use_orig_params=False one flat parameter is the value of many keys.
        if not isinstance(value, torch.Tensor) or self.is_piece:
            return id(self)
        local = value._local_tensor if isinstance(value, DTensor) else value
        return tie_key(value) if local.numel() else id(value)

    def receives_directly(self, device: torch.device) -> bool:
        """Whether bytes for it can be received on ``device`` right into its memory."""
        value = self.value
        like = value._local_tensor if isinstance(value, DTensor) else value
        if isinstance(value, torch.Tensor):
            if self.is_piece or not is_ordinary(like) or not like.is_contiguous():
                return False
            if like.is_conj() or like.is_neg():
                return False
        goal = like.device if self.keeps else self.device
        return self.dtype == self.source_dtype and goal == device

    def open(self) -> Any:
        """Allocate what is missing; return the object for the local state dict."""
        value = self.value
        if isinstance(value, DTensor):
            local = settled(value._local_tensor)
            if self.keeps:
                self.memory = local.detach()
                return value
            self.memory = allocate_like(local, self.device)
            return with_local(value, self.memory)
        if isinstance(value, torch.Tensor) and self.is_piece:
            self.memory = allocate(self.size, value.dtype, self.device)
        elif isinstance(value, torch.Tensor):
            self.memory = allocate_like(settled(value), self.device)
        else:
            self.memory = allocate(self.size, self.dtype, self.device)
        return self.memory

    def landing(
        self, start: int, stop: int, values: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Where the row-major elements [start, stop) of this rank's block have to be copied.

        Args:
            start: the first element.
            stop: behind the last one.
            values: the elements in 1-D, in the dtype that carries the full tensor's.

        Yields (part of the target's memory, values for it): what is left is to copy them.

        """
        memory = self.memory
        assert memory is not None
        assert self.block is not None
        shown = values.dtype
        if shown is not self.source_dtype:
            if memory.dtype == self.source_dtype and is_ordinary(memory):
                memory = memory.view(shown)
            else:
                values = values.view(self.source_dtype)
        if stop - start == self.block.numel:
            yield memory, values.view(self.block.shape)
            return
        for box, at, count in rectangles(self.block.shape, start, stop):
            part = values[at - start : at - start + count].view([hi - lo for lo, hi in box])
            yield memory[tuple(slice(lo, hi) for lo, hi in box)], part

    def take(self, full: torch.Tensor) -> None:
        """Take this rank's part from a full tensor that is here."""
        block, memory = self.block, self.memory
        if block is None or memory is None:
            return
        if block.region is not None:
            put(memory, full[block.region])
            return
        box = tuple((0, size) for size in block.shape)
        for there, here in block.regions(box):
            put(memory[here], full[there])

    def filled(self, full: torch.Tensor) -> Any:
        """As :meth:`open` and :meth:`take`, in one step where the part is all that is made."""
        value, block = self.value, self.block
        if (
            isinstance(value, DTensor)
            and not self.keeps
            and block is not None
            and block.region is not None
            and value._local_tensor.is_contiguous()
            and full.dtype in MOVABLE
            and (full.dtype, full.device) == (value.dtype, self.device)
        ):
            part = full[block.region].clone(memory_format=torch.contiguous_format)
            return with_local(value, part)
        result = self.open()
        self.take(full)
        return result


def plain_full_tensor(key: Any, value: torch.Tensor) -> torch.Tensor:
    """The detached full tensor of a state dict's entry.

    Raises:
        TypeError: it is distributed itself.
        ValueError: it has no data.

    """
    if type(value) is not torch.Tensor and isinstance(value, (DTensor, ShardedTensor)):
        raise TypeError(
            f"{key!r}: the full state dict has a {kind_of(value)}, expected a full tensor"
        )
    if value.is_meta:
        raise ValueError(f"{key!r}: the full tensor is on the meta device, expected values")
    plain = settled(value)
    return plain.detach() if plain.requires_grad else plain
