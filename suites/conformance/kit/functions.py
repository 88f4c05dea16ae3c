"""Every function of `_state_dict_utils`, called on state dicts of any kinds of leaves.

A function is added here, and the checks that sweep over functions are asked of it. `leaves` is what
a state dict holds, as (kind, whole tensor) by key; `Function.road` makes of it the call on this
rank and what must come of it. Every rank makes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from conformance.kit.compare import assert_same, bits, local
from conformance.kit.kinds import GATHERED, KEPT, KINDS, LANDED, Kind, kinds_for
from conformance.kit.nested import assert_same_structure, tensors

Leaves = Mapping[Any, tuple[str, torch.Tensor]]
"""Key -> (name of a kind, the whole tensor)."""

Nest = Callable[[dict[Any, Any]], Any]
"""Puts the leaves of a flat dict into containers."""


@dataclass
class Call:
    """One call on this rank.

    Attributes:
        run: makes the call, on the objects below, and returns what it returns.
        inputs: what the call may only read.
        outputs: what it writes to, where it does.
        check: raises where what was returned, or written, is wrong.

    """

    run: Callable[[], Any]
    inputs: Any
    outputs: Any
    check: Callable[[Any], None]


@dataclass(frozen=True)
class Place:
    """Where calls are made: this rank's world, the mesh of all ranks, the subject, the device."""

    world: Any
    mesh: Any
    subject: Any
    device: torch.device


@dataclass(frozen=True)
class Function:
    """A function, and how it is called.

    Attributes:
        name: upstream's.
        use: what it does with leaves.
        make: (place, the function, leaves, nest) -> the call.
        nested: whether it takes leaves in containers.
        talks: whether ranks have to call it together.
        values: whether its result shows the values of leaves.
        same_objects: whether its result holds the very leaves.
        only: the kinds that it takes, where these are fewer than `use` says.

    """

    name: str
    use: str
    make: Callable[[Place, Any, Leaves, Nest], Call]
    nested: bool = True
    talks: bool = False
    values: bool = True
    same_objects: bool = False
    only: Collection[str] = field(default=())

    def kinds(self, *, usual: bool | None = None) -> dict[str, Kind]:
        """The kinds of leaves that it takes."""
        found = kinds_for(self.use, usual=usual)
        return {name: kind for name, kind in found.items() if not self.only or name in self.only}

    def call(self, place: Place, leaves: Leaves, nest: Nest = lambda flat: flat) -> Call:
        """A call on new objects, to be made by every rank."""
        function = place.subject.function(f"_state_dict_utils.{self.name}")
        return self.make(place, function, leaves, nest)

    def each_kind(self, place: Place, full: torch.Tensor, *, usual: bool | None = None) -> Call:
        """A call on one leaf of each kind."""
        return self.call(place, {name: (name, full) for name in self.kinds(usual=usual)})


def _made(leaves: Leaves, mesh: Any, *, other: bool = False) -> dict[Any, Any]:
    return {
        key: KINDS[kind].make(_other(full) if other else full, mesh)
        for key, (kind, full) in leaves.items()
    }


def _other(full: torch.Tensor) -> torch.Tensor:
    """Other values of the same shape and dtype."""
    return torch.zeros_like(full)


def _wholes(leaves: Leaves, mesh: Any) -> dict[Any, Any]:
    return {key: KINDS[kind].whole(full, mesh) for key, (kind, full) in leaves.items()}


def _copies(leaves: Leaves, mesh: Any) -> dict[Any, Any]:
    return {key: KINDS[kind].copy(full, mesh) for key, (kind, full) in leaves.items()}


def _check(expected: Any) -> Callable[[Any], None]:
    return lambda got: assert_same_structure(got, expected, "the result")


def _gather(place: Place, function: Any, leaves: Leaves, nest: Nest) -> Call:
    value = nest(_made(leaves, place.mesh))
    expected = nest(_wholes(leaves, place.mesh))
    return Call(lambda: function(value), value, None, _check(expected))


def _all_gather(place: Place, function: Any, leaves: Leaves, nest: Nest) -> Call:
    value = _made(leaves, place.mesh)

    def check(got: Any) -> None:
        for (key, (_, full)), tensor in zip(leaves.items(), got, strict=True):
            assert_same(tensor, full, str(key))

    return Call(lambda: [function(tensor) for tensor in value.values()], value, None, check)


def _landed(leaves: Leaves, mesh: Any, *, new: bool = False) -> dict[Any, Any]:
    """What the targets are afterwards; `new`: none of them is the one that was there."""
    found = {key: KINDS[kind].landed(full, mesh) for key, (kind, full) in leaves.items()}
    return {
        key: leaf.detach() if new and isinstance(leaf, torch.nn.Parameter) else leaf
        for key, leaf in found.items()
    }


def _broadcast(place: Place, function: Any, leaves: Leaves, nest: Nest) -> Call:
    into = _made(leaves, place.mesh, other=True)
    source = {}
    if place.world.rank == 0:
        source = {key: _of_a_model(full, n) for n, (key, (_, full)) in enumerate(leaves.items())}
    check = _check(_landed(leaves, place.mesh))
    return Call(lambda: function(source, into, place.device), source, into, lambda _: check(into))


def _of_a_model(full: torch.Tensor, number: int) -> torch.Tensor:
    """Every second one that can train is a Parameter, as models keep them."""
    trains = number % 2 and full.dtype in (torch.float32, torch.bfloat16)
    return torch.nn.Parameter(full.clone()) if trains else full.clone()


def _broadcast_tensors(place: Place, function: Any, leaves: Leaves, nest: Nest) -> Call:
    into = _made(leaves, place.mesh, other=True)
    info = place.subject.function("_state_dict_utils._TensorInfo")
    source = {
        key: full.clone() if place.world.rank == 0 else info(full.shape, full.dtype)
        for key, (_, full) in leaves.items()
    }
    check = _check(_landed(leaves, place.mesh))

    def run() -> Any:
        with _keys_of(leaves) as keys:
            return function(source, into, keys, place.device)

    return Call(run, source, into, lambda _: check(into))


@contextmanager
def _keys_of(leaves: Leaves) -> Iterator[list[Any]]:
    """The keys as a list of the caller's, which a call may only read."""
    keys = list(leaves)
    yield keys
    assert keys == list(leaves), (
        f"the call changed the list of keys to {keys}, expected {list(leaves)}"
    )


def _distribute(place: Place, function: Any, leaves: Leaves, nest: Nest) -> Call:
    into = _made(leaves, place.mesh, other=True)
    source = {key: full.clone() for key, (_, full) in leaves.items()}
    held = {k: local(t) for k, t in into.items() if isinstance(t, DTensor) and not t.is_meta}

    def check(_: Any) -> None:
        _check(_landed(leaves, place.mesh, new=True))(into)
        written = [key for key, tensor in held.items() if bits(tensor).any()]
        assert not written, f"the caller's own DTensors {written} were written to"

    return Call(lambda: function(source, into, place.device), source, into, check)


def _distribute_tensors(place: Place, function: Any, leaves: Leaves, nest: Nest) -> Call:
    source = {key: full.clone() for key, (_, full) in leaves.items()}
    made = _made(leaves, place.mesh, other=True)
    into: dict[Any, Any] = {key: (made[key], source[key]) for key in leaves}
    check = _check(_landed(leaves, place.mesh))

    def run() -> Any:
        with _keys_of(leaves) as keys:
            return function(into, keys, place.device)

    return Call(run, source, into, lambda _: check(into))


def _offload(place: Place, function: Any, leaves: Leaves, nest: Nest) -> Call:
    value = nest(_made(leaves, place.mesh))
    return Call(lambda: function(value), value, None, _check(nest(_copies(leaves, place.mesh))))


def _copy(place: Place, function: Any, leaves: Leaves, nest: Nest) -> Call:
    value = nest(_made(leaves, place.mesh))
    into = nest(_copies({k: (kind, _other(t)) for k, (kind, t) in leaves.items()}, place.mesh))
    check = _check(nest(_copies(leaves, place.mesh)))
    return Call(lambda: function(value, into), value, into, check)


def _same(tensor: Any, *_: Any) -> Any:
    return tensor


def _iterate(place: Place, function: Any, leaves: Leaves, nest: Nest) -> Call:
    value = nest(_made(leaves, place.mesh))
    return Call(
        lambda: function(value, _same, _same, _same, cpu_offload=True),
        value,
        None,
        _check(nest(_copies(leaves, place.mesh))),
    )


def _create(place: Place, function: Any, leaves: Leaves, nest: Nest) -> Call:
    value = nest(_made(leaves, place.mesh))
    expected = nest(_copies(leaves, place.mesh))

    def check(got: Any) -> None:
        assert_same_structure(got, expected, "the buffers", values=False, flags=False)

    return Call(lambda: function(value), value, None, check)


def _similar(place: Place, function: Any, leaves: Leaves, nest: Nest) -> Call:
    value = nest(_made(leaves, place.mesh))
    other = nest(_made(leaves, place.mesh, other=True))

    def check(got: Any) -> None:
        assert got is True, f"expected True of two state dicts of the same structure, got {got}"

    return Call(lambda: function(value, other), [value, other], None, check)


def _flatten(place: Place, function: Any, leaves: Leaves, nest: Nest) -> Call:
    value = nest(_made(leaves, place.mesh))
    back = place.subject.function("_state_dict_utils._unflatten_state_dict")

    def check(got: Any) -> None:
        assert_same_structure(back(*got), value, "flattened and back")

    return Call(lambda: function(value), value, None, check)


def _unflatten(place: Place, function: Any, leaves: Leaves, nest: Nest) -> Call:
    value = nest(_made(leaves, place.mesh))
    flatten = place.subject.function("_state_dict_utils._flatten_state_dict")
    flat = flatten(value)

    def check(got: Any) -> None:
        assert_same_structure(got, value, "flattened and back")

    return Call(lambda: function(*flat), flat, None, check)


def _traverse(place: Place, function: Any, leaves: Leaves, nest: Nest) -> Call:
    value = nest(_made(leaves, place.mesh))

    def run() -> list[Any]:
        met: list[Any] = []
        function(value, lambda _path, leaf: met.append(leaf))
        return met

    def check(got: Any) -> None:
        met = [leaf for leaf in got if isinstance(leaf, torch.Tensor)]
        assert list(map(id, met)) == list(map(id, tensors(value).values())), "other leaves"

    return Call(run, value, None, check)


_SHARDS = ("shards", "turned shards")
_DTENSORS = (
    "rows",
    "rows that train",
    "strided rows",
    "columns",
    "replica",
    "rows in turn",
    "rows on meta",
    "columns on meta that train",
)

FUNCTIONS = [
    Function("_gather_state_dict", GATHERED, _gather, talks=True),
    Function("_all_gather_sharded_tensor", GATHERED, _all_gather, False, talks=True, only=_SHARDS),
    Function("_broadcast_state_dict", LANDED, _broadcast, nested=False, talks=True),
    Function("_broadcast_tensors", LANDED, _broadcast_tensors, nested=False, talks=True),
    Function("_distribute_state_dict", LANDED, _distribute, nested=False),
    Function("_distribute_tensors", LANDED, _distribute_tensors, nested=False, only=_DTENSORS),
    Function("_offload_state_dict_to_cpu", KEPT, _offload),
    Function("_copy_state_dict", KEPT, _copy),
    Function("_iterate_state_dict", KEPT, _iterate),
    Function("_create_cpu_state_dict", KEPT, _create, values=False),
    Function("_check_state_dict_similarity", KEPT, _similar, values=False),
    Function("_flatten_state_dict", KEPT, _flatten, same_objects=True),
    Function("_unflatten_state_dict", KEPT, _unflatten, same_objects=True),
    Function("_traverse_state_dict", KEPT, _traverse, same_objects=True),
]


def each(chosen: Callable[[Function], bool] = lambda _: True) -> pytest.MarkDecorator:
    """The mark of a check that is asked of each function, or of those chosen, one by one."""
    return pytest.mark.parametrize(
        "function",
        [
            pytest.param(
                function,
                id=function.name,
                marks=pytest.mark.judges(f"_state_dict_utils.{function.name}"),
            )
            for function in FUNCTIONS
            if chosen(function)
        ],
    )


def each_with_kinds() -> pytest.MarkDecorator:
    """The same, once with the kinds of leaves that upstream takes, and once with the others.

    The first is thorough for functions without collectives: these treat each leaf by itself.
    """
    return pytest.mark.parametrize(
        ("function", "usual"),
        [
            pytest.param(
                function,
                usual,
                id=f"{function.name}-{'usual' if usual else 'unusual'}",
                marks=[
                    pytest.mark.judges(f"_state_dict_utils.{function.name}"),
                    *([pytest.mark.thorough] if usual and not function.talks else []),
                ],
            )
            for function in FUNCTIONS
            for usual in (True, False)
            if function.kinds(usual=usual)
        ],
    )


_SAME = [lambda tensor, *_: tensor] * 3
COPIES: dict[str, Callable[[Any, Any], Any]] = {
    "_offload_state_dict_to_cpu": lambda judged, value: judged(value),
    "_create_cpu_state_dict": lambda judged, value: judged(value),
    "_iterate_state_dict": lambda judged, value: judged(value, *_SAME, cpu_offload=True),
}
"""Function -> how it copies a state dict, or makes buffers for it."""
