"""Every key and container that a leaf may stand under, through each function."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import torch

from conformance.kit.agree import assert_raises_everywhere
from conformance.kit.compare import assert_same
from conformance.kit.containers import CONTAINERS
from conformance.kit.data import numbers
from conformance.kit.effects import empty, outline
from conformance.kit.functions import Function, Leaves, Place, each
from conformance.kit.keys import KEYS, NESTS, pickled, rings
from conformance.kit.kinds import KINDS
from conformance.kit.layouts import S, dtensor
from conformance.kit.levels import WORDS
from conformance.kit.nested import Pair, assert_same_structure, leaves, tensors
from conformance.kit.refusals import refused

_nested = each(lambda function: function.nested)
_flat = each(lambda function: not function.nested and not function.only)

_WALK = {"_flatten_state_dict", "_unflatten_state_dict", "_traverse_state_dict"}


def _leaves(function: Function) -> Leaves:
    """Leaves of the kinds that are found on another way, each with values of its own."""
    chosen = ["plain", "rows", "replica"]
    if "shards" in function.kinds():
        chosen.append("shards")
    return {kind: (kind, numbers(5, 3, salt=n)) for n, kind in enumerate(chosen)}


@pytest.mark.law("structure")
@pytest.mark.world(2, collective=8, limit=30)
@pytest.mark.parametrize("nests", ["optimizer", "others"])
@_nested
@pytest.mark.thorough(but=["others"])
def test_nested(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device, nests: str
) -> None:
    """Each leaf must come back under its own key, keys and containers of the types they had.

    Containers of the result are its own: what their owner does with them changes nothing else.
    """
    place = Place(world, mesh(2), subject, device)
    for name, nest in NESTS.items():
        if (name == "optimizer") == (nests == "optimizer"):
            call = function.call(place, _leaves(function), nest)
            given = [call.inputs, call.outputs]
            before = outline(given)
            got = call.run()
            assert outline(given) == before, f"{name}: the caller's own changed"
            try:
                call.check(got)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
            if function.name != "_traverse_state_dict":  # a visitor is handed the caller's own
                empty(got)
            assert outline(given) == before, f"{name}: a container of the result is the caller's"


@pytest.mark.law("structure")
@pytest.mark.world(2, collective=8, limit=30)
@each(lambda f: f.name in ("_broadcast_state_dict", "_distribute_state_dict"))
def test_numbers(function: Function, world: Any, subject: Any, device: torch.device) -> None:
    """A number must land under its own key, whatever the key's type."""
    judged = subject.function(f"_state_dict_utils.{function.name}")
    full = {key: number + 0.5 for number, key in enumerate(KEYS)}
    into = dict.fromkeys(KEYS, 0.0)
    judged(full if world.rank == 0 or not function.talks else {}, into, device)
    assert into == full, f"landed: {into}"


@pytest.mark.law("structure")
@pytest.mark.world(2, collective=8, limit=30)
@_flat
def test_flat(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device
) -> None:
    """Each key that a dict takes must get its own tensor, also where others are written alike."""
    kinds = ["plain", "rows"]
    leaves = {key: (kinds[n % 2], numbers(5, 3, salt=n)) for n, key in enumerate(KEYS)}
    call = function.call(Place(world, mesh(2), subject, device), leaves)
    call.check(call.run())


@pytest.mark.law("structure")
@pytest.mark.world(2)
@each(lambda function: function.nested and function.name not in _WALK)
def test_a_single_leaf(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device
) -> None:
    """A leaf in the place of a state dict must be treated as one in it."""
    place = Place(world, mesh(2), subject, device)
    for kind in ("plain", "rows", "Parameter"):
        call = function.call(place, {"w": (kind, numbers(5, 3))}, lambda flat: flat["w"])
        call.check(call.run())


def _nested_so_deep(levels: int, leaf: Any) -> Any:
    """Dicts in lists in dicts, each with a leaf before and one behind the next level."""
    value: Any = {"w": leaf + levels}
    for level in range(levels):
        around = (leaf + level, value, leaf - level)
        value = list(around) if level % 2 else dict(zip("wxy", around, strict=True))
    return {"root": value}


@pytest.mark.law("all-or-nothing")
@pytest.mark.world(1)
@each(lambda function: function.name in ("_copy_state_dict", "_iterate_state_dict"))
def test_too_deep(function: Function, subject: Any) -> None:
    """What is nested too deep for Python must be refused before anything was written."""
    judged = subject.function(f"_state_dict_utils.{function.name}")
    for levels in (100, 300, 450, 550, 700, 800, 900, 2000):
        value, into = (_nested_so_deep(levels, leaf) for leaf in (numbers(2), torch.zeros(2)))
        held = [tensor for _, tensor in _walk(into)]
        before = [tensor.clone() for tensor in held]
        wanted = before
        try:
            if function.name == "_copy_state_dict":
                judged(value, into)
            else:
                judged(value, *[lambda tensor, *_: tensor] * 3, companion_obj=into)
            wanted = [tensor for _, tensor in _walk(value)]
        except RecursionError:
            assert levels > 300, f"{levels} levels are too many"
        wrong = sum(not torch.equal(*pair) for pair in zip(held, wanted, strict=True))
        assert not wrong, f"{levels} levels: {wrong} of {len(held)} tensors are wrong"


def _walk(value: Any) -> Iterator[tuple[int, torch.Tensor]]:
    """The tensors of nested containers with their depth, found without a frame a level."""
    todo = [(0, value)]
    while todo:
        depth, item = todo.pop()
        if isinstance(item, torch.Tensor):
            yield depth, item
        else:
            below = item.values() if isinstance(item, dict) else item
            todo.extend((depth + 1, inner) for inner in below)


@pytest.mark.law("structure")
@pytest.mark.should("no caller is promised more than an error of some kind")
@pytest.mark.world(1)
@each(lambda function: function.name in ("_flatten_state_dict", "_traverse_state_dict"))
def test_no_state_dict(function: Function, subject: Any) -> None:
    """What is no container has no paths: it must be refused, and not taken for its rows."""
    judged = subject.function(f"_state_dict_utils.{function.name}")
    more = [lambda *_: None] if function.name == "_traverse_state_dict" else []
    for value in (numbers(2, 3), 3, None, "text"):
        refused(
            lambda value=value: judged(value, *more),  # type: ignore[misc]
            re.compile(type(value).__name__),
            what=repr(value),
        )


@pytest.mark.law("structure")
@pytest.mark.should(WORDS)
@pytest.mark.world(1)
@each(lambda f: f.nested and not f.talks and f.name != "_unflatten_state_dict")
def test_a_container_that_holds_itself(function: Function, mesh: Any, subject: Any) -> None:
    """It must be refused by path, and not run into the limit of recursion."""
    judged = subject.function(f"_state_dict_utils.{function.name}")
    given: dict[str, Any] = {
        "_copy_state_dict": lambda value: judged(value, dict(value)),
        "_check_state_dict_similarity": lambda value: judged(value, dict(value)),
        "_iterate_state_dict": lambda value: judged(value, *[lambda tensor, *_: tensor] * 3),
        "_traverse_state_dict": lambda value: judged(value, lambda *_: None),
    }
    call = given.get(function.name, judged)
    for name, value in rings(dtensor(numbers(4, 3), mesh(1), [S(0)])).items():
        refused(partial(call, value), "layer", what=name)


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherRings:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=30)
    def test_a_container_that_holds_itself(self, judged: Any, mesh: Any, world: Any) -> None:
        """One on any rank, or on all, must be refused by path on every rank."""
        leaf = dtensor(numbers(4, 3), mesh(2), [S(0)])
        for at in (0, 1, None):
            for name, value in rings(leaf).items():
                mine = value if at in (None, world.rank) else {"w": leaf, "layer": 3}
                call = partial(judged, mine)
                assert_raises_everywhere(world, call, "layer", name=f"{name}, {at}")


@pytest.mark.judges("_state_dict_utils._unflatten_state_dict")
class TestPickledMapping:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_as_it_was(self, judged: Any, subject: Any) -> None:
        """A mapping that was written and read again must lead back to the same containers."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        for name, nest in NESTS.items():
            value = nest({"a": numbers(3), "b": numbers(4, 3, salt=1)})
            flat, mapping = flatten(value)
            assert_same_structure(judged(flat, pickled(mapping)), value, name)
            twice = pickled(pickled(mapping))
            assert_same_structure(judged(flat, twice), value, f"{name}, read twice")
            assert dict(twice) == dict(mapping), f"{name}: the paths are others"


@pytest.mark.judges("_state_dict_utils._unflatten_state_dict")
class TestSeveralMappings:
    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_each_leads_back(self, judged: Any, subject: Any) -> None:
        """A mapping must lead back to its own state dict, whatever was flattened since."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        pair = {"a": numbers(3), "b": numbers(4, 3, salt=1)}
        values = {name: nest(pair) for name, nest in NESTS.items()}
        values |= {name: put(*pair.values()) for name, put in CONTAINERS.items()}
        values["empty"] = []
        values["the last"] = Pair(*pair.values())
        made = {name: flatten(value) for name, value in values.items()}
        for name, flat in made.items():
            for turn in range(2):
                assert_same_structure(judged(*flat), values[name], f"{name}, turn {turn}")


def _turned(value: Any) -> Any:
    """The same with the keys of each dict in the other order."""
    if type(value) is dict:
        return {key: _turned(item) for key, item in reversed(value.items())}
    return type(value)(map(_turned, value)) if type(value) in (list, tuple) else value


@pytest.mark.law("structure")
@pytest.mark.world(1)
@each(lambda function: function.name in ("_copy_state_dict", "_iterate_state_dict"))
def test_companions_in_another_order(function: Function, subject: Any) -> None:
    """Each leaf must find the companion under its own key, in whatever order these stand."""
    judged = subject.function(f"_state_dict_utils.{function.name}")
    for name in ("optimizer", "deep", "alike", "shared"):
        values = {key: torch.full((3,), float(n)) for n, key in enumerate("ab")}
        value = NESTS[name](values)
        into = _turned(NESTS[name]({key: torch.zeros(3) for key in values}))
        if function.name == "_copy_state_dict":
            judged(value, into)
        else:
            judged(value, *[lambda tensor, *_: tensor] * 3, companion_obj=into)
        wanted = tensors(value)
        for path, got in tensors(into).items():
            assert_same(got, wanted[path], f"{name}: {path}")


@pytest.mark.law("structure")
@pytest.mark.world(1)
@each(lambda function: function.name in ("_copy_state_dict", "_iterate_state_dict"))
def test_companions_under_tensors(function: Function, subject: Any) -> None:
    """A tensor must be a key by its identity, as in an optimizer's own `state`."""
    judged = subject.function(f"_state_dict_utils.{function.name}")
    keys = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    value = {"state": {key: {"moment": torch.full((3,), float(n))} for n, key in enumerate(keys)}}
    for order in (keys, keys[::-1]):
        into = {"state": {key: {"moment": torch.zeros(3)} for key in order}}
        if function.name == "_copy_state_dict":
            judged(value, into)
        else:
            judged(value, *[lambda tensor, *_: tensor] * 3, companion_obj=into)
        for number, key in enumerate(keys):
            assert_same(into["state"][key]["moment"], torch.full((3,), float(number)))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


EMPTY_AND_FULL: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "dict": ({}, lambda leaf: {"m": leaf}),
    "list": ([], lambda leaf: [leaf, leaf]),
    "deep": ({}, lambda leaf: {"m": {"n": [leaf]}}),
    "ordered": (OrderedDict(), lambda leaf: OrderedDict(m=leaf)),
    "tuple": ((), lambda leaf: (leaf,)),
}
"""Name -> what is empty in one state dict, and what the other has in its place."""


@pytest.mark.judges("_state_dict_utils._unflatten_state_dict")
class TestTwoFlatDictsInOne:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("name", EMPTY_AND_FULL)
    def test_what_is_empty_gives_way(self, judged: Any, subject: Any, name: str) -> None:
        """Of two state dicts in one, what is empty in one must have what the other holds.

        Who loads an optimizer's state merges the new optimizer's and the checkpoint's: one of them
        may have no state yet for a parameter, or a list in which nothing is.
        """
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        leaf = numbers(3)
        empty, full = EMPTY_AND_FULL[name]
        both = {"x": {"kept": leaf, "p": empty}}, {"x": {"p": full(leaf)}}
        for order in (both, both[::-1]):
            flat: dict[str, Any] = {}
            mapping: dict[str, Any] = {}
            for state in order:
                more, paths = flatten(state)
                flat |= {key: value for key, value in more.items() if key not in flat}
                mapping |= {key: path for key, path in paths.items() if key not in mapping}
            got = judged(flat, mapping)
            assert_same_structure(got["x"]["p"], full(leaf), f"{list(flat)}")
            assert got["x"]["kept"] is leaf, f"{list(flat)}"
        assert not empty, "the call changed the input"


@pytest.mark.judges("_state_dict_utils._unflatten_state_dict")
class TestPartOfAFlatDict:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_each_entry_at_its_own_path(self, judged: Any, subject: Any) -> None:
        """Whatever else of a flat dict is left out, each entry must land at its own path."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        for name, nest in NESTS.items():
            value = nest({"a": numbers(3), "b": numbers(4, 3, salt=1)})
            flat, mapping = flatten(value)
            full = [k for k, leaf in flat.items() if not isinstance(leaf, (Mapping, list, tuple))]
            paths = dict(zip(full, (path for path, _ in leaves(value)), strict=True))
            parts = [[key for key in full if key != out] for out in full] if len(full) > 1 else []
            for keys in (*parts, *([key] for key in full), sorted(full), full[::-1]):
                got = judged({key: flat[key] for key in keys}, mapping)
                for key in keys:
                    found = _at(got, paths[key])
                    assert found is flat[key], f"{name}: {paths[key]} of {len(keys)}: {found}"


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherKeysThatAreTensors:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2, collective=8, limit=30)
    def test_an_optimizers_own_state(self, judged: Any, mesh: Any, world: Any) -> None:
        """State under the parameters themselves, as an optimizer holds it, must be gathered."""
        line = mesh(2)
        fulls = [numbers(4, 3, salt=n) for n in range(3)]
        parameters = [KINDS["rows that train"].make(full, line) for full in fulls]
        state = {
            parameter: {"exp_avg": dtensor(full + 1, line, [S(0)])}
            for parameter, full in zip(parameters, fulls, strict=True)
        }
        got = judged({"state": state})["state"]
        assert list(map(id, got)) == list(map(id, parameters)), "the keys are others"
        for parameter, full in zip(parameters, fulls, strict=True):
            assert_same(got[parameter]["exp_avg"], full + 1)


@pytest.mark.law("structure")
@pytest.mark.world(2, collective=8, limit=30)
@_flat
def test_the_order_is_the_targets(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device
) -> None:
    """Keys must stay where they stood, in whatever order the full state dict has them."""
    judged = subject.function(f"_state_dict_utils.{function.name}")
    into: dict[str, Any] = {"z": 1, "rows": dtensor(torch.zeros(4, 2), mesh(2), [S(0)])}
    into |= {"not there": 2, "plain": torch.zeros(4, 2), "number": torch.tensor(0), "a": "text"}
    full: dict[str, Any] = {
        key: numbers(4, 2, salt=len(key)) if key in ("rows", "plain") else 3
        for key in ("plain", "a", "rows", "number", "z")
    }
    if function.name == "_broadcast_tensors":
        into = {key: value for key, value in into.items() if isinstance(value, torch.Tensor)}
        full |= {"number": torch.tensor(3)}
        full = {key: full[key] for key in full if key in into}
    order = list(into)
    if function.name == "_broadcast_tensors":
        info = subject.function("_state_dict_utils._TensorInfo")
        if world.rank:
            full = {key: info(value.shape, value.dtype) for key, value in full.items()}
        judged(full, into, list(full), device)
    elif function.talks:
        judged(full if world.rank == 0 else {}, into, device)
    else:
        judged(full, into, device)
    assert list(into) == order, f"keys {list(into)}, were {order}"
