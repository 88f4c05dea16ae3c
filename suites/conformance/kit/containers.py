"""Containers that a state dict may be nested in, and pairs of leaves that must not be mixed up."""

from __future__ import annotations

from collections import Counter, OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from conformance.kit.data import numbers
from conformance.kit.layouts import R, S, dtensor, rows, sharded_tensor
from conformance.kit.nested import Pair, with_metadata


def dashed(name: str) -> str:
    """A case's name as a check's id."""
    return name.replace(" ", "-")


class Settings(dict[Any, Any]):
    """A dict with an attribute, as configuration classes are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.source = "file"


class Tags(list[Any]):
    """A list type of somebody's own."""


class Ordered(OrderedDict[Any, Any]):
    """An OrderedDict type of somebody's own."""


class Kept(UserDict[Any, Any]):
    """A UserDict with an attribute."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.source = "file"


class Named(dict[Any, Any]):
    """A dict with an attribute that has the name of a key, and is something else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.x = "not the item"


class Row(tuple[Any, ...]):
    """A tuple type of somebody's own."""


class Options(dict[Any, Any]):
    """As Settings, and another type."""


class Marks(list[Any]):
    """As Tags, and another type."""


class Line(tuple[Any, ...]):
    """As Row, and another type."""


class Couple(NamedTuple):
    """A namedtuple with the fields of Pair, and another type."""

    first: Any
    second: Any


class OfOne(Pair):
    """A namedtuple that is made of one argument."""

    def __new__(cls, both: tuple[Any, Any]) -> OfOne:
        return super().__new__(cls, *both)


class Counted(Pair):
    """A namedtuple that computes what it holds of what it is made of."""

    def __new__(cls, first: Any, second: int) -> Counted:
        return super().__new__(cls, first, second + 1)


class Point(tuple[Any, ...]):
    """A tuple type that takes its items one by one."""

    def __new__(cls, a: Any, b: Any) -> Point:
        return super().__new__(cls, (a, b))


CONTAINERS: dict[str, Callable[[Any, Any], Any]] = {
    "dict": lambda a, b: {"x": a, "y": b},
    "OrderedDict": lambda a, b: OrderedDict([("y", a), ("x", b)]),
    "OrderedDict with _metadata": lambda a, b: with_metadata(("x", a), ("y", b), version=2),
    "int keys": lambda a, b: {0: a, 1: b},
    "bool keys": lambda a, b: {True: a, False: b},
    "tuple keys": lambda a, b: {("x", 0): a, ("x", 1): b},
    "None as key": lambda a, b: {None: a, "x": b},
    "int and str keys": lambda a, b: {1: a, "1": b},
    "dotted keys": lambda a, b: {"x.y": a, "x": {"y": b}},
    "dotted keys and a list": lambda a, b: {"x.0": a, "x": [b]},
    "defaultdict": lambda a, b: defaultdict(list, {"x": a, "y": b}),
    "Counter": lambda a, b: {"x": [a, b], "seen": Counter(x=2, y=3)},
    "dict subclass": lambda a, b: Settings(x=a, y=b),
    "OrderedDict subclass": lambda a, b: Ordered([("y", a), ("x", b)]),
    "dict with an attribute like a key": lambda a, b: Named(x=a, y=b),
    "UserDict": lambda a, b: UserDict({"x": a, "y": b}),
    "UserDict subclass": lambda a, b: Kept(x=a, y=b),
    "list": lambda a, b: [a, b],
    "list subclass": lambda a, b: Tags([a, b]),
    "tuple": lambda a, b: (a, b),
    "tuple subclass": lambda a, b: Row((a, b)),
    "namedtuple": lambda a, b: Pair(a, b),
    "namedtuples alike": lambda a, b: [Pair(a, 1), Couple(b, 2)],
    "dict subclasses alike": lambda a, b: [Settings(x=a), Options(x=b)],
    "lists and tuples alike": lambda a, b: [Tags([a]), Marks([1]), Row((b,)), Line((2,))],
    "list of lists": lambda a, b: [[a], [[b]]],
    "list ending in None": lambda a, b: [a, b, None, None],
    "tuple of dicts": lambda a, b: ({"x": a}, {"x": b}),
    "empty dict": lambda a, b: {"x": {}, "y": [a, {}, b]},
    "empty list": lambda a, b: {"x": [], "y": [a, [], b, []]},
    "empty tuple": lambda a, b: {"x": (), "y": (a, (), b, ())},
    "empty OrderedDict with _metadata": lambda a, b: [a, b, with_metadata(version=3)],
    "empty in empty": lambda a, b: [a, b, {"x": [{}], "y": ([],)}],
}
"""Name to a function that puts two leaves into that container."""

READ_ONLY: dict[str, Callable[[Any, Any], Any]] = {
    "mappingproxy": lambda a, b: MappingProxyType({"x": a, "y": b}),
}
"""Containers that nothing can be added to once they are made."""


def _dt(mesh: DeviceMesh, *shape: int, dtype: torch.dtype = torch.float32, at: Any = None) -> Any:
    return dtensor(numbers(*shape, dtype=dtype), mesh, [S(0) if at is None else at])


def _st(*counts: int, dtype: torch.dtype = torch.float32, columns: int = 2) -> Any:
    full = numbers(sum(counts), columns, dtype=dtype)
    return sharded_tensor(full, rows(full.shape, counts, [0] * len(counts)))


KINDS: dict[str, Callable[[DeviceMesh], tuple[Any, Any]]] = {
    "one element for four": lambda _: (numbers(1), numbers(4)),
    "four elements for one": lambda _: (numbers(4), numbers(1)),
    "a row for a matrix": lambda _: (numbers(3), numbers(2, 3)),
    "0-dim for one element": lambda _: (numbers(), numbers(1)),
    "one element for 0-dim": lambda _: (numbers(1), numbers()),
    "transposed": lambda _: (numbers(2, 3), numbers(3, 2)),
    "float for int": lambda _: (numbers(4), numbers(4, dtype=torch.int64)),
    "int for float": lambda _: (numbers(4, dtype=torch.int64), numbers(4)),
    "float for bfloat16": lambda _: (numbers(4), numbers(4, dtype=torch.bfloat16)),
    "complex for float": lambda _: (numbers(4, dtype=torch.complex64), numbers(4)),
    "tensor for number": lambda _: (numbers(), 0.0),
    "tensor for dict": lambda _: (numbers(4), {"x": numbers(4)}),
    "dict for tensor": lambda _: ({"x": numbers(4)}, numbers(4)),
    "dict for list": lambda _: ({0: numbers(4)}, [numbers(4)]),
    "list for dict": lambda _: ([numbers(4)], {0: numbers(4)}),
    "list for tensor": lambda _: ([numbers(4)], numbers(1, 4)),
    "dict for None": lambda _: ({"x": numbers(4)}, None),
    "list for None": lambda _: ([numbers(4)], None),
    "number for dict": lambda _: (3, {"x": numbers(4)}),
    "None for list": lambda _: (None, [numbers(4)]),
    "two for three": lambda _: ([numbers(4)] * 2, [numbers(4)] * 3),
    "three for two": lambda _: ([numbers(4)] * 3, [numbers(4)] * 2),
    "DTensor for tensor": lambda mesh: (_dt(mesh, 4), numbers(4)),
    "tensor for DTensor": lambda mesh: (numbers(4), _dt(mesh, 4)),
    "DTensor of another shape": lambda mesh: (_dt(mesh, 1), _dt(mesh, 4)),
    "DTensor of another dtype": lambda mesh: (_dt(mesh, 4), _dt(mesh, 4, dtype=torch.int64)),
    "ShardedTensor for tensor": lambda _: (_st(4), numbers(4, 2)),
    "tensor for ShardedTensor": lambda _: (numbers(4, 2), _st(4)),
    "DTensor for ShardedTensor": lambda mesh: (_dt(mesh, 4, 2), _st(4)),
    "ShardedTensor for DTensor": lambda mesh: (_st(4), _dt(mesh, 4, 2)),
    "ShardedTensor of another shape": lambda _: (_st(4, columns=1), _st(4)),
    "ShardedTensor of another dtype": lambda _: (_st(4), _st(4, dtype=torch.int64)),
}
"""Name to (leaf, the companion's) of another kind, shape or dtype, on a mesh of one rank."""

PLACEMENTS: dict[str, Callable[[DeviceMesh], tuple[Any, Any]]] = {
    "DTensor of other placements": lambda mesh: (_dt(mesh, 4), _dt(mesh, 4, at=R)),
    "DTensor sharded on another dim": lambda mesh: (_dt(mesh, 4, 4), _dt(mesh, 4, 4, at=S(1))),
    "DTensor of one row here": lambda mesh: (
        dtensor(numbers(4, 4), mesh, [S(0)], local=numbers(1, 4)),
        _dt(mesh, 4, 4),
    ),
    "ShardedTensor in other shards": lambda _: (_st(2, 2), _st(4)),
    "ShardedTensor in uneven shards": lambda _: (_st(1, 3), _st(3, 1)),
}
"""The same for leaves whose placements alone disagree."""

GROUPS = ["ShardedTensor", "DTensor", "containers", "plain values", "tensors"]
"""What the cases of KINDS and PLACEMENTS are about."""


def group_of(name: str) -> str:
    """The group of a case, the first that its name speaks of."""
    words = set(name.split())
    if "ShardedTensor" in words:
        return "ShardedTensor"
    if "DTensor" in words:
        return "DTensor"
    if words & {"dict", "list", "two", "three"}:
        return "containers"
    return "plain values" if words & {"None", "number"} else "tensors"
