"""How targets that are alike take full tensors: which part, into which memory.

A DTensor says by its placements what it takes, and refuses what does not fit. Any other target is
replaced by the full tensor as it came: whether that fits is for the module to say, after its own
hooks have adapted it, or for the optimizer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from shardproof._core.sharding.blocks import Block, full_block
from shardproof._core.sharding.dtensors import FSDP_FLATTENED
from shardproof._core.sharding.table_shards import shards_in
from shardproof._core.sharding.target_part import WHOLE, target_part_of
from shardproof._core.tensors.properties import (
    QUANTIZED,
    is_lazy,
    is_opaque,
    is_ordinary,
    kind_of,
    unwritable,
)
from shardproof._core.tensors.subclasses import is_custom, is_table, shards_of, wait_for_pending
from shardproof._core.tensors.values import MOVABLE


class TargetSpec:
    """How targets that are alike take full tensors of one shape and dtype.

    Args:
        value: one of the targets.
        size: the shape of the full tensors.
        dtype: theirs.
        layout: theirs.
        device: where new tensors are made.
        in_place: write into the memory of a DTensor that has some on the right device; otherwise
            a new DTensor takes its place.
        cpu_offload: results have to be in CPU memory.
        assigned: whether what lands becomes the module's own parameter: then it has the target's
            dtype. Otherwise the module copies it, and converts what its hooks have left of it.

    Attributes:
        size: the shape of the full tensors.
        source_dtype: their dtype.
        layout: theirs.
        is_opaque: whether they can but be copied as a whole.
        dtype: that of the results.
        device: where new tensors are made.
        part: which part of a full tensor a target takes, on whatever rank.
        block: this rank's part; None where the rank is outside the target's mesh.
        is_piece: whether the target is a piece of a flat parameter.
        keeps: whether values are written into the memory that is there.
        by_class: whether that memory takes values by an operation of its class alone.
        ordinary: whether the memory that is there is contiguous, holds its values as they are, and
            has the block's dimensions; so where there is none, or where the values wait for its
            class to take them.
        other_shape: that of plain targets, where it is not the full tensors'.
        like_target: whether new memory is laid out as a plain target is.
        copies: whether new memory of a target is but a copy of its part of the full tensor.

    Raises:
        TypeError, ValueError: as :meth:`TargetFactory.target` says.

    """

    def __init__(
        self,
        value: Any,
        size: tuple[int, ...],
        dtype: torch.dtype,
        layout: torch.layout,
        device: torch.device,
        *,
        in_place: bool,
        cpu_offload: bool,
        assigned: bool,
    ) -> None:
        self.size = size
        self.source_dtype = self.dtype = dtype
        self.layout = layout
        self.is_opaque = is_opaque(layout, dtype)
        self.device = device
        self.part = WHOLE
        self.block: Block | None = None
        self.is_piece = not isinstance(value, DTensor) and getattr(value, FSDP_FLATTENED, False)
        self.keeps = self.by_class = self.like_target = False
        self.other_shape: tuple[int, ...] | None = None
        self.ordinary = True
        if isinstance(value, DTensor):
            self._plan_dtensor(value, in_place, cpu_offload)
        else:
            self._plan_plain(value, assigned)
        self.copies = (
            not self.keeps
            and not self.is_opaque
            and self.ordinary
            and self.dtype == self.source_dtype
            and self.dtype in MOVABLE
        )

    def _plan_plain(self, value: Any, assigned: bool) -> None:
        if isinstance(value, ShardedTensor):
            raise TypeError(f"a {kind_of(value)} cannot take a full tensor")
        self.block = full_block(self.size)
        if not isinstance(value, torch.Tensor) or self.is_piece or is_custom(type(value)):
            return
        if assigned and _same_kind(value.dtype, self.source_dtype):
            self.dtype = value.dtype
        shape = tuple(value.size())
        if shape != self.size:
            self.other_shape = shape
        elif value.layout is self.layout is torch.strided:
            self.like_target = True
            self.ordinary = _as_it_is(value)

    def _plan_dtensor(self, value: DTensor, in_place: bool, cpu_offload: bool) -> None:
        self._check(value)
        spec = value._spec
        self.part, self.block, pending = target_part_of(spec)
        if pending:
            raise ValueError(
                f"the target has placements {spec.placements}; a pending reduction "
                "cannot take values"
            )
        local = wait_for_pending(value._local_tensor)
        table = is_table(type(local))
        if table:
            if self.block is not None:
                shards_in(local, self.block)
        elif self.block is not None and local.shape != self.block.shape:
            raise ValueError(
                f"the target's local shape is {tuple(local.shape)}, expected {self.block.shape}"
            )
        # One of the same kind takes the values, as from torch's own copy.
        alike = local.dtype == value.dtype or _same_kind(local.dtype, value.dtype)
        if self.block is not None and not is_custom(type(local)) and not alike:
            raise ValueError(
                f"the target's local dtype is {local.dtype}, expected {value.dtype} as it says"
            )
        one_for_scalar = value.dim() == 0 and bool(self.size)
        if one_for_scalar and self.block is not None:
            self.block = full_block(self.size)
        # A rank without a shard of a table has nothing to write to, and says that it is on meta.
        nothing = table and not shards_of(local)
        self.keeps = in_place and (
            nothing or (not local.is_meta and (not cpu_offload or local.device.type == "cpu"))
        )
        if self.keeps and (reason := unwritable(value)):
            raise ValueError(reason)
        if self.keeps and not nothing:
            self.device = local.device
        if is_custom(type(local)):
            self.by_class = self.keeps
            return
        # What is made anew need not be of an integer dtype that its values do not fit into.
        if self.keeps or _can_hold(value.dtype, self.source_dtype):
            self.dtype = value.dtype
        # A local part of another dtype than the target claims takes the values, not their bits.
        as_bits = table or not self.keeps or local.dtype == value.dtype
        self.ordinary = as_bits and is_ordinary(local) and _as_it_is(local) and not one_for_scalar

    def _check(self, value: DTensor) -> None:
        # torch's modules take one element for a scalar.
        if value.size() != self.size and not (value.dim() == 0 and self.size == (1,)):
            raise ValueError(
                f"the target has shape {tuple(value.size())}, expected {self.size} "
                "as the full tensor has"
            )
        mine, theirs = value.dtype, self.source_dtype
        narrows = theirs.is_complex and not mine.is_complex
        if narrows or (theirs in QUANTIZED and mine != theirs):
            raise ValueError(
                f"the target has dtype {mine}, which cannot take the full tensor's {theirs}"
            )
        if value.layout is not self.layout:
            raise ValueError(
                f"the target has layout {value.layout}, expected {self.layout} "
                "as the full tensor has"
            )

    def receives_directly(self, device: torch.device) -> bool:
        """Whether bytes for a target can be received on ``device`` right into its memory."""
        return self.ordinary and self.dtype == self.source_dtype and self.device == device


def _as_it_is(memory: torch.Tensor) -> bool:
    """Whether memory holds its values in their order, as they are."""
    return memory.is_contiguous() and not is_lazy(memory)


def _same_kind(ours: torch.dtype, theirs: torch.dtype) -> bool:
    """Whether one dtype is another precision of the other."""
    both_float = ours.is_floating_point and theirs.is_floating_point
    return both_float or (ours.is_complex and theirs.is_complex)


def _can_hold(ours: torch.dtype, theirs: torch.dtype) -> bool:
    """Whether every value of one dtype has its like in the other, rounded where that has floats."""
    if ours.is_floating_point or ours.is_complex:
        return True
    if theirs.is_floating_point or theirs.is_complex:
        return False
    (low, high), (least, most) = _range(ours), _range(theirs)
    return low <= least and most <= high


def _range(integers: torch.dtype) -> tuple[int, int]:
    if integers is torch.bool:
        return 0, 1
    info = torch.iinfo(integers)
    return info.min, info.max
