"""A copy of the whole job on this rank, in CPU memory or in a file, that puts everything back.

Bytes are kept by storage, so that padding and views come back, too. Objects are kept by identity:
what a load replaced is in its place again afterwards. Bounded: its size is known before it is made.
"""

from __future__ import annotations

import copy
import os
import random
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from shardproof._prove.leaves import inner_of, sparse_parts
from shardproof._prove.modules import Modules, local_shard, tensors_in

_STEP = 64 << 20


class Snapshot:
    """What a rank's model, optimizers and random states are now."""

    def __init__(self, modules: Modules, optimizers: list[torch.optim.Optimizer]) -> None:
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
        for tensor in self._tensors():
            self._note(tensor)
        self.nbytes = sum(storage.nbytes() for storage in self.storages.values())
        self._objects = _Objects(modules, optimizers)

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
                torch.empty(size, dtype=torch.uint8) if folder is None else mapped[at : at + size]
            )
            _move(_raw(storage), copied)
            self.copies[key] = copied
            at += _aligned(size)
        self.states = _random_states()

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as it was, in CPU memory; it is a view of the snapshot."""
        raw = self.copies[_key(tensor.untyped_storage())]
        made = torch.empty(0, dtype=tensor.dtype, device="cpu")
        first = raw.storage_offset() // made.element_size() + tensor.storage_offset()
        return made.set_(raw.untyped_storage(), first, tensor.size(), tensor.stride())

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
        yield from (tensor for _, tensor in self.modules.attributes())
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
                yield from (t for _, t in tensors_in({**group, "params": ()}, ""))
            for state in optimizer.state.values():
                yield from (tensor for _, tensor in tensors_in(state, ""))

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

    def __init__(self, modules: Modules, optimizers: list[torch.optim.Optimizer]) -> None:
        self.modules = []
        self.params: list[tuple[torch.Tensor, bool, Any]] = []
        for _, module in modules.modules:
            own = vars(module)
            tensors = {k: v for k, v in own.items() if isinstance(v, torch.Tensor)}
            dicts = {
                key: (own[key], dict(own[key]))
                for key in own
                if key in ("_parameters", "_buffers", "_modules") or key.endswith("_hooks")
                if isinstance(own[key], dict)
            }
            self.modules.append((module, tensors, dicts, module.training))
            for param in module._parameters.values():
                if param is not None:
                    self.params.append((param, param.requires_grad, param.grad))
        self.optimizers = []
        for optimizer in optimizers:
            groups = [
                (group, dict(group), list(group["params"])) for group in optimizer.param_groups
            ]
            lists = {
                id(v): (v, copy.deepcopy(v))
                for _, group, _ in groups
                for key, v in group.items()
                if key != "params" and isinstance(v, (list, dict)) and not list(tensors_in(v, ""))
            }
            state = optimizer.state
            self.optimizers.append(
                (
                    optimizer,
                    dict(vars(optimizer)),
                    (optimizer.param_groups, groups, lists),
                    (state, [(key, value, _contents(value)) for key, value in state.items()]),
                )
            )
            for group in optimizer.param_groups:
                for param in group["params"]:
                    self.params.append((param, param.requires_grad, param.grad))

    def restore(self, *, hooks: bool) -> None:
        for module, tensors, dicts, training in self.modules:
            own = vars(module)
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
        for optimizer, own, (lists, groups, values), (state, entries) in self.optimizers:
            now = vars(optimizer)
            for key in [key for key in now if key not in own]:
                del now[key]
            now.update(own)
            lists[:] = [group for group, _, _ in groups]
            for group, content, params in groups:
                group.clear()
                group.update(content)
                group["params"][:] = params
                for value in group.values():
                    if id(value) in values:
                        _refill(value, values[id(value)][1])
            state.clear()
            for param, value, content in entries:
                _refill(value, content)
                state[param] = value
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


def _contents(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def _refill(value: Any, content: Any) -> None:
    if isinstance(value, dict) and not _alike(value, content):
        value.clear()
        value.update(content)
    elif isinstance(value, list) and value != content:
        value[:] = content


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


def _random_states() -> list[Any]:
    states: list[Any] = [random.getstate(), torch.get_rng_state()]
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    module = getattr(torch, device.type, None) if device is not None else None
    if module is not None and module.is_initialized():
        states.append((module, module.get_rng_state_all()))
    return states


def _set_random_states(states: Iterable[Any]) -> None:
    python, cpu, *accelerators = states
    random.setstate(python)
    torch.set_rng_state(cpu)
    for module, all_of_it in accelerators:
        module.set_rng_state_all(all_of_it)
