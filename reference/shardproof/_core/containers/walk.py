"""A walk over a nested state dict: its leaves, and the containers around them.

One walk serves all: Mapping, list and tuple are containers, everything else is a leaf. Containers
keep their type, keys their type and order. A container that holds itself is refused by path.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from itertools import filterfalse, repeat
from typing import Any, Final, NamedTuple

from shardproof._core.containers.container_types import (
    Nameless,
    Path,
    are_leaf_names,
    filled_like,
    is_branch,
    is_container,
    leaf_name,
    named_path,
    path_name,
    sequence_of,
)
from shardproof._core.tensors.properties import LEAF_TYPES, kind_of

ABSENT: Final = object()

_NAMED = frozenset({dict, OrderedDict})
_SEQUENCES = frozenset({list, tuple})


class CompanionMismatch(Exception):  # noqa: N818  (upstream's name)
    """The companion of a state dict has another structure, kind, shape, dtype or placement.

    The message names the path of the leaf and what was expected there.
    """


class _WalkedContainer(NamedTuple):
    """A container that was walked, and the containers among its elements.

    ``below`` is None where all elements are leaves.
    """

    container: Any
    named: bool
    below: list[_WalkedContainer | None] | None


class Walk:
    """What a walk over a state dict, and over its companion in parallel, found.

    Args:
        root: nested containers, or a single leaf. Not changed.
        companion: ``ABSENT`` where there is none.
        refuse: told of a container that holds itself, instead of an exception. Where there is no
            companion.

    Attributes:
        leaves: the leaves, in the order of the walk.
        companions: what stands in the place of each in the companion; empty where there is none.

    Raises:
        CompanionMismatch: the containers of ``companion`` differ.
        ValueError: a container holds itself.

    """

    def __init__(
        self,
        root: Any,
        companion: Any = ABSENT,
        refuse: Callable[[Exception], None] | None = None,
    ) -> None:
        self.leaves: list[Any] = []
        self.companions: list[Any] = []
        self._refuse = refuse
        self._above: set[int] = set()
        self._root: _WalkedContainer | None = None
        if is_container(root):
            self._root = self._enter(root, companion, ())
        else:
            self.leaves.append(root)
            if companion is not ABSENT:
                self.companions.append(companion)
        # It may hold the walk itself: a ring, which keeps all leaves until garbage is collected.
        self._refuse = None

    def _enter(self, value: Any, companion: Any, path: Path) -> _WalkedContainer | None:
        # One frame per level, no comprehensions: deep nesting must not meet the recursion limit.
        above = self._above
        if id(value) in above:
            error = ValueError(f"the container at {path_name(path)!r} holds itself")
            if self._refuse is None:
                raise error
            self._refuse(error)
            self.leaves.append(None)
            return None
        kind = type(value)
        named = kind in _NAMED or (kind not in _SEQUENCES and isinstance(value, Mapping))
        elements = value.values() if named else value
        others: Any = None
        if companion is not ABSENT:
            others = _others(value, companion, named, path)
        if LEAF_TYPES.issuperset(map(type, elements)):
            self.leaves.extend(elements)
            if others is not None:
                self.companions.extend(others)
            return _WalkedContainer(value, named, None)
        above.add(id(value))
        below: list[_WalkedContainer | None] = []
        keys = iter(value) if named else iter(range(len(value)))
        others = None if others is None else iter(others)
        for item in elements:
            key = next(keys)
            other = ABSENT if others is None else next(others)
            if type(item) in LEAF_TYPES or not is_container(item):
                self.leaves.append(item)
                if others is not None:
                    self.companions.append(other)
                below.append(None)
            else:
                below.append(self._enter(item, other, (*path, key)))
        above.discard(id(value))
        return _WalkedContainer(value, named, below)

    def paths(self) -> Iterator[Path]:
        """The path of each leaf, in order."""
        if self._root is None:
            yield ()
            return
        stack: list[tuple[Path, Iterator[tuple[Any, _WalkedContainer | None]]]] = [
            ((), _steps(self._root))
        ]
        while stack:
            path, steps = stack[-1]
            for key, held in steps:
                if held is not None:
                    stack.append(((*path, key), _steps(held)))
                    break
                yield (*path, key)
            else:
                stack.pop()

    def names(self) -> list[str]:
        """The :func:`leaf_name` of each leaf."""
        held = self._root
        if held is not None and held.named and held.below is None:
            keys = list(held.container)
            if are_leaf_names(keys):
                return keys
        nameless: dict[int, Nameless] = {}
        return [leaf_name(named_path(path, nameless)) for path in self.paths()]

    def path(self, index: int) -> Path:
        """The path of one leaf; for messages, since it walks again."""
        return next(path for at, path in enumerate(self.paths()) if at == index)

    def nothing(self) -> Any:
        """The result on a rank outside `ranks_only`, as upstream's: {} for a mapping, else None."""
        return {} if self._root is not None and self._root.named else None

    def rebuilt(self, results: list[Any]) -> Any:
        """The same containers around other leaves, one result for each leaf in order."""
        if self._root is None:
            return results[0]
        return _rebuilt(self._root, iter(results))


def _steps(held: _WalkedContainer) -> Iterator[tuple[Any, _WalkedContainer | None]]:
    container = held.container
    keys = iter(container) if held.named else iter(range(len(container)))
    return zip(keys, repeat(None) if held.below is None else held.below, strict=False)


def _rebuilt(held: _WalkedContainer, results: Iterator[Any]) -> Any:
    container, named, below = held
    items: Any = results
    if below is not None:
        items = []
        for child in below:
            items.append(next(results) if child is None else _rebuilt(child, results))
    if not named:
        if below is None:
            # The container first: zip stops before it takes a result too many.
            items = [item for _, item in zip(container, results, strict=False)]
        return sequence_of(type(container), items)
    pairs = zip(container, items, strict=False)
    if type(container) is dict:
        return dict(pairs)
    return filled_like(container, pairs)


def _others(value: Any, companion: Any, named: bool, path: Path) -> Any:
    """The elements of the companion in the order of those of ``value``."""
    if named:
        if not isinstance(companion, (dict, Mapping)):
            raise CompanionMismatch(
                f"{path_name(path)}: expected a mapping, the companion has {kind_of(companion)}"
            )
        # A tensor is a key by its identity: == would compare its elements.
        if [*map(hash, value)] == [*map(hash, companion)] and [*value] == [*companion]:
            return companion.values()
        if companion.keys() != value.keys():
            missing = list(filterfalse(companion.__contains__, value))
            extra = []
            if len(value) - len(missing) != len(companion):
                extra = list(filterfalse(value.__contains__, companion))
            raise CompanionMismatch(
                f"{path_name(path)}: expected the keys of the state dict; the companion lacks "
                f"{missing} and has {extra} more"
            )
        return map(companion.__getitem__, value)
    if isinstance(companion, Mapping) or not is_branch(companion):
        raise CompanionMismatch(
            f"{path_name(path)}: expected a {type(value).__name__}, the companion has "
            f"{kind_of(companion)}"
        )
    if len(companion) != len(value):
        raise CompanionMismatch(
            f"{path_name(path)}: expected {len(value)} elements, the companion has {len(companion)}"
        )
    return companion
