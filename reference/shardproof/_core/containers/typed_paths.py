"""Paths of a flattened state dict: tuples that also know the types of containers and keys."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from types import MappingProxyType
from typing import Any, SupportsIndex

from shardproof._core.containers.container_types import (
    empty_like_mapping,
    fill,
    is_branch,
    mirror,
    mirrored,
    sequence_of,
)

PATH_ITEM = str | int
OBJ_PATH = tuple[PATH_ITEM, ...]
FLATTEN_MAPPING = dict[str, OBJ_PATH]
STATE_DICT_TYPE = dict[str, Any]
CONTAINER_TYPE = MutableMapping[PATH_ITEM, Any]


class ContainerType:
    """What a container of the original was: its type, its attributes, how many items it had."""

    __slots__ = ("example", "kind", "length", "mirrored")

    def __init__(self, original: Any) -> None:
        self.kind = type(original)
        self.length = len(original)
        mapping = isinstance(original, Mapping)
        # A mapping is remembered as an empty one of its type, attributes and all.
        self.example = empty_like_mapping(original) if mapping else None
        self.mirrored = mirrored(original)
        for name in self.mirrored:
            mirror(self.example, name)

    def build(self, children: dict[Any, Any]) -> Any:
        """A container of this type around ``children``, keyed as the original was."""
        if self.example is not None:
            if self.kind is dict:
                return children
            if self is _ORDERED:
                return OrderedDict(children)
            fresh = empty_like_mapping(self.example)
            fill(fresh, children.items())
            for name in self.mirrored:
                mirror(fresh, name)
            return MappingProxyType(fresh) if self.kind is MappingProxyType else fresh
        # A tuple has a fixed length, a list ends with its last element, as upstream's does.
        items = in_order(children, self.length if issubclass(self.kind, tuple) else 0)
        return sequence_of(self.kind, items)


def in_order(children: dict[int, Any], length: int = 0) -> list[Any]:
    """The elements of a sequence from their indices; None where one is missing."""
    length = max(len(children), length)
    if [*children] == [*range(length)]:
        return [*children.values()]
    return [children.get(index) for index in range(max(length, max(children, default=-1) + 1))]


PLAIN = frozenset({dict, list})
"""The types of containers that a plain path tells apart, by its items."""

ANY_DICT, ANY_LIST = ContainerType({}), ContainerType([])


_TUPLES: dict[int, ContainerType] = {}
_ORDERED = ContainerType(OrderedDict())


def container_of(value: Any) -> ContainerType:
    """What a container is. Of the usual ones little is worth remembering, so they share it."""
    kind = type(value)
    if kind is dict:
        return ANY_DICT
    if kind is list:
        return ANY_LIST
    if kind is tuple:
        length = len(value)
        return _TUPLES.get(length) or _TUPLES.setdefault(length, ContainerType(value))
    if kind is OrderedDict and not vars(value):
        return _ORDERED
    return ContainerType(value)


def renew_if_empty(value: Any) -> Any:
    """``value``, or a new one of its type where it is an empty container."""
    return ContainerType(value).build({}) if is_empty_container(value) else value


def is_empty_container(value: Any) -> bool:
    """Whether a leaf stands for a container in which nothing is, and so gives way to entries."""
    return is_branch(value) and len(value) == 0


def _plain_containers(items: OBJ_PATH) -> tuple[ContainerType, ...]:
    """The container that holds each step of a plain path."""
    return tuple(ANY_DICT if isinstance(item, str) else ANY_LIST for item in items)


class Branch:
    """A container on the way to leaves: what their paths have in common.

    Attributes:
        parent: the branch above, None for the root.
        key: the original key or index of it in its parent.
        container: what it was.

    """

    __slots__ = ("container", "key", "parent")

    def __init__(self, parent: Branch | None, key: Any, container: ContainerType) -> None:
        self.parent = parent
        self.key = key
        self.container = container

    @classmethod
    def plain(cls, items: OBJ_PATH, container: ContainerType) -> Branch:
        """The branch at the end of a path through dicts and lists, which its items tell apart."""
        return cls.along(items, (*_plain_containers(items), container))

    @classmethod
    def along(cls, keys: tuple[Any, ...], through: tuple[ContainerType, ...]) -> Branch:
        """The branch of the last of some containers, each at its key in the one before."""
        branch = cls(None, None, through[0])
        for key, container in zip(keys, through[1:], strict=False):
            branch = cls(branch, key, container)
        return branch

    def ancestry(self) -> list[Branch]:
        """The branches from the root to this one."""
        found = [self]
        while (parent := found[-1].parent) is not None:
            found.append(parent)
        return found[::-1]

    @property
    def keys(self) -> tuple[Any, ...]:
        """The original key or index at each step."""
        return tuple(branch.key for branch in self.ancestry()[1:])

    @property
    def through(self) -> tuple[ContainerType, ...]:
        """The containers on the way, itself the last."""
        return tuple(branch.container for branch in self.ancestry())


SAME = object()


class TypedPath(tuple[PATH_ITEM, ...]):
    """A path that equals the plain tuple of its items and knows what it leads through.

    Attributes:
        branch: the container that holds the last step. Siblings share it, which is what makes
            paths cheap.
        key: the original key in it, where it is not the last item.

    """

    branch: Branch
    key: Any = SAME

    @classmethod
    def of(
        cls, items: OBJ_PATH, keys: tuple[Any, ...], through: tuple[ContainerType, ...]
    ) -> TypedPath:
        """A path from its items, keys and containers."""
        path = cls(items)
        path.branch, path.key = Branch.along(keys, through), keys[-1]
        return path

    @classmethod
    def typed(cls, path: OBJ_PATH) -> TypedPath:
        """``path`` itself, or what it says where it is a plain one."""
        if isinstance(path, cls):
            return path
        return cls.of(path, path, _plain_containers(path))

    @property
    def keys(self) -> tuple[Any, ...]:
        """The original key or index at each step."""
        return (*self.branch.keys, self[-1] if self.key is SAME else self.key)

    @property
    def through(self) -> tuple[ContainerType, ...]:
        """The container that holds each step."""
        return self.branch.through

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return TypedPath.of, (tuple(self), self.keys, self.through)


class TypedMapping(dict[str, OBJ_PATH]):
    """A mapping from flat keys to paths that also remembers the root, for when it is empty."""

    root: ContainerType | None = None

    @classmethod
    def of(cls, root: ContainerType) -> TypedMapping:
        """An empty mapping of a state dict whose root was such a container."""
        mapping = cls()
        mapping.root = root
        return mapping
