"""Copies between a GPU and the CPU: small tensors together, through page-locked memory.

A copy of 4 KiB from an H100 into ordinary memory costs 12 us, as much as 500 KiB at the speed of
the bus. So small tensors that are alike cross it as one, put together on the device, and land in
page-locked memory, from which the CPU copies them on. Large ones gain nothing that way: into memory
that was written before the driver copies 13 GB/s by itself, twice what one core copies on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from shardproof._core import limits
from shardproof._core.tensors.properties import is_ordinary, local_of
from shardproof._core.tensors.subclasses import PLAIN
from shardproof._core.tensors.values import MOVABLE, copies_of_each, copy_all

# Up to how many bytes a tensor is put together with others, and with how many at least.
_SMALL, _FEW = 1 << 16, 4


def gpu_in_use() -> bool:
    """Whether there can be tensors on a GPU at all: where not, nobody need look for one."""
    return torch.cuda.is_initialized()


def uses_pinned_memory(device: torch.device) -> bool:
    """Whether the device reads and writes page-locked memory by itself."""
    return device.type == "cuda"


def is_on_gpu(tensor: torch.Tensor) -> bool:
    """Whether the tensor lies on such a device."""
    return uses_pinned_memory(tensor.device)


# Not reached on a CPU: there is page-locked memory only beside a GPU.
def empty_pinned(nbytes: int) -> torch.Tensor:
    """New bytes that a GPU reads and writes directly; torch keeps what is freed for the next."""
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


# Not reached on a CPU: there is page-locked memory only beside a GPU.
def copy_to_pinned(data: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of a device in page-locked memory, when it is there."""
    near = empty_pinned(data.nbytes).view(data.dtype).view(data.shape)
    near.copy_(data, non_blocking=True)
    _record_event(data.device).synchronize()
    return near


# Not reached on a CPU: there is page-locked memory only beside a GPU.
def _record_event(device: torch.device) -> torch.Event:
    """An event that is over when all work so far on the device's current stream is."""
    event: torch.Event = torch.accelerator.current_stream(device).record_event()
    return event


def copy_small_together(leaves: Sequence[Any]) -> dict[int, torch.Tensor]:
    """Place of a leaf -> a copy of its memory in new CPU memory, made together with others.

    For plain tensors and the local tensors of DTensors that lie on a GPU, are small, and of which
    there are several alike. Besides the results it takes up to half a bucket of page-locked
    memory, and as much on the device.
    """
    if not gpu_in_use():
        return {}
    # Not reached on a CPU: no tensor lies on a GPU.
    groups: dict[Hashable, list[tuple[int, torch.Tensor]]] = defaultdict(list)
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            memory = local_of(leaf) if isinstance(leaf, DTensor) else leaf
            if is_on_gpu(memory) and _is_small(memory):
                groups[memory.device, memory.dtype, memory.size()].append((index, memory.detach()))
    made: dict[int, torch.Tensor] = {}
    for alike in groups.values():
        for part in _buckets(alike):
            near = copy_to_pinned(torch.stack([memory for _, memory in part]))
            made.update(zip([index for index, _ in part], copies_of_each(near), strict=True))
    return made


def copy_across_devices(
    targets: list[torch.Tensor], sources: list[torch.Tensor], non_blocking: bool = False
) -> None:
    """Copy each source into its target, as ``copy_all`` does, whatever device each is on.

    What goes from a GPU into page-locked memory is under way all at once, and small tensors for
    ordinary memory go together.
    """
    if not gpu_in_use() or not any(map(_is_cuda, sources)):
        copy_all(targets, sources, non_blocking)
    # Not reached on a CPU: no source lies on a GPU.
    elif targets[0].is_pinned():
        # Asking each of them would cost half of its copy. One that is not waits for its own copy,
        # and so is right as well. A lazy conj or neg has to be resolved before: torch would do that
        # on the CPU, without waiting for the bytes.
        if any(map(torch.Tensor.is_neg, sources)) or any(map(torch.Tensor.is_conj, sources)):
            sources = [source.resolve_conj().resolve_neg() for source in sources]
        copy_all(targets, sources, non_blocking=True)
        if not non_blocking:
            # Of the targets, too: what one of them still reads the caller may change.
            for device in filter(
                uses_pinned_memory, {*map(_device, sources), *map(_device, targets)}
            ):
                _record_event(device).synchronize()
    else:
        _copy_together(targets, sources, non_blocking)


_is_cuda, _device = attrgetter("is_cuda"), attrgetter("device")


# Not reached on a CPU: there is page-locked memory only beside a GPU.
def _copy_together(
    targets: list[torch.Tensor], sources: list[torch.Tensor], non_blocking: bool
) -> None:
    memories = [target.untyped_storage().data_ptr() for target in targets if target.numel()]
    if len(set(memories)) < len(memories):  # where targets overlap the last one wins: in order
        copy_all(targets, sources, non_blocking)
        return
    groups: dict[Hashable, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
    rest: list[tuple[torch.Tensor, torch.Tensor]] = []
    for pair in zip(targets, sources, strict=True):
        target, source = pair
        if (
            is_on_gpu(source)
            and _is_small(source)
            and target.device.type == "cpu"
            and target.dtype is source.dtype
        ):
            groups[source.device, source.dtype, source.size()].append(pair)
        else:
            rest.append(pair)
    # First, because these may still be on their way when the others land.
    rest += [pair for alike in groups.values() if len(alike) < _FEW for pair in alike]
    copy_all([target for target, _ in rest], [source for _, source in rest], non_blocking)
    for alike in groups.values():
        for part in _buckets(alike):
            near = copy_to_pinned(torch.stack([source.detach() for _, source in part]))
            copy_all([target for target, _ in part], list(near.unbind()))


# Not reached on a CPU: there is page-locked memory only beside a GPU.
def _is_small(memory: torch.Tensor) -> bool:
    """Whether a tensor can be put together with others, and that pays."""
    return (
        type(memory) in PLAIN
        and memory.dtype in MOVABLE
        and is_ordinary(memory)
        and 0 < memory.nbytes <= _SMALL
        and memory.is_contiguous()
        and not memory.is_neg()
    )


# Not reached on a CPU: there is page-locked memory only beside a GPU.
def _buckets(alike: list[tuple[Any, torch.Tensor]]) -> Iterator[list[tuple[Any, torch.Tensor]]]:
    """Tensors that are alike, as many at a time as half a bucket takes; nothing if they are few."""
    if len(alike) >= _FEW:
        count = max(1, limits.BUCKET_BYTES // 2 // max(alike[0][1].nbytes, 1))
        for start in range(0, len(alike), count):
            yield alike[start : start + count]


# Not reached on a CPU: there is page-locked memory only beside a GPU.
class PinnedUpload:
    """Page-locked memory for bytes that are packed on the CPU and then sent to a device.

    Two buckets in turn: one may still be read by the device while the other is packed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made = [torch.empty(0, dtype=torch.uint8, device="cpu")] * 2
        self._read: list[torch.Event | None] = [None, None]

    def next(self, nbytes: int) -> torch.Tensor:
        """Bytes to pack; those used before the last are free again."""
        made, read = self._made.pop(0), self._read.pop(0)
        if read is not None:
            read.synchronize()
        if made.numel() < nbytes:
            made = empty_pinned(nbytes)
        self._made.append(made)
        self._read.append(None)
        return made[:nbytes]

    def send(self, packed: torch.Tensor, into: torch.Tensor) -> None:
        """Start what brings the bytes of the last :meth:`next` into memory of the device."""
        into.copy_(packed, non_blocking=True)
        self._read[-1] = _record_event(self._device)
