"""The leaves of nested containers with their paths and flat keys, and colliding keys escaped."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from shardproof._core.containers.container_types import is_branch, path_name
from shardproof._core.containers.typed_paths import (
    OBJ_PATH,
    PLAIN,
    Branch,
    ContainerType,
    TypedPath,
    container_of,
)
from shardproof._core.tensors.properties import LEAF_TYPES

# What is shared below containers whose paths need no types; one each is a twentieth of all time.
_UNTYPED: dict[str, Branch | None] = {"branch": None}
_NAMED = frozenset({dict, OrderedDict})
_USUAL = _NAMED | {list, tuple}
"""The types of nearly all containers: asking whether a value is one takes a while."""


def leaves_with_names(root: Any) -> tuple[list[OBJ_PATH], list[str], list[Any]]:
    """Path, flat key and value of each leaf, depth first.

    A path is typed where it leads through more than dicts with str keys and lists.
    """
    paths: list[OBJ_PATH] = []
    names: list[str] = []
    values: list[Any] = []
    if not is_branch(root):
        raise TypeError(f"expected a mapping, a list or a tuple, got a {type(root).__name__}")
    named = isinstance(root, Mapping)
    holder, steps = root, iter(root.items()) if named else enumerate(root)
    items: OBJ_PATH = ()
    prefix = ""
    branch = None if type(root) is dict else Branch(None, None, container_of(root))
    # Siblings share their paths' attributes: an own dict each would cost more than the path.
    shared = {"branch": branch}
    stack: list[_Level] = []
    while True:
        # Runs of leaves are left in this loop: it is all that a wide dict costs.
        for key, value in steps:
            item = key if type(key) is str or not named else str(key)
            kind = type(value)
            if kind in LEAF_TYPES or not (kind in _USUAL or is_branch(value)) or len(value) == 0:
                names.append(f"{prefix}{item}")
                values.append(value)
                if branch is None and item is key:
                    paths.append((*items, item))
                    continue
                if branch is None:
                    branch = Branch.plain(items, container_of(holder))
                    shared = {"branch": branch}
                path = TypedPath((*items, item))
                path.__dict__ = shared if item is key else {"branch": branch, "key": key}
                paths.append(path)
                continue
            if branch is not None or item is not key or kind not in PLAIN:
                if branch is None:
                    branch = Branch.plain(items, container_of(holder))
                    shared = {"branch": branch}
                below = Branch(branch, key, container_of(value))
            else:
                below = None
            stack.append((holder, steps, named, items, prefix, branch, shared))
            if len(stack) % _ROUND == 0:
                _refuse_cycles(stack)
            items, prefix = (*items, item), f"{prefix}{item}."
            branch, shared = below, _UNTYPED if below is None else {"branch": below}
            named = kind in _NAMED or (kind not in _USUAL and isinstance(value, Mapping))
            holder, steps = value, iter(value.items()) if named else enumerate(value)
            break
        else:
            if not stack:
                return paths, names, values
            holder, steps, named, items, prefix, branch, shared = stack.pop()


_Level = tuple[
    Any, Iterator[tuple[Any, Any]], bool, OBJ_PATH, str, Branch | None, dict[str, Branch | None]
]
"""A container that is being walked, while the walk is in one below it."""

_ROUND = 64
"""Every so many levels the walk asks for containers that hold themselves: they make it endless,
and asking at each container would be a third of what small ones cost."""


def _refuse_cycles(stack: list[_Level]) -> None:
    met: set[int] = set()
    for holder, _, _, items, *_ in stack:
        if id(holder) in met:
            raise ValueError(f"the container at {path_name(items)!r} holds itself")
        met.add(id(holder))


def _escaped(key: Any, holder: ContainerType) -> str:
    if isinstance(key, str):
        return key.replace("\\", "\\\\").replace(".", "\\.")
    if holder.example is None:
        return str(key)
    return f"\\{type(key).__name__}:{_escaped(str(key), holder)}"


def escape_collisions(names: Sequence[str], paths: Iterable[OBJ_PATH]) -> list[str]:
    """Escape the names that collide, until none does."""
    typed = map(TypedPath.typed, paths)
    escaped = [".".join(map(_escaped, path.keys, path.through)) for path in typed]
    plain, names = names, list(names)
    while True:
        counts = Counter(names)
        changed = False
        for index, name in enumerate(names):
            if counts[name] > 1 and name != escaped[index]:
                names[index] = escaped[index]
                changed = True
        if changed:
            continue
        for index, name in enumerate(names):
            if counts[name] > 1:
                raise ValueError(f"several entries share the flat key {plain[index]!r}")
        return names
