"""Where a full tensor lands on this rank: what part of it, in which memory, as what object.

Planning a target checks it and changes nothing; only :meth:`Target.open` allocates, and only the
writes that follow touch memory that existed before.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from shardproof._state_dict_utils.layout import (
    Block,
    full_block,
    my_coordinate,
    partial_dims,
    rectangles,
    spec_block,
)
from shardproof._state_dict_utils.tensors import (
    CPU,
    FSDP_FLATTENED,
    allocate,
    allocate_like,
    bit_dtype,
    is_ordinary,
    kind_of,
    put,
    settled,
    stood_for,
    tie_key,
    unwritable,
    with_local,
)


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

    Raises:
        TypeError: the target is of a kind that cannot take a full tensor.
        ValueError: its shape, dtype or placements do not admit the full tensor.

    """

    def __init__(
        self,
        key: Any,
        value: Any,
        size: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        in_place: bool,
        cpu_offload: bool = False,
    ) -> None:
        value = stood_for(value)
        self.key = key
        self.value = value
        self.size = size
        self.source_dtype = dtype
        self.device = CPU if cpu_offload else device
        self.block: Block | None = full_block(size)
        self.is_piece = not isinstance(value, DTensor) and getattr(value, FSDP_FLATTENED, False)
        self.dtype = value.dtype if isinstance(value, torch.Tensor) else dtype
        self.keeps = False
        self.memory: torch.Tensor | None = None
        if isinstance(value, ShardedTensor):
            raise TypeError(f"{key!r}: a {kind_of(value)} cannot take a full tensor")
        if isinstance(value, torch.Tensor):
            self._check(value)
        if isinstance(value, DTensor):
            self._plan_dtensor(value, in_place, cpu_offload)

    def _check(self, value: torch.Tensor) -> None:
        if not self.is_piece and tuple(value.size()) != self.size:
            raise ValueError(
                f"{self.key!r}: the target has shape {tuple(value.size())}, expected {self.size} "
                "as the full tensor has"
            )
        if self.source_dtype.is_complex and not value.dtype.is_complex:
            raise ValueError(
                f"{self.key!r}: the target has dtype {value.dtype}, which cannot take the full "
                f"tensor's {self.source_dtype}"
            )

    def _plan_dtensor(self, value: DTensor, in_place: bool, cpu_offload: bool) -> None:
        spec = value._spec
        if partial_dims(spec.placements):
            raise ValueError(
                f"{self.key!r}: the target has placements {spec.placements}; a pending reduction "
                "cannot take values"
            )
        local = value._local_tensor
        coordinate = my_coordinate(spec.mesh)
        self.block = None if coordinate is None else spec_block(spec, coordinate)
        if self.block is not None and tuple(local.shape) != self.block.shape:
            raise ValueError(
                f"{self.key!r}: the target's local shape is {tuple(local.shape)}, expected "
                f"{self.block.shape}"
            )
        self.keeps = (
            in_place and not local.is_meta and (not cpu_offload or local.device.type == "cpu")
        )
        if self.keeps and (reason := unwritable(value)):
            raise ValueError(f"{self.key!r}: {reason}")

    def tie(self) -> Hashable:
        """Equal for targets that are tied."""
        value = self.value
        # With use_orig_params=False one flat parameter is the value of many keys.
        if not isinstance(value, torch.Tensor) or self.is_piece:
            return id(self)
        local = value._local_tensor if isinstance(value, DTensor) else value
        return tie_key(value) if local.numel() else id(value)

    def open(self) -> Any:
        """Allocate what is missing; return the object for the local state dict."""
        value = self.value
        if isinstance(value, DTensor):
            local = settled(value._local_tensor).detach()
            if self.keeps:
                self.memory = local
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

    def write(self, start: int, stop: int, data: torch.Tensor) -> None:
        """Take the row-major elements [start, stop) of this rank's block, as bytes."""
        assert self.memory is not None
        assert self.block is not None
        same = self.memory.dtype == self.source_dtype and is_ordinary(self.memory)
        dtype = bit_dtype(self.source_dtype) if same else self.source_dtype
        values = data.view(dtype)
        memory = self.memory.view(dtype) if same else self.memory
        for box, at, count in rectangles(self.block.shape, start, stop):
            part = values[at - start : at - start + count].view([hi - lo for lo, hi in box])
            memory[tuple(slice(lo, hi) for lo, hi in box)].copy_(part)

    def take(self, full: torch.Tensor) -> None:
        """Take this rank's part from a full tensor that is here."""
        if self.block is None or self.memory is None:
            return
        box = tuple((0, size) for size in self.block.shape)
        for there, here in self.block.regions(box):
            put(self.memory[here], full[there])


def plain_full_tensor(key: Any, value: torch.Tensor) -> torch.Tensor:
    """The detached full tensor of a state dict's entry.

    Raises:
        TypeError: it is distributed itself.
        ValueError: it has no data.

    """
    if isinstance(value, (DTensor, ShardedTensor)):
        raise TypeError(
            f"{key!r}: the full state dict has a {kind_of(value)}, expected a full tensor"
        )
    if value.is_meta:
        raise ValueError(f"{key!r}: the full tensor is on the meta device, expected values")
    return settled(value).detach()
