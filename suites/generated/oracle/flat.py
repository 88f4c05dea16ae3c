"""Nested and flat state dicts, simulated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from generated.oracle.sims import ANY
from generated.oracle.steps import Scene, rule
from generated.oracle.tell import Outcome


def entries(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path of str and int, leaf) of each leaf; an empty container is one, except the root."""
    if isinstance(value, Mapping) and (value or not path):
        for key, item in value.items():
            yield from entries(item, (*path, str(key)))
    elif isinstance(value, (list, tuple)) and value:
        for number, item in enumerate(value):
            yield from entries(item, (*path, number))
    else:
        yield path, value


@rule("flatten")
def flatten(scene: Scene) -> list[Outcome]:
    """What goes in comes back; the flat keys are dotted paths where these tell leaves apart."""
    outcomes = []
    for rank in scene.ranks:
        tree = scene.tree(rank)
        found = list(entries(tree))
        names = [".".join(map(str, path)) for path, _ in found]
        flat: Any = ANY
        if len(set(names)) == len(names):
            flat = dict(zip(names, (value for _, value in found), strict=True))
        paths = [path for path, _ in found]
        outcomes.append(
            Outcome({"flat": flat, "paths": paths, "back": tree, "back by a pickled mapping": tree})
        )
    return outcomes


@rule("traverse")
def traverse(scene: Scene) -> list[Outcome]:
    """Each leaf once, in order, with its path."""
    return [
        Outcome([(path, value) for path, value in entries(scene.tree(rank))])
        for rank in scene.ranks
    ]


@rule("set_element")
def set_element(scene: Scene) -> list[Outcome]:
    """One element, and the containers on the way; after an error nothing has changed."""
    outcomes = []
    for rank in scene.ranks:
        value = scene.envs[rank][f"t{scene.step['value']}"]
        try:
            _set(scene.tree(rank), list(scene.step["path"]), value)
            outcomes.append(Outcome(None))
        except (IndexError, TypeError):
            outcomes.append(Outcome(raises=(), kinds=("IndexError", "TypeError")))
    return outcomes


def _set(holder: Any, path: list[Any], value: Any) -> None:
    item, rest = path[0], path[1:]
    if isinstance(holder, list):
        if not isinstance(item, int):
            raise TypeError
        if item < -len(holder):
            raise IndexError
        here = holder[item] if item < len(holder) else None
    elif isinstance(holder, MutableMapping):
        here = holder.get(item)
        if here is None and item in holder and rest:
            raise TypeError
    else:
        raise TypeError
    if rest:
        made = here
        if here is None:
            made = {} if isinstance(rest[0], str) else []
        _set(made, rest, value)
        value = made
    if isinstance(holder, list) and item >= len(holder):
        holder.extend([None] * (item + 1 - len(holder)))
    holder[item] = value
