"""Containers of a state dict: what counts as one, and how to build another of the same type."""

from __future__ import annotations

import copy
import enum
import pickle
from collections import ChainMap, OrderedDict, UserDict, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from operator import is_
from typing import Any

import torch

from shardproof._core.tensors.properties import LEAF_TYPES

Path = tuple[Any, ...]

_STRING = frozenset({str})


def is_container(value: Any) -> bool:
    """Whether a walk goes into ``value``. A ``torch.Size`` is a value, not a container."""
    return is_branch(value) and not isinstance(value, torch.Size)


def is_branch(value: Any) -> bool:
    """Whether ``value`` has elements of its own: Mapping, list or tuple, torch.Size included."""
    # Asking an abstract class is slow, and nearly every leaf is of one of these types.
    if type(value) in LEAF_TYPES:
        return False
    if isinstance(value, (dict, list, tuple)):
        return True
    return not isinstance(value, (torch.Tensor, int, float, str)) and isinstance(value, Mapping)


def path_name(path: Iterable[Any]) -> str:
    """A path as people write it: its items joined by dots."""
    return ".".join(str(item) for item in path) or "<root>"


_WORDS = frozenset({str, int, float, complex, bool, bytes, type(None)})
"""Types of keys that are written alike on all ranks, and two of them never alike."""


class Nameless:
    """Stands for a key whose text differs from rank to rank: its type, and its number."""

    def __init__(self, key: Any, number: int) -> None:
        self._name = f"<{type(key).__name__} {number}>"

    def __repr__(self) -> str:
        return self._name


def named_path(path: Path, nameless: dict[int, Nameless]) -> Path:
    """``path`` with a :class:`Nameless` for each key whose text differs from rank to rank.

    The state of an optimizer has such keys: its parameters. ``nameless`` keeps, by the id of the
    key, those that were met before.
    """
    if _WORDS.issuperset(map(type, path)):
        return path
    return tuple(
        [
            key if _is_word(key) else nameless.setdefault(id(key), Nameless(key, len(nameless)))
            for key in path
        ]
    )


def _is_word(key: Any) -> bool:
    if isinstance(key, tuple):
        return all(map(_is_word, key))
    return type(key) in _WORDS or isinstance(key, (str, enum.Enum, torch.dtype, torch.device))


def leaf_name(path: Path) -> str:
    """A name for a leaf that no other leaf of the state dict has: ``key['inner'][0]``.

    A first key that could be taken for such a name is quoted: ``{"a[0]": x, "a": [y]}``.
    """
    first, *rest = path or ("<root>",)
    plain = type(first) is str and "[" not in first and (first or not rest)
    head = first if plain else f"[{first!r}]"
    return head + "".join(f"[{item!r}]" for item in rest)


def are_leaf_names(keys: list[Any]) -> bool:
    """Whether these keys of a flat state dict are the names of their leaves."""
    return _STRING.issuperset(map(type, keys)) and "[" not in "".join(keys)


def empty_like_mapping(like: Mapping[Any, Any]) -> Any:
    """An empty mapping of the type of ``like``, attributes such as ``_metadata`` included.

    A type that cannot be made without knowing its constructor, for example a read-only view, or
    whose attributes cannot be copied, becomes a dict, as upstream's do. A factory that cannot be
    pickled stays behind: upstream gives a dict without one, and what was gathered, staged or
    flattened is there to be saved.
    """
    kind = type(like)
    if kind is dict:
        return {}
    if kind is OrderedDict and not vars(like):
        return OrderedDict()
    with suppress(Exception):  # whatever a class's own code raises
        return _empty_of_class(like)
    return {}


def _empty_of_class(like: Mapping[Any, Any]) -> Any:
    kind = type(like)
    for base, name, empty in (UserDict, "data", {}), (ChainMap, "maps", [{}]):
        if isinstance(like, base):
            fresh: Any = base.__new__(kind)
            fresh.__dict__.update({k: _own(v) for k, v in vars(like).items() if k != name})
            fresh.__dict__[name] = empty
            return fresh
    if not isinstance(like, dict):
        return {}
    fresh = kind.__new__(kind)
    if isinstance(like, defaultdict) and _can_be_saved(like.default_factory):
        fresh.default_factory = like.default_factory
    if hasattr(like, "__dict__"):
        fresh.__dict__.update({k: _own(v) for k, v in vars(like).items()})
    return fresh


_USUAL = frozenset({dict, OrderedDict})


def filled_like(like: Mapping[Any, Any], items: Iterable[tuple[Any, Any]]) -> Any:
    """A mapping of the type of ``like``, as :func:`empty_like_mapping`, with other items.

    Methods that its class overrides have no say: a Counter's ``update`` counts what it is given.
    """
    fresh = empty_like_mapping(like)
    fill(fresh, items)
    for name in mirrored(like):
        mirror(fresh, name)
    return fresh


def mirrored(like: Any) -> list[str]:
    """The keys of a dict whose items are its attributes as well: it holds each of them twice."""
    if type(like) in _USUAL or not isinstance(like, dict):
        return []
    own = getattr(like, "__dict__", {})
    return [name for name in own.keys() & like.keys() if own[name] is like[name]]


def mirror(fresh: Any, name: str) -> None:
    """Let an attribute be the item of that name; where there is no such item, there is none."""
    if type(fresh) is dict:  # the class could not be made
        return
    vars(fresh).pop(name, None)
    if name in fresh:
        vars(fresh)[name] = fresh[name]


def fill(fresh: Any, items: Iterable[tuple[Any, Any]]) -> None:
    """Put items into a mapping of our own, whatever its class makes of an assignment."""
    if type(fresh) in _USUAL or not isinstance(fresh, dict):
        fresh.update(items)
        return
    put: Any = OrderedDict.__setitem__ if isinstance(fresh, OrderedDict) else dict.__setitem__
    for key, value in items:
        put(fresh, key, value)


def assign(target: Any, items: Mapping[Any, Any]) -> None:
    """Put items into a caller's mapping one by one: its class may refuse ``update``."""
    if type(target) in _USUAL:
        target.update(items)
        return
    for key, value in items.items():
        target[key] = value


def _can_be_saved(factory: Any) -> bool:
    try:
        pickle.dumps(factory)
    except Exception:  # whatever the object's own code raises: saving the result would raise it
        return False
    return True


def sequence_of(kind: type[Any], items: list[Any]) -> Any:
    """A sequence of type ``kind`` that holds ``items``."""
    if kind is list:
        return items
    if kind is tuple:
        return tuple(items)
    if issubclass(kind, list):
        with suppress(Exception):  # a class that cannot be made without knowing its constructor
            fresh = kind.__new__(kind)
            list.extend(fresh, items)  # a class may make something else of what it is given
            return fresh
        return items
    if hasattr(kind, "_make"):
        return kind._make(items)
    with suppress(Exception):  # whatever a constructor of its own makes of the items
        made = kind(items)
        if kind is torch.Size or (len(made) == len(items) and all(map(is_, made, items))):
            return made
    return tuple(items)  # as upstream's is


def _own(value: Any) -> Any:
    return copy.deepcopy(value) if isinstance(value, Mapping) else value
