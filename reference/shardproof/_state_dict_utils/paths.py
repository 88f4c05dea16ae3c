"""The paths of a flattened state dict: plain tuples to others, and all that is lost otherwise."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from types import MappingProxyType
from typing import Any, SupportsIndex

from shardproof._state_dict_utils.containers import empty_like_mapping, sequence_of

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
            if self.kind is dict:
                return children
            fresh = empty_like_mapping(self.example)
            fresh.update(children)
            return MappingProxyType(fresh) if self.kind is MappingProxyType else fresh
        # A tuple has a fixed length, a list ends with its last element, as upstream's does.
        length = max(children, default=-1) + 1
        if issubclass(self.kind, tuple):
            length = max(length, self.length)
        items = [children.get(index) for index in range(length)]
        return sequence_of(self.kind, items)


_ANY_DICT, _ANY_LIST = Container({}), Container([])


def container_of(value: Any) -> Container:
    """What a container is. Of plain dicts and lists nothing but that is worth remembering."""
    kind = type(value)
    if kind is dict:
        return _ANY_DICT
    return _ANY_LIST if kind is list else Container(value)


class Branch:
    """A container on the way to leaves: what their paths have in common.

    Attributes:
        parent: the branch above, None for the root.
        items: the path to it, as upstream writes it.
        key: the original key or index of it in its parent.
        container: what it was.
        prefix: what the flat keys of its leaves begin with.

    """

    __slots__ = ("container", "items", "key", "parent", "prefix")

    def __init__(
        self, parent: Branch | None, items: OBJ_PATH, key: Any, container: Container, prefix: str
    ) -> None:
        self.parent = parent
        self.items = items
        self.key = key
        self.container = container
        self.prefix = prefix

    def line(self) -> list[Branch]:
        """The branches from the root to this one."""
        found = [self]
        while (parent := found[-1].parent) is not None:
            found.append(parent)
        return found[::-1]

    @property
    def keys(self) -> tuple[Any, ...]:
        """The original key or index at each step."""
        return tuple(branch.key for branch in self.line()[1:])

    @property
    def through(self) -> tuple[Container, ...]:
        """The containers on the way, itself the last."""
        return tuple(branch.container for branch in self.line())


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
        cls, items: OBJ_PATH, keys: tuple[Any, ...], through: tuple[Container, ...]
    ) -> TypedPath:
        """A path from its items, keys and containers."""
        path = cls(items)
        branch = Branch(None, (), None, through[0], "")
        for step, container in enumerate(through[1:]):
            branch = Branch(branch, tuple(items[: step + 1]), keys[step], container, "")
        path.branch = branch
        path.key = keys[-1]
        return path

    @property
    def keys(self) -> tuple[Any, ...]:
        """The original key or index at each step."""
        return (*self.branch.keys, self[-1] if self.key is SAME else self.key)

    @property
    def through(self) -> tuple[Container, ...]:
        """The container that holds each step."""
        return self.branch.through

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return TypedPath.of, (tuple(self), self.keys, self.through)


class TypedMapping(dict[str, OBJ_PATH]):
    """A mapping from flat keys to paths that also remembers the root, for when it is empty."""

    root: Container | None = None
