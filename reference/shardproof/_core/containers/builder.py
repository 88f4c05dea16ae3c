"""A nested state dict built from paths, with containers of the original types."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from shardproof._core.containers.container_types import path_name
from shardproof._core.containers.typed_paths import (
    ANY_DICT,
    ANY_LIST,
    OBJ_PATH,
    Branch,
    ContainerType,
    TypedPath,
    is_empty_container,
    renew_if_empty,
)


class NestBuilder:
    """A nested state dict under construction.

    A container that is not built yet is a dict from key or index to leaf or such a dict. Most
    become nothing else; what the others become is remembered beside them.

    Attributes:
        root: the outermost of them.

    """

    def __init__(self, root: ContainerType) -> None:
        self.root: dict[Any, Any] = {}
        self._strangers: dict[int, Any] = {}
        """Leaves that are dicts, by id. Held, so that no id of a replaced one is given anew."""
        self._known: dict[Branch, dict[Any, Any]] = {}
        self._becomes: dict[int, ContainerType] = {}
        self._others: list[tuple[dict[Any, Any], Any, dict[Any, Any]]] = []
        """(parent, key there, container) of those, in the order in which they were made."""
        self._in_order = True
        if root is not ANY_DICT:
            self._becomes[id(self.root)] = root

    def holder_of_path(self, path: OBJ_PATH) -> dict[Any, Any]:
        """What holds the last step of a plain path."""
        held = self.root
        for key, item in pairwise(path):
            child = held.get(key)
            if type(child) is not dict or not self.is_container(child):
                if key in held and not is_empty_container(child):
                    raise ValueError(f"{path_name(path)!r} leads through the leaf {key!r}")
                child = held[key] = {}
                if not isinstance(item, str):
                    self._becomes[id(child)] = ANY_LIST
                    self._others.append((held, key, child))
            held = child
        return held

    def holder_of_branch(self, path: TypedPath) -> dict[Any, Any]:
        """What holds the last step of a typed path."""
        known = self._known
        new: list[Branch] = []
        above: Branch | None = path.branch
        while above is not None and above not in known:
            new.append(above)
            above = above.parent
        for branch in reversed(new):
            self._enter(branch, path)
        return known[path.branch]

    def _enter(self, branch: Branch, path: TypedPath) -> None:
        """Know the container of a branch, the one above it being known; made where missing."""
        key, container = branch.key, branch.container
        if branch.parent is None:
            held: Any = self.root
        else:
            parent = self._known[branch.parent]
            held = parent.get(key)
            if type(held) is not dict or not self.is_container(held):
                if key in parent and not is_empty_container(held):
                    raise ValueError(f"{path_name(path)!r} leads through the leaf {key!r}")
                held = parent[key] = self._known[branch] = {}
                if container is not ANY_DICT:
                    self._becomes[id(held)] = container
                    self._others.append((parent, key, held))
                return
        self._known[branch] = held
        guess = self._becomes.get(id(held), ANY_DICT)
        # Plain paths guess; what knows more of a container wins.
        if container is not guess and guess in (ANY_DICT, ANY_LIST):
            self._becomes[id(held)] = container
            self._in_order = False

    def is_container(self, value: Any) -> bool:
        """Whether what a container holds is another, and no leaf."""
        return type(value) is dict and not (self._strangers and id(value) in self._strangers)

    def leaf(self, value: Any) -> Any:
        """A leaf of a type that few have: a new one where it is an empty container."""
        value = renew_if_empty(value)
        if type(value) is dict:
            self._strangers[id(value)] = value
        return value

    def build(self) -> Any:
        """Turn all into the containers that they become, and return the root."""
        if not self._in_order:
            self._others = self._all()
        becomes = self._becomes
        # The last made first: then what a container holds is built before it.
        for parent, key, held in reversed(self._others):
            container = becomes.get(id(held))
            if container is not None:
                parent[key] = container.build(held)
        return becomes.get(id(self.root), ANY_DICT).build(self.root)

    def _all(self) -> list[tuple[dict[Any, Any], Any, dict[Any, Any]]]:
        """(parent, key there, container) of all, parents first."""
        found: list[tuple[dict[Any, Any], Any, dict[Any, Any]]] = []
        queue = [self.root]
        for parent in queue:
            for key, held in parent.items():
                if self.is_container(held):
                    found.append((parent, key, held))
                    queue.append(held)
        return found
