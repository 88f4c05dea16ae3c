"""Between a GPU and host memory at the speed of the bus: through page-locked memory.

Between a GPU and ordinary memory the driver copies in small steps of its own: on an H100 1.2 GB/s
into new memory and 12 GB/s into old, where page-locked memory takes 53. So bytes go through two
halves of a page-locked bucket: while one is on its way, what came in the other is copied on. Small
tensors are put together on the device first: a copy over the bus costs as much as 500 KiB on it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from shardproof._state_dict_utils import stream
from shardproof._state_dict_utils.tensors import (
    CPU,
    copy_all,
    fresh_copy,
    geometry,
    is_ordinary,
    local_of,
    settled,
)

# Up to how many bytes a tensor is put together with others.
_SMALL = 1 << 18


def in_use() -> bool:
    """Whether there can be tensors on a GPU at all: where not, nobody need look for one."""
    return torch.cuda.is_initialized()


def is_far(tensor: torch.Tensor) -> bool:
    """Whether page-locked memory speeds up copies between the tensor and the CPU."""
    return sends(tensor.device)


def sends(device: torch.device) -> bool:
    """Whether the device reads and writes page-locked memory by itself."""
    return device.type == "cuda"


def page_locked(nbytes: int) -> torch.Tensor:
    """New bytes that a GPU reads and writes directly; torch keeps what is freed for the next."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def landed(data: torch.Tensor) -> torch.Tensor:
    """Bytes of a device in page-locked memory, when they are there."""
    near = page_locked(data.numel()).view(data.shape)
    near.copy_(data, non_blocking=True)
    _mark(data.device).synchronize()
    return near


def _mark(device: torch.device) -> torch.Event:
    """An event that is over when all work so far on the device's current stream is."""
    event: torch.Event = torch.accelerator.current_stream(device).record_event()
    return event


class HostCopies:
    """Copies in new CPU memory of the tensors of a state dict that lie on a device, made together.

    It takes the place of ``fresh_copy(tensor, CPU)`` for the plain tensors among the leaves, the
    local tensors of DTensors and the shards of ShardedTensors.
    """

    def __init__(self, leaves: Sequence[Any]) -> None:
        self._made: dict[Hashable, torch.Tensor] = {}
        if not in_use():
            return
        found = {geometry(part): part for part in _parts(leaves) if is_far(part)}
        self._made = dict(zip(found, to_host(list(found.values())), strict=True))

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The copy of one of them, once; of another tensor a copy made now."""
        made = self._made.pop(geometry(settled(tensor)), None) if self._made else None
        return cpu_copy(tensor) if made is None else made


def cpu_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a plain tensor in new CPU memory, as ``fresh_copy`` gives them."""
    if in_use():
        tensor = settled(tensor)
        if is_far(tensor):
            return to_host([tensor])[0]
    return fresh_copy(tensor, CPU)


def _parts(leaves: Sequence[Any]) -> Iterator[torch.Tensor]:
    for leaf in leaves:
        if isinstance(leaf, DTensor):
            yield local_of(leaf)
        elif isinstance(leaf, ShardedTensor):
            yield from (settled(shard.tensor) for shard in leaf.local_shards())
        elif isinstance(leaf, torch.Tensor):
            yield settled(leaf)


class _Load(NamedTuple):
    """What crosses the bus at once: bytes on the device, and what to do with them on the host."""

    parts: list[torch.Tensor]
    land: Callable[[torch.Tensor], object]


def to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """New CPU tensors with the values of plain tensors on a device, in their order.

    Detached, with the strides of dense tensors. Besides the results it takes one bucket of
    page-locked memory, and half a bucket on the device. No collective runs.
    """
    made: list[torch.Tensor | None] = [None] * len(tensors)

    def few(places: list[int], sizes: list[int], room: torch.Tensor) -> None:
        for place, data in zip(places, _copies(room, sizes), strict=True):
            made[place] = _like(data, tensors[place])

    def loads(places: list[int], flats: list[torch.Tensor]) -> Iterator[_Load]:
        for run in _runs(flats):
            if len(run) > 1 or flats[run[0]].numel() <= _half():
                here = [flats[n] for n in run]
                sizes = [flat.numel() for flat in here]
                yield _Load(here, partial(few, [places[n] for n in run], sizes))
                continue
            (number,) = run
            target = torch.empty(flats[number].numel(), dtype=torch.uint8)
            made[places[number]] = _like(target, tensors[places[number]])
            pairs = zip(flats[number].split(_half()), target.split(_half()), strict=True)
            yield from (_Load([source], into.copy_) for source, into in pairs)

    for device, places, flats in _by_device(tensors):
        _run(device, loads(places, flats))
    return [
        fresh_copy(tensor, CPU) if done is None else done
        for tensor, done in zip(tensors, made, strict=True)
    ]


def into_host(
    targets: list[torch.Tensor], sources: list[torch.Tensor], non_blocking: bool = False
) -> None:
    """Copy each source into its target, as ``copy_all`` does; those from a device to the CPU fast.

    What is large and goes into page-locked memory goes there directly, and may be pending on
    return if ``non_blocking``. No collective runs.
    """
    far: list[int] = []
    memories: list[torch.Tensor] = []
    direct: list[int] = []
    rest: list[int] = []
    for place, (target, source) in enumerate(zip(targets, sources, strict=True)):
        memory = _memory_for(source, target) if is_far(source) else None
        if memory is None:
            rest.append(place)
        elif source.nbytes > _SMALL and target.is_pinned():
            direct.append(place)
        else:
            far.append(place)
            memories.append(memory)
    copy_all([targets[n] for n in direct], [sources[n] for n in direct], True)
    copy_all([targets[n] for n in rest], [sources[n] for n in rest], non_blocking)

    def loads(places: list[int], flats: list[torch.Tensor]) -> Iterator[_Load]:
        for run in _runs(flats):
            into = [memories[places[n]] for n in run]
            here = [flats[n] for n in run]
            if len(run) > 1 or here[0].numel() <= _half():
                yield _Load(here, partial(_spread, into))
            else:
                pairs = zip(here[0].split(_half()), into[0].split(_half()), strict=True)
                yield from (_Load([source], target.copy_) for source, target in pairs)

    for device, places, flats in _by_device([sources[n] for n in far]):
        _run(device, loads(places, flats))
    if not non_blocking:
        for device in {sources[n].device for n in direct}:
            _mark(device).synchronize()


# torch's stubs know the variant only that writes into given tensors.
_copies: Callable[[torch.Tensor, list[int]], list[torch.Tensor]]
_copies = torch.split_with_sizes_copy  # type: ignore[assignment]


def _spread(targets: list[torch.Tensor], room: torch.Tensor) -> None:
    copy_all(targets, list(room.split_with_sizes([target.numel() for target in targets])))


def _half() -> int:
    return stream.BUCKET_BYTES // 2


def _runs(flats: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """Numbers of tensors that cross the bus together: several small ones, or a single large one."""
    run: list[int] = []
    size = 0
    for number, flat in enumerate(flats):
        nbytes = flat.numel()
        if nbytes > _SMALL:
            yield [number]
            continue
        if size + nbytes > _half():
            yield run
            run, size = [], 0
        run.append(number)
        size += nbytes
    if run:
        yield run


def _by_device(
    tensors: Sequence[torch.Tensor],
) -> Iterator[tuple[torch.device, list[int], list[torch.Tensor]]]:
    """Device, places, and bytes of the tensors there that lie densely in memory."""
    found: dict[torch.device, tuple[list[int], list[torch.Tensor]]] = {}
    for place, tensor in enumerate(tensors):
        if (flat := _flat(tensor)) is not None:
            places, flats = found.setdefault(tensor.device, ([], []))
            places.append(place)
            flats.append(flat)
    for device, (places, flats) in found.items():
        yield device, places, flats


def _flat(tensor: torch.Tensor) -> torch.Tensor | None:
    """A tensor's bytes as they lie in memory; None where they are not dense, or not its values."""
    if not is_ordinary(tensor) or tensor.is_meta or tensor.numel() == 0:
        return None
    plain = tensor.detach() if tensor.requires_grad else tensor
    if plain.is_conj() or plain.is_neg():
        return None
    if not plain.is_contiguous():
        stride = plain.stride()
        if not plain.permute(sorted(range(plain.dim()), key=lambda d: -stride[d])).is_contiguous():
            return None
    # Not view(-1): that leaves a single element the stride it has, which need not be 1.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)


def _memory_for(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
    """The bytes of a target on the CPU that are to be those of a source, in their order."""
    if target.device.type != "cpu" or target.dtype is not source.dtype:
        return None
    if target.stride() != source.stride() or _flat(source) is None:
        return None
    return _flat(target)


def _like(data: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Bytes in a memory of their own as a tensor of the shape, dtype and strides of another."""
    return data.view(tensor.dtype).as_strided(tensor.size(), tensor.stride())


def _run(device: torch.device, loads: Iterator[_Load]) -> None:
    """Bring loads over the bus, one on its way while the one before is put where it belongs."""
    halves = [torch.empty(0, dtype=torch.uint8)] * 2
    coming: tuple[torch.Event, torch.Tensor, _Load] | None = None
    with torch.accelerator.device_index(device.index):
        for number, load in enumerate(loads):
            nbytes = sum(part.numel() for part in load.parts)
            if halves[number % 2].numel() < nbytes:
                halves[number % 2] = page_locked(nbytes)
            room = halves[number % 2][:nbytes]
            data = load.parts[0] if len(load.parts) == 1 else torch.cat(load.parts)
            room.copy_(data, non_blocking=True)
            mark = _mark(device)
            if coming is not None:
                _land(*coming)
            coming = mark, room, load
        if coming is not None:
            _land(*coming)


def _land(mark: torch.Event, room: torch.Tensor, load: _Load) -> None:
    mark.synchronize()
    load.land(room)


class Outgoing:
    """Page-locked memory for bytes that are packed on the CPU and then sent to a device.

    Two buckets in turn: one may still be read by the device while the other is packed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made = [torch.empty(0, dtype=torch.uint8)] * 2
        self._read: list[torch.Event | None] = [None, None]

    def next(self, nbytes: int) -> torch.Tensor:
        """Bytes to pack; those used before the last are free again."""
        made, read = self._made.pop(0), self._read.pop(0)
        if read is not None:
            read.synchronize()
        if made.numel() < nbytes:
            made = page_locked(nbytes)
        self._made.append(made)
        self._read.append(None)
        return made[:nbytes]

    def send(self, packed: torch.Tensor, into: torch.Tensor) -> None:
        """Start what brings the bytes of the last :meth:`next` into memory of the device."""
        into.copy_(packed, non_blocking=True)
        self._read[-1] = _mark(self._device)
