"""Nested state dict <-> flat dict with dotted keys, without loss.

The flat keys are upstream's: the path's items joined by dots. The mapping from flat key to path
holds tuples that equal upstream's, so it can be merged, pickled and read by code that knows
nothing of this module; each also carries what upstream's lose, the containers' types and the
original keys (:class:`TypedPath`). All of it is iterative: depth is bounded by memory only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, cast

from shardproof._state_dict_utils.containers import (
    LEAF_TYPES,
    is_branch,
    path_name,
)
from shardproof._state_dict_utils.paths import (
    FLATTEN_MAPPING,
    OBJ_PATH,
    PATH_ITEM,
    SAME,
    STATE_DICT_TYPE,
    Branch,
    Container,
    TypedMapping,
    TypedPath,
    container_of,
)


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
    for branch, _, item, value in _leaves(state_dict):
        visitor((*branch.items, item), value)


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
    names: list[str] = []
    paths: list[TypedPath] = []
    values: list[Any] = []
    for branch, key, item, value in _leaves(state_dict):
        path = TypedPath((*branch.items, item))
        path.branch = branch
        if key is not item:
            path.key = key
        names.append(f"{branch.prefix}{item}")
        paths.append(path)
        values.append(value if type(value) in LEAF_TYPES else _own_empty(value))
    if len(set(names)) != len(names):
        names = _told_apart(names, [(path.keys, path.through) for path in paths])
    mapping = TypedMapping(zip(names, paths, strict=True))
    mapping.root = container_of(state_dict)
    return dict(zip(names, values, strict=True)), mapping


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
    nodes: dict[Branch, _Node] = {}
    for name, path in mapping.items():
        if name not in state_dict:
            continue
        value = state_dict[name]
        if type(value) not in LEAF_TYPES:
            value = _own_empty(value)
        if isinstance(path, TypedPath):
            branch, key = path.branch, path.key
            node = nodes.get(branch)
            if node is None:
                node = nodes[branch] = _descend(root, path, branch.keys, branch.through)
            if key is SAME:
                key = path[-1]
        else:
            node, key = _descend(root, path, path[:-1], (None,) * len(path)), path[-1]
        children = node.children
        if type(children.get(key)) is _Node:
            raise ValueError(f"{path_name(path)!r} is both a leaf and a container")
        children[key] = value
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


def _leaves(root: Any) -> Iterator[tuple[Branch, Any, PATH_ITEM, Any]]:
    """(branch, key, item of the path, leaf) of each leaf, depth first."""
    above = {id(root)}
    branch = Branch(None, (), None, container_of(root), "")
    stack: list[tuple[Iterator[tuple[Any, Any]], bool, Branch, Any]] = []
    steps, named, holder = _steps(root), isinstance(root, Mapping), root
    while True:
        # Runs of leaves are left in this loop: it is all that a wide dict costs.
        for key, value in steps:
            item = key if type(key) is str or not named else str(key)
            if type(value) in LEAF_TYPES:
                yield branch, key, item, value
                continue
            if not is_branch(value) or len(value) == 0:
                yield branch, key, item, value
                continue
            if id(value) in above:
                where = path_name((*branch.items, item))
                raise ValueError(f"the container at {where!r} holds itself")
            above.add(id(value))
            stack.append((steps, named, branch, holder))
            below = (*branch.items, item)
            branch = Branch(branch, below, key, container_of(value), f"{branch.prefix}{item}.")
            steps, named, holder = _steps(value), isinstance(value, Mapping), value
            break
        else:
            above.discard(id(holder))
            if not stack:
                return
            steps, named, branch, holder = stack.pop()


def _steps(value: Any) -> Iterator[tuple[Any, Any]]:
    """(key or index, value) for each element of a container."""
    return iter(value.items()) if isinstance(value, Mapping) else enumerate(value)


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


def _descend(
    root: _Node, path: OBJ_PATH, keys: tuple[Any, ...], through: tuple[Container | None, ...]
) -> _Node:
    """The node of the container that holds the last step of ``path``, made where missing."""
    node = root
    for step, key in enumerate(keys):
        if node.container is None:
            node.container = through[step]
        child = node.children.get(key)
        if child is None:
            child = _Node(None, is_list=not isinstance(path[step + 1], str))
            node.children[key] = child
        elif not isinstance(child, _Node):
            raise ValueError(f"{path_name(path)!r} leads through the leaf {key!r}")
        node = child
    if node.container is None:
        node.container = through[-1]
    return node


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
