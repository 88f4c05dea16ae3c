"""From a nested state dict to a flat one with dotted keys, and back, without loss.

The flat keys are upstream's: the path's items joined by dots. The mapping from flat key to path
holds tuples that equal upstream's, so it can be merged, pickled and read by code that knows
nothing of this module. Where such a tuple would lose something, a container's type or an original
key, it also carries that (:class:`TypedPath`). All of it is iterative: depth is bounded by memory
only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from operator import eq
from typing import Any, cast

from shardproof._core.containers.builder import NestBuilder
from shardproof._core.containers.container_types import path_name
from shardproof._core.containers.flat_names import escape_collisions, leaves_with_names
from shardproof._core.containers.typed_paths import (
    ANY_DICT,
    FLATTEN_MAPPING,
    OBJ_PATH,
    PATH_ITEM,
    PLAIN,
    SAME,
    STATE_DICT_TYPE,
    TypedMapping,
    TypedPath,
    container_of,
    is_empty_container,
    renew_if_empty,
)
from shardproof._core.tensors.properties import LEAF_TYPES


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
        TypeError: ``state_dict`` is no container.
        ValueError: a container holds itself; names its path.

    No collective runs.

    """
    paths, _, values = leaves_with_names(state_dict)
    for path, value in zip(paths, values, strict=True):
        visitor(path, value)


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
        TypeError: ``state_dict`` is no container.
        ValueError: two paths that even escaping cannot tell apart, or a container that holds
            itself.

    No collective runs.

    """
    paths, names, values = leaves_with_names(state_dict)
    flat = dict(zip(names, values, strict=True))
    if len(flat) != len(names):
        names = escape_collisions(names, paths)
        flat = dict(zip(names, values, strict=True))
    if not LEAF_TYPES.issuperset(map(type, values)):
        for name, value in flat.items():
            if type(value) not in LEAF_TYPES:
                flat[name] = renew_if_empty(value)
    root = container_of(state_dict)
    mapping: FLATTEN_MAPPING = {} if root is ANY_DICT else TypedMapping.of(root)
    mapping.update(zip(names, paths, strict=True))
    return flat, mapping


def _unflatten_state_dict(state_dict: STATE_DICT_TYPE, mapping: FLATTEN_MAPPING) -> STATE_DICT_TYPE:
    """Undo :func:`_flatten_state_dict`.

    Args:
        state_dict: flat dict; it may hold a part of the keys of ``mapping``. Not changed.
        mapping: flat key -> path. Paths from several flattenings and plain tuples of str and int
            may be mixed; a plain tuple yields dicts and lists, as upstream's does. An empty
            container gives way to entries that lie in it, as where a checkpoint and a new optimizer
            are merged of which one has no state for a parameter yet.

    Returns:
        The nested dict over the same leaves: types and keys are the original's. Keys stand in the
        order of the flat dict, and so in the original's where nobody sorted or filtered it.

    Raises:
        KeyError: a key of ``state_dict`` that ``mapping`` lacks.
        ValueError: one path leads through the leaf of another, which is no empty container.

    No collective runs.

    """
    nest = NestBuilder(getattr(mapping, "root", None) or ANY_DICT)
    # Leaves of one container mostly stand together.
    held: dict[Any, Any] = nest.root
    above: Any = ()
    for path, value in _paired_with_paths(state_dict, mapping):
        if type(path) is TypedPath:
            key = path.key
            if key is SAME:
                key = path[-1]
            if path.branch is not above:
                above = path.branch
                held = nest.holder_of_branch(path)
        else:
            holder, key = path[:-1], path[-1]
            if holder != above:
                above = holder
                held = nest.holder_of_path(path)
        if type(value) not in LEAF_TYPES:
            value = nest.leaf(value)
        if held.setdefault(key, value) is not value:
            if nest.is_container(held[key]):
                if is_empty_container(value):
                    continue
                raise ValueError(f"{path_name(path)!r} is both a leaf and a container")
            held[key] = value
    return cast(STATE_DICT_TYPE, nest.build())


def _paired_with_paths(
    state_dict: STATE_DICT_TYPE, mapping: FLATTEN_MAPPING
) -> Iterable[tuple[OBJ_PATH, Any]]:
    """(path, value) of each entry of a flat dict, in its order."""
    if len(mapping) == len(state_dict) and all(map(eq, mapping, state_dict)):
        return zip(mapping.values(), state_dict.values(), strict=True)
    for name in state_dict:
        if name not in mapping:
            raise KeyError(f"the mapping has no path for the flat key {name!r}")
    return [(mapping[name], value) for name, value in state_dict.items()]


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
        ValueError: the path is empty.
        After each of them nothing was changed.

    """
    if not path:
        raise ValueError("path (): expected at least one key")
    holder: Any = root_dict
    step, last = 0, len(path) - 1
    while step < last:
        item = path[step]
        child = None
        # What is of the usual types needs no further questions.
        if type(holder) is dict:
            child = holder.get(item)
        elif type(holder) is list and type(item) is int and 0 <= item < len(holder):
            child = holder[item]
        if type(child) not in PLAIN:
            child = _existing_container(holder, item)
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
    elif not isinstance(holder, (dict, MutableMapping)):
        raise TypeError(f"{path_name(path)!r} leads through a {type(holder).__name__}")
    holder[item] = value


def _existing_container(holder: Any, item: PATH_ITEM) -> Any:
    """The container at ``item``, None where one has to be made."""
    if isinstance(holder, (dict, Mapping)):
        if item not in holder:
            return None
        child = holder[item]
    elif isinstance(holder, list) and isinstance(item, int):
        child = holder[item] if -len(holder) <= item < len(holder) else None
        if child is None:
            return None
    else:
        return None
    if not isinstance(child, (dict, list, MutableMapping)):
        raise TypeError(f"the value at {item!r} is a {type(child).__name__}, no container")
    return child
