"""Nested state dict <-> flat dict with dotted keys, without loss.

The flat keys are upstream's: the path's items joined by dots. The mapping from flat key to path
holds tuples that equal upstream's, so it can be merged, pickled and read by code that knows
nothing of this module; each also carries what upstream's lose, the containers' types and the
original keys (:class:`TypedPath`). All of it is iterative: depth is bounded by memory only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any, SupportsIndex, cast

from shardproof._state_dict_utils.containers import (
    empty_like_mapping,
    is_branch,
    path_name,
    sequence_of,
)

PATH_ITEM = str | int
OBJ_PATH = tuple[PATH_ITEM, ...]
FLATTEN_MAPPING = dict[str, OBJ_PATH]
STATE_DICT_TYPE = dict[str, Any]
CONTAINER_TYPE = MutableMapping[PATH_ITEM, Any]


class Container:
    """What a container of the original was: its type, its attributes, how many items it had."""

    __slots__ = ("example", "kind", "length")

    def __init__(self, original: Any) -> None:
        self.kind = type(original)
        self.length = len(original)
        mapping = isinstance(original, Mapping)
        # A mapping is remembered as an empty one of its type, attributes and all.
        self.example = empty_like_mapping(original) if mapping else None

    def build(self, children: dict[Any, Any]) -> Any:
        """A container of this type around ``children``, keyed as the original was."""
        if self.example is not None:
            fresh = empty_like_mapping(self.example)
            fresh.update(children)
            return MappingProxyType(fresh) if self.kind is MappingProxyType else fresh
        # A tuple has a fixed length, a list ends with its last element, as upstream's does.
        length = max(children, default=-1) + 1
        if issubclass(self.kind, tuple):
            length = max(length, self.length)
        items = [children.get(index) for index in range(length)]
        return sequence_of(self.kind, items)


class TypedPath(tuple[PATH_ITEM, ...]):
    """A path that equals the plain tuple of its items and knows what it leads through.

    Attributes:
        keys: the original key or index at each step.
        through: the container that holds each step.

    """

    keys: tuple[Any, ...]
    through: tuple[Container, ...]

    @classmethod
    def of(
        cls, items: OBJ_PATH, keys: tuple[Any, ...], through: tuple[Container, ...]
    ) -> TypedPath:
        """A path from its items, keys and containers."""
        path = cls(items)
        path.keys = keys
        path.through = through
        return path

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return TypedPath.of, (tuple(self), self.keys, self.through)


class TypedMapping(dict[str, OBJ_PATH]):
    """A mapping from flat keys to paths that also remembers the root, for when it is empty."""

    root: Container | None = None


class _Node:
    """A container under construction. ``container`` is None where only a plain path is known."""

    __slots__ = ("children", "container", "is_list")

    def __init__(self, container: Container | None, is_list: bool) -> None:
        self.container = container
        self.is_list = is_list
        self.children: dict[Any, Any] = {}

    def build(self, children: dict[Any, Any]) -> Any:
        if self.container is not None:
            return self.container.build(children)
        if not self.is_list:
            return children
        return [children.get(index) for index in range(max(children, default=-1) + 1)]


def _traverse_state_dict(
    state_dict: STATE_DICT_TYPE,
    visitor: Callable[[OBJ_PATH, Any], None],
) -> None:
    """Call ``visitor(path, leaf)`` for each leaf, in order.

    Args:
        state_dict: nested Mapping, list and tuple. Not changed.
        visitor: gets the path as a tuple of str (keys) and int (indices), and the leaf itself. An
            empty container is a leaf at its own path (pytorch#137327), except the root.

    Raises:
        ValueError: a container holds itself; names its path.

    No collective runs.

    """
    for items, _, _, value in _leaves(state_dict):
        visitor(items, value)


def _flatten_state_dict(
    state_dict: STATE_DICT_TYPE,
) -> tuple[STATE_DICT_TYPE, FLATTEN_MAPPING]:
    r"""Flatten nested Mapping, list and tuple into one dict with dotted keys.

    Args:
        state_dict: the nested dict. Not changed.

    Returns:
        (flat dict over the same leaves, mapping from flat key to path). Keys are the path's items
        joined by dots. Where two paths would share a key, those whose own keys hold a dot or are
        no strings are written escaped: a dot as ``\.``, a key of another type as
        ``\type:key``.

    Raises:
        ValueError: two paths that even escaping cannot tell apart, or a container that holds
            itself.

    No collective runs.

    """
    found = list(_leaves(state_dict))
    names = [".".join(map(str, items)) for items, _, _, _ in found]
    if len(set(names)) != len(names):
        names = _told_apart(names, [(keys, through) for _, keys, through, _ in found])
    flattened: STATE_DICT_TYPE = {}
    mapping = TypedMapping()
    mapping.root = Container(state_dict)
    for name, (items, keys, through, value) in zip(names, found, strict=True):
        flattened[name] = _own_empty(value)
        mapping[name] = TypedPath.of(items, keys, through)
    return flattened, mapping


def _unflatten_state_dict(state_dict: STATE_DICT_TYPE, mapping: FLATTEN_MAPPING) -> STATE_DICT_TYPE:
    """Undo :func:`_flatten_state_dict`.

    Args:
        state_dict: flat dict; it may hold a part of the keys of ``mapping``. Not changed.
        mapping: flat key -> path. Paths from several flattenings and plain tuples of str and int
            may be mixed; a plain tuple yields dicts and lists, as upstream's does.

    Returns:
        The nested dict over the same leaves: types, keys and their order are the original's.

    Raises:
        KeyError: a key of ``state_dict`` that ``mapping`` lacks.
        ValueError: one path leads through the leaf of another.

    No collective runs.

    """
    for name in state_dict:
        if name not in mapping:
            raise KeyError(f"the mapping has no path for the flat key {name!r}")
    root = _Node(getattr(mapping, "root", None), is_list=False)
    for name, path in mapping.items():
        if name in state_dict:
            _place(root, path, _own_empty(state_dict[name]))
    return cast(STATE_DICT_TYPE, _build(root))


def _set_element(root_dict: STATE_DICT_TYPE, path: OBJ_PATH, value: Any) -> None:
    """Set the element at ``path``, making the containers on the way.

    Args:
        root_dict: changed in place.
        path: str items are keys of mappings, int items indices of lists.
        value: any object.

    A missing container is a dict where a str follows and a list where an int follows; a list is
    extended with None up to the index.

    Raises:
        IndexError: a negative index that the list does not have.
        TypeError: the path leads through something that is no dict and no list.
        After either nothing was changed.

    """
    holder: Any = root_dict
    step = 0
    while step < len(path) - 1:
        child = _existing(holder, path[step])
        if child is None:
            break
        holder = child
        step += 1
    # What is missing is built apart and attached last: after an error the root is as it was.
    for item in reversed(path[step + 1 :]):
        if isinstance(item, str):
            value = {item: value}
        elif item < 0:
            raise IndexError(f"{path_name(path)!r}: no element {item} in a new list")
        else:
            value = [*[None] * item, value]
    item = path[step]
    if isinstance(holder, list):
        if not isinstance(item, int):
            raise TypeError(f"{path_name(path)!r}: {item!r} cannot index a list")
        if item < -len(holder):
            raise IndexError(f"{path_name(path)!r}: no element {item} in a list of {len(holder)}")
        holder.extend([None] * (item + 1 - len(holder)))
    elif not isinstance(holder, MutableMapping):
        raise TypeError(f"{path_name(path)!r} leads through a {type(holder).__name__}")
    holder[item] = value


def _existing(holder: Any, item: PATH_ITEM) -> Any:
    """The container at ``item``, None where one has to be made."""
    if isinstance(holder, Mapping):
        if item not in holder:
            return None
        child = holder[item]
    elif isinstance(holder, list) and isinstance(item, int):
        child = holder[item] if -len(holder) <= item < len(holder) else None
        if child is None:
            return None
    else:
        return None
    if not isinstance(child, (MutableMapping, list)):
        raise TypeError(f"the value at {item!r} is a {type(child).__name__}, no container")
    return child


def _entries(value: Any) -> Iterator[tuple[PATH_ITEM, Any, Any]]:
    """(item of the path, original key, value) for each element of a container."""
    if isinstance(value, Mapping):
        return ((str(key), key, item) for key, item in value.items())
    return ((index, index, item) for index, item in enumerate(value))


def _leaves(
    root: Any,
) -> Iterator[tuple[OBJ_PATH, tuple[Any, ...], tuple[Container, ...], Any]]:
    """(items, keys, containers, leaf) of each leaf, depth first."""
    above = {id(root)}
    stack: list[tuple[Any, OBJ_PATH, tuple[Any, ...], tuple[Container, ...], Any]] = [
        (_entries(root), (), (), (Container(root),), root)
    ]
    while stack:
        entries, items, keys, through, holder = stack[-1]
        step = next(entries, None)
        if step is None:
            stack.pop()
            above.discard(id(holder))
            continue
        item, key, value = step
        if not is_branch(value) or len(value) == 0:
            yield (*items, item), (*keys, key), through, value
            continue
        if id(value) in above:
            raise ValueError(f"the container at {path_name((*items, item))!r} holds itself")
        above.add(id(value))
        stack.append(
            (
                _entries(value),
                (*items, item),
                (*keys, key),
                (*through, Container(value)),
                value,
            )
        )


def _own_empty(value: Any) -> Any:
    """``value``, or a new one of its type where it is an empty container."""
    return Container(value).build({}) if is_branch(value) and len(value) == 0 else value


def _escaped(key: Any, holder: Container) -> str:
    if isinstance(key, str):
        return key.replace("\\", "\\\\").replace(".", "\\.")
    if holder.example is None:
        return str(key)
    return f"\\{type(key).__name__}:{_escaped(str(key), holder)}"


def _told_apart(
    names: list[str], paths: list[tuple[tuple[Any, ...], tuple[Container, ...]]]
) -> list[str]:
    """Escape the names that collide, until none does."""
    escaped = [".".join(map(_escaped, keys, through)) for keys, through in paths]
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


def _place(root: _Node, path: OBJ_PATH, value: Any) -> None:
    keys = path.keys if isinstance(path, TypedPath) else tuple(path)
    through = path.through if isinstance(path, TypedPath) else (None,) * len(keys)
    node = root
    for step, key in enumerate(keys):
        if node.container is None:
            node.container = through[step]
        if step == len(keys) - 1:
            if isinstance(node.children.get(key), _Node):
                raise ValueError(f"{path_name(path)!r} is both a leaf and a container")
            node.children[key] = value
            return
        child = node.children.get(key)
        if child is None:
            child = _Node(None, is_list=not isinstance(path[step + 1], str))
            node.children[key] = child
        elif not isinstance(child, _Node):
            raise ValueError(f"{path_name(path)!r} leads through the leaf {key!r}")
        node = child


def _build(root: _Node) -> Any:
    """Turn nodes into containers, children first, without recursion."""
    order: list[tuple[_Node, _Node | None, Any]] = [(root, None, None)]
    for node, _, _ in order:
        order.extend((c, node, key) for key, c in node.children.items() if isinstance(c, _Node))
    for node, parent, key in reversed(order):
        if parent is None:
            return node.build(node.children)
        parent.children[key] = node.build(node.children)
    raise AssertionError("unreachable")
