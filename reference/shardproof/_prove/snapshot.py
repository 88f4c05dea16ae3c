"""A copy of the whole job on this rank, in CPU memory or in a file, that puts everything back.

Bytes are kept by storage, so that padding and views come back, too. Objects are kept by identity:
what a load replaced is in its place again afterwards. Bounded: its size is known before it is made.
"""

from __future__ import annotations

import copy
import os
import random
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from shardproof._prove import extra
from shardproof._prove.leaves import inner_of, sparse_parts
from shardproof._prove.modules import WRAPPERS, Modules, local_shard
from shardproof._prove.optimizers import Optimizers
from shardproof._prove.reach import reach, slots_of

_STEP = 64 << 20
_SET = ("_state_dict_type", "_state_dict_config", "_optim_state_dict_config")
"""Attributes of FSDP1 that torch's state dict functions set for their time."""


class Snapshot:
    """What a rank's model, optimizers and random states are now."""

    def __init__(self, modules: Modules, optimizers: Optimizers, scheduler: Any = None) -> None:
        """Note objects and geometry; `fill` copies the bytes."""
        self.modules = modules
        self.optimizers = optimizers
        self.storages: dict[int, Any] = {}
        self.geometry: list[tuple[torch.Tensor, Any, Any]] = []
        self.inner: list[tuple[torch.Tensor, str, torch.Tensor]] = []
        self.copies: dict[int, torch.Tensor] = {}
        """The bytes of each storage."""
        self.file: Path | None = None
        self._seen: set[int] = set()
        aside = {*modules.names, *map(id, optimizers)}
        reached = [
            thing
            for found in (modules.reached(), optimizers.reached(), reach(scheduler, "", aside))
            for _, thing in found
        ]
        for tensor in (*self._tensors(), *(t for t in reached if isinstance(t, torch.Tensor))):
            self._note(tensor)
        self.nbytes = sum(storage.nbytes() for storage in self.storages.values())
        self._objects = _Objects(modules, optimizers, reached)
        self._generators = [one for one in reached if isinstance(one, torch.Generator)]

    def fill(self, folder: Path | None) -> None:
        """Copy all bytes, into CPU memory or into a file in the folder."""
        if folder is not None:
            descriptor, name = tempfile.mkstemp(prefix="shardproof-prove-", dir=folder)
            os.close(descriptor)
            self.file = Path(name)
            room = sum(_aligned(storage.nbytes()) for storage in self.storages.values())
            os.truncate(name, max(room, 1))
            mapped = _raw(torch.UntypedStorage.from_file(name, shared=True, nbytes=max(room, 1)))
        at = 0
        for key, storage in self.storages.items():
            size = storage.nbytes()
            copied = (
                torch.empty(size, dtype=torch.uint8, device="cpu")
                if folder is None
                else mapped[at : at + size]
            )
            _move(_raw(storage), copied)
            self.copies[key] = copied
            at += _aligned(size)
        self.states = _random_states(self._generators)
        self.extra = []
        """(module, its extra state, told) of those that have one."""
        for _, module in self.modules.extra_states():
            with suppress(Exception):  # of the user's code; the roads tell of it
                state = copy.deepcopy(module.get_extra_state())
                self.extra.append((module, state, extra.text_of_state(state)))

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as it was, in CPU memory; it is a view of the snapshot."""
        raw = self.copies[_key(tensor.untyped_storage())]
        made = torch.empty(0, dtype=tensor.dtype, device="cpu")
        first = raw.storage_offset() // made.element_size() + tensor.storage_offset()
        made.set_(raw.untyped_storage(), first, tensor.size(), tensor.stride())
        made = torch._neg_view(made) if tensor.is_neg() else made
        return made.conj() if tensor.is_conj() else made

    def restore(self, *, hooks: bool = True) -> None:
        """Put objects, geometry, bytes and random states back; an interrupt waits for its end."""
        with _uninterrupted(), torch.no_grad():
            self._objects.restore(hooks=hooks)
            for tensor, name, inner in self.inner:
                if getattr(tensor, name) is not inner:
                    setattr(tensor, name, inner)
            for tensor, storage, (dtype, offset, size, stride) in self.geometry:
                now = tensor.untyped_storage()
                same = _key(now) == _key(storage) and tensor.dtype == dtype
                if not same or (tensor.storage_offset(), tensor.size(), tensor.stride()) != (
                    offset,
                    size,
                    stride,
                ):
                    was = torch.empty(0, dtype=dtype, device=storage.device)
                    tensor.data = was.set_(storage, offset, size, stride)
            for key, storage in self.storages.items():
                if storage.nbytes() != len(self.copies[key]):
                    storage.resize_(len(self.copies[key]))
                _move(self.copies[key], _raw(storage))
            for module, state, said in self.extra:
                if extra.told(module) != said:
                    module.set_extra_state(copy.deepcopy(state))
            _set_random_states(self.states)

    def close(self) -> None:
        """Free the memory, or remove the file."""
        self.copies.clear()
        if self.file is not None:
            self.file.unlink(missing_ok=True)
            self.file = None

    def _tensors(self) -> Iterator[torch.Tensor]:
        for _, module in self.modules.modules:
            for param in module._parameters.values():
                if param is not None:
                    yield param
                    if param.grad is not None:
                        yield param.grad
            yield from (buffer for buffer in module._buffers.values() if buffer is not None)
        for _, piece in self.modules.flat_parameters():
            flat = piece.handle.flat_param
            yield flat
            yield local_shard(piece.handle)
            if flat.grad is not None:
                yield flat.grad
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    yield param
                    if param.grad is not None:
                        yield param.grad

    def _note(self, tensor: torch.Tensor) -> None:
        if id(tensor) in self._seen:
            return
        self._seen.add(id(tensor))
        if isinstance(tensor, DTensor):
            self.inner.append((tensor, "_local_tensor", tensor._local_tensor))
            self._note(tensor._local_tensor)
        elif hasattr(tensor, "local_shards"):
            for shard in tensor.local_shards():
                self._note(getattr(shard, "tensor", shard))
        elif is_traceable_wrapper_subclass(tensor):
            for name, inner in inner_of(tensor):
                self.inner.append((tensor, name, inner))
                self._note(inner)
        elif tensor.layout is not torch.strided:
            for _, part in sparse_parts(tensor):
                self._note(part)
        else:
            storage = tensor.untyped_storage()
            geometry = (tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride())
            self.geometry.append((tensor, storage, geometry))
            self.storages.setdefault(_key(storage), storage)


class _Objects:
    """Which objects stand where, and which flags they have."""

    def __init__(self, modules: Modules, optimizers: Optimizers, reached: list[Any]) -> None:
        self.plain = modules.plain
        self.modules = []
        self.set_by_roads: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.params: list[tuple[torch.Tensor, bool, Any]] = []
        for _, module in modules.modules:
            own = vars(module)
            tensors = {k: v for k, v in own.items() if isinstance(v, torch.Tensor)}
            plain = None if isinstance(module, WRAPPERS) else modules.plain(module)
            dicts = {
                key: (own[key], dict(own[key]))
                for key in own
                if key in ("_parameters", "_buffers", "_modules") or key.endswith("_hooks")
                if isinstance(own[key], dict)
            }
            self.modules.append((module, tensors, plain, dicts, module.training))
            for param in module._parameters.values():
                if param is not None:
                    self.params.append((param, param.requires_grad, param.grad))
            if isinstance(module, FullyShardedDataParallel):
                self.set_by_roads.append((own, {key: own[key] for key in _SET if key in own}))
        for _, piece in modules.flat_parameters():
            flat = piece.handle.flat_param
            self.params.append((flat, flat.requires_grad, flat.grad))
        holders = [*optimizers, *optimizers.wrappers]
        self.owners = [(holder, dict(vars(holder))) for holder in holders]
        self.containers = [
            (one, _contents(one)) for one in map(_container, reached) if one is not None
        ]
        self.slots = [
            (one, slots_of(one))
            for one in reached
            if not isinstance(one, (torch.Tensor, torch.Generator)) and _container(one) is None
        ]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    self.params.append((param, param.requires_grad, param.grad))

    def restore(self, *, hooks: bool) -> None:
        for module, tensors, plain, dicts, training in self.modules:
            own = vars(module)
            for key in () if plain is None else self.plain(module).keys() - plain.keys():
                del own[key]
            own.update(plain or {})
            for key, value in tensors.items():
                if own.get(key) is not value:
                    own[key] = value
            for key, (held, content) in dicts.items():
                if not hooks and key.endswith("_hooks"):
                    continue
                if own.get(key) is not held:
                    own[key] = held
                if held != content if key.endswith("_hooks") else not _alike(held, content):
                    held.clear()
                    held.update(content)
            module.training = training
        for own, values in self.set_by_roads:
            own.update(values)
        for holder, own in self.owners:
            now = vars(holder)
            for key in now.keys() - own.keys():
                del now[key]
            now.update(own)
        for container, content in self.containers:
            _refill(container, content)
        for one, slots in self.slots:
            for key, value in slots.items():
                if getattr(one, key, None) is not value:
                    object.__setattr__(one, key, value)  # also of a frozen one
        for param, requires_grad, grad in self.params:
            if param.requires_grad != requires_grad:
                param.requires_grad_(requires_grad)
            if param.grad is not grad:
                param.grad = grad


@contextmanager
def _uninterrupted() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _container(thing: Any) -> Any:
    """What can be changed of a thing: the container, or the attributes of an object."""
    if isinstance(thing, (dict, list, set, deque)):
        return thing
    if isinstance(thing, (torch.Tensor, torch.Generator, tuple, frozenset)):
        return None
    return getattr(thing, "__dict__", None)


def _contents(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else list(container)


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, dict):
        if not _alike(container, content):
            container.clear()
            container.update(content)
        return
    same = len(container) == len(content) and all(
        a is b for a, b in zip(container, content, strict=True)
    )
    if same:
        return
    if isinstance(container, list):
        container[:] = content
    else:
        container.clear()
        container.update(content) if isinstance(container, set) else container.extend(content)


def _alike(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return list(one) == list(other) and all(one[key] is other[key] for key in other)


def _key(storage: Any) -> int:
    return storage._cdata


def _raw(storage: Any) -> torch.Tensor:
    """The bytes of a storage as a tensor; it shares no version counter with others."""
    made = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return made.set_(storage, 0, (storage.nbytes(),), (1,))


def _aligned(nbytes: int) -> int:
    """So that a view of any dtype can begin there."""
    return -(-nbytes // 64) * 64


def _move(source: torch.Tensor, target: torch.Tensor) -> None:
    for start in range(0, len(source), _STEP):
        target[start : start + _STEP].copy_(source[start : start + _STEP])


def _random_states(generators: Iterable[torch.Generator]) -> list[tuple[Any, Any]]:
    """(how to set it, the state) of each random number generator."""
    states: list[tuple[Any, Any]] = [
        (random.setstate, random.getstate()),
        (torch.set_rng_state, torch.get_rng_state()),
        *((one.set_state, one.get_state()) for one in generators),
    ]
    if numpy := sys.modules.get("numpy"):
        states.append((numpy.random.set_state, numpy.random.get_state()))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    module = getattr(torch, device.type, None) if device is not None else None
    if module is not None and module.is_initialized():
        states.append((module.set_rng_state_all, module.get_rng_state_all()))
    return states


def _set_random_states(states: list[tuple[Any, Any]]) -> None:
    for put, state in states:
        put(state)
