"""The entries of a local state dict that take full tensors.

Planning a target checks it and changes nothing; only :meth:`Target.ensure_memory` allocates, and
only the writes that follow touch memory that existed before.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from shardproof._core.loading.target_spec import TargetSpec
from shardproof._core.sharding.blocks import rectangles
from shardproof._core.sharding.dtensors import (
    FSDP_FLATTENED,
    STANDS_FOR,
    represented_dtensor,
    with_local,
)
from shardproof._core.sharding.table_shards import shards_in
from shardproof._core.tensors.prefault import LARGE, prefault
from shardproof._core.tensors.properties import CPU, is_lazy, is_ordinary
from shardproof._core.tensors.subclasses import (
    PLAIN,
    copy_by_class,
    is_custom,
    is_table,
    put_by_class,
    wait_for_pending,
)
from shardproof._core.tensors.ties import maybe_tied, tie_key
from shardproof._core.tensors.values import allocate, allocate_like, fresh_copy, put

_MARKS = frozenset({FSDP_FLATTENED, STANDS_FOR})


class TargetFactory:
    """Makes the targets of a call: most are like another, and what follows from that is found once.

    Args:
        in_place: write into the memory of a DTensor that has some on the right device; otherwise
            a new DTensor takes its place.
        cpu_offload: results have to be in CPU memory.

    """

    def __init__(self, in_place: bool, cpu_offload: bool = False) -> None:
        self._in_place, self._cpu_offload = in_place, cpu_offload
        self._assigned = False
        self._specs: dict[Hashable, TargetSpec] = {}
        self._kinds: dict[Hashable, int] = {}
        self._kind_of_key: dict[Any, int | None] = {}
        self._last: Hashable = None
        self._number: int | None = None

    def classify(self, local: Mapping[Any, Any]) -> None:
        """Learn of the values of a local state dict what does not depend on the full tensors.

        Where one of them is on meta, a module is given what lands as its own parameters.
        """
        self._kind_of_key = dict(zip(local, map(self._kind, local.values()), strict=True))

    def _kind(self, value: Any) -> int | None:
        """The same number for values that take full tensors alike; None for one by itself."""
        likeness = _likeness_key(value)
        if likeness != self._last:
            # To compare with the one before costs half of what to look for it does.
            self._last = likeness
            self._number = None
            self._assigned = self._assigned or getattr(value, "is_meta", False)
            if likeness is not None:
                self._number = self._kinds.setdefault(likeness, len(self._kinds))
        return self._number

    def target(
        self,
        key: Any,
        value: Any,
        size: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        alike: Hashable,
        layout: torch.layout = torch.strided,
    ) -> Target:
        """The entry ``key`` of a local state dict as something that takes a full tensor.

        Args:
            key: for messages.
            value: what the local state dict holds: a DTensor, or anything that is replaced, by
                the full tensor in its own shape and dtype. A Parameter that stands in for a
                DTensor (see ``tensor.parallel.ddp``) is taken for it. A piece of a flat parameter
                of FSDP1 has a shape that says nothing: there the full tensor is what FSDP's load
                hooks take.
            size: the shape of the full tensor.
            dtype: the dtype of the full tensor.
            device: where new tensors are made.
            alike: equal only where ``size``, ``dtype`` and ``layout`` are, and for values that
                are alike ``device``.
            layout: that of the full tensor.

        Raises:
            TypeError: the target is of a kind that cannot take a full tensor.
            ValueError: a DTensor's shape, dtype, layout or placements do not admit the full tensor.

        """
        try:
            kind = self._kind_of_key[key]
        except KeyError:
            kind = self._kind(value)
        found = self._specs.get((kind, alike))
        if found is None:
            if kind is None:
                value = self._represented_dtensor(value, size)
            try:
                found = TargetSpec(
                    value,
                    size,
                    dtype,
                    layout,
                    CPU if self._cpu_offload else device,
                    in_place=self._in_place,
                    cpu_offload=self._cpu_offload,
                    assigned=self._assigned,
                )
            except (TypeError, ValueError) as error:
                raise type(error)(f"{key!r}: {error}") from None
            if kind is not None:
                self._specs[kind, alike] = found
        return Target(key, value, found)

    def _represented_dtensor(self, value: Any, size: tuple[int, ...]) -> Any:
        whole = represented_dtensor(value)
        if whole is value or self._in_place or tuple(whole.shape) == size:
            return whole
        # Each rank may hold its own part already.
        return value if tuple(value.shape) == size else whole


def _likeness_key(value: Any) -> Hashable | None:
    """Equal for values that take full tensors alike; None where only the value itself can tell."""
    kind = type(value)
    if kind is DTensor:
        spec, local = value._spec, value._local_tensor
        if type(local) is not torch.Tensor or local.layout is not torch.strided:
            return None
        if not local.is_contiguous() or local.is_neg():
            return None
        order = getattr(spec, "shard_order", None)
        sharding = id(spec.mesh), spec.placements, spec.tensor_meta, order
        return sharding, local.shape, local.dtype, local.device, local.is_conj()
    ordinary = kind in PLAIN and _MARKS.isdisjoint(vars(value)) and is_ordinary(value)
    if ordinary and value.is_contiguous() and not value.is_neg():
        return value.shape, value.dtype, value.device, value.is_conj()
    return None


class Target:
    """One entry of a local state dict that takes a full tensor.

    Attributes:
        key: its key.
        value: what the local state dict holds.
        spec: how it takes the tensor.
        memory: the memory that takes the values, once it is known.

    """

    __slots__ = ("key", "memory", "spec", "value")

    def __init__(self, key: Any, value: Any, spec: TargetSpec) -> None:
        self.key, self.value, self.spec = key, value, spec
        self.memory: torch.Tensor | None = None

    def memory_key(self) -> Hashable:
        """Equal for targets that are tied."""
        value = self.value
        # With use_orig_params=False one flat parameter is the value of many keys.
        if not isinstance(value, torch.Tensor) or self.spec.is_piece:
            return id(self)
        local = value._local_tensor if isinstance(value, DTensor) else value
        return tie_key(value) if local.numel() else id(value)

    def ensure_memory(self) -> torch.Tensor:
        """The memory that takes the values, allocated where there is none."""
        if self.memory is None:
            self.memory = memory = self._memory()
            spec = self.spec
            if spec.ordinary and memory.nbytes >= LARGE and not spec.keeps:
                prefault(memory)
        return self.memory

    def _memory(self) -> torch.Tensor:
        value, spec, block = self.value, self.spec, self.spec.block
        if isinstance(value, DTensor):
            local = wait_for_pending(value._local_tensor)
            if spec.by_class or is_custom(type(local)):
                shape = local.shape if block is None else block.shape
                return allocate(shape, spec.dtype, spec.device)
            if not spec.keeps:
                dtype = local.dtype if spec.dtype is value.dtype else spec.dtype
                memory = allocate_like(local, spec.device, dtype)
            else:
                memory = local.detach() if local.requires_grad else local
            return memory if block is None or memory.dim() else memory.view(block.shape)
        if spec.like_target:
            return allocate_like(value, spec.device, spec.dtype)
        return allocate(spec.size, spec.dtype, spec.device)

    def result(self) -> Any:
        """The object for the local state dict, once all its values are there."""
        value, memory = self.value, self.memory
        if self.spec.keeps:
            if self.spec.by_class and memory is not None:
                self._put_by_class(memory)
            return value
        memory = self.ensure_memory()
        if not isinstance(value, DTensor):
            return memory
        if not value.dim() and memory.numel():  # none where the mesh lacks this rank
            memory = memory.view(())
        return with_local(value, memory, memory.dtype)

    def _put_by_class(self, values: torch.Tensor) -> None:
        local, block = self.value._local_tensor, self.spec.block
        kind: type = type(local)
        if is_table(kind):
            assert block is not None
            for shard, region in shards_in(local, block):
                put(shard, values[region])
        else:
            put_by_class(local, values)

    def copies_for_range(
        self, start: int, stop: int, values: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Where the row-major elements [start, stop) of this rank's block have to be copied.

        Args:
            start: the first element.
            stop: behind the last one.
            values: the elements in 1-D, in the dtype that carries the full tensor's.

        Yields (part of the target's memory, values for it): what is left is to copy them.

        """
        memory, block, dtype = self.ensure_memory(), self.spec.block, self.spec.source_dtype
        assert block is not None
        shown = values.dtype
        if shown is not dtype:
            if memory.dtype == dtype and is_ordinary(memory) and not is_lazy(memory):
                memory = memory.view(shown)
            else:
                values = values.view(dtype)
        for box, at, count in rectangles(block.shape, start, stop):
            part = values[at - start : at - start + count].view([hi - lo for lo, hi in box])
            yield memory[tuple(slice(lo, hi) for lo, hi in box)], part

    def take_part_of(self, full: torch.Tensor) -> None:
        """Take this rank's part from a full tensor that is here."""
        block = self.spec.block
        if block is None:
            return
        memory = self.ensure_memory()
        if block.region is not None:
            put(memory, full[block.region])
            return
        box = tuple((0, size) for size in block.shape)
        for there, here in block.regions(box):
            put(memory[here], full[there])

    def fill_from(self, full: torch.Tensor) -> Any:
        """The result with its part of a full tensor that is here."""
        spec, block = self.spec, self.spec.block
        if is_custom(type(full)):
            if block is not None:
                part = full if block.shape == spec.size else full[block.region]
                if spec.keeps:
                    self._put_by_class(part)
                    self.memory = None
                else:
                    self.memory = copy_by_class(part, spec.device)
            elif self.memory is None and not isinstance(self.value, DTensor):
                self.memory = copy_by_class(full, spec.device)
        elif spec.is_opaque:
            self.memory = fresh_copy(full, spec.device).to(spec.dtype)
        elif (
            spec.copies
            and self.memory is None
            and block is not None
            and block.region is not None
            and full.device == spec.device
        ):
            self.memory = full[block.region].clone(memory_format=torch.contiguous_format)
        else:
            self.take_part_of(full)
        return self.result()


def last_of_tied(targets: Mapping[Any, Target]) -> dict[Any, Any]:
    """Key -> the last key whose target is tied to it, another one.

    Tied targets share memory, so only the last one's values could remain.
    """
    asked = maybe_tied([target.value for target in targets.values()])
    tied = [key for key, ask in zip(targets, asked, strict=False) if ask]
    ties = {key: targets[key].memory_key() for key in tied}
    last = {tie: key for key, tie in ties.items()}
    return {key: last[tie] for key, tie in ties.items() if last[tie] != key}
