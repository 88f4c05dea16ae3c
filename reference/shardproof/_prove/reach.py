"""What an attribute reaches: tensors in containers, unregistered modules and the user's objects."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import nn

_DEEP = 8
_OBJECTS = 3
"""Objects within objects: a trainer, say, holds all there is."""
_LARGEST = 100_000
"""Entries of a container; what has more is data."""
_ATOMS = (str, bytes, bytearray, int, float, complex, torch.dtype, torch.device, torch.Size)
_OPAQUE = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
_FOREIGN = ("torch", "builtins", "logging", "threading", "multiprocessing", "concurrent", "asyncio")
"""Top packages whose objects hold no state of the job, but for those with a state dict."""


def reach(
    value: Any,
    path: str,
    skip: Container[int] = (),
    seen: set[int] | None = None,
    deep: int = _DEEP,
    objects: int = _OBJECTS,
) -> Iterator[tuple[str, Any]]:
    """(path, tensor, generator, container or object) of all that the value leads to.

    `skip` has the identities of what is looked at elsewhere. Containers come before their content.
    """
    if isinstance(value, (torch.Tensor, torch.Generator)):
        yield path, value
        return
    seen = set() if seen is None else seen
    if value is None or isinstance(value, _ATOMS) or not deep:
        return
    if id(value) in skip or id(value) in seen:
        return
    inside = _inside(value, path, objects)
    if inside is None:
        return
    seen.add(id(value))
    yield path, value
    left = objects if isinstance(value, (dict, list, tuple, set, frozenset, deque)) else objects - 1
    for name, one in inside:
        yield from reach(one, name, skip, seen, deep - 1, left)


def tensors_in(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(path, tensor) of those that the value leads to."""
    for name, found in reach(value, path):
        if isinstance(found, torch.Tensor):
            yield name, found


def numbers_in(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, value) of what is neither tensor nor dict nor list, in nested dicts and lists."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from numbers_in(one, f"{path}[{key!r}]")
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from numbers_in(one, f"{path}[{number}]")
    elif not isinstance(value, torch.Tensor):
        yield path, value


def slots_of(value: Any) -> dict[str, Any]:
    """The attributes of an object that its class names in __slots__."""
    found = {}
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for key in (slots,) if isinstance(slots, str) else slots:
            if key not in ("__dict__", "__weakref__") and hasattr(value, key):
                found[key] = getattr(value, key)
    return found


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes of an object, from its dict and from its slots."""
    return {**getattr(value, "__dict__", {}), **slots_of(value)}


def is_stateful(value: Any) -> bool:
    """Whether it has a state dict of its own: a scaler, a scheduler, a data loader."""
    kind = type(value)
    return all(callable(getattr(kind, name, None)) for name in ("state_dict", "load_state_dict"))


def _inside(value: Any, path: str, objects: int) -> list[tuple[str, Any]] | None:
    """Names and values of what it holds; None of what is not looked into."""
    if isinstance(value, dict):
        if len(value) > _LARGEST:
            return None
        return [
            (f"{path}[{_key(k, i)}]", one)
            for i, (k, one) in enumerate(value.items())
            if not isinstance(one, _ATOMS)
        ]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        if len(value) > _LARGEST:
            return None
        return [(f"{path}[{i}]", one) for i, one in enumerate(value) if not isinstance(one, _ATOMS)]
    if not objects or isinstance(value, _OPAQUE):
        return None
    dot = f"{path}." if path else ""
    if isinstance(value, nn.Module):
        named = {**value._parameters, **value._buffers, **value._modules}
        own = {k: v for k, v in vars(value).items() if k not in MODULE_OWN}
        return [(f"{dot}{key}", one) for key, one in {**named, **own}.items()]
    if type(value).__module__.partition(".")[0] in _FOREIGN and not is_stateful(value):
        return None
    try:
        held = attributes_of(value)
    except Exception:  # of the object's own code
        return None
    return [(f"{dot}{key}", one) for key, one in held.items()]


MODULE_OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


def _key(key: Any, number: int) -> str:
    return repr(key) if isinstance(key, (*_ATOMS, tuple, type(None))) else str(number)
