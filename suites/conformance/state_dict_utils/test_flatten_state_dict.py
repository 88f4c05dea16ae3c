"""Flattening nested state dicts and its way back."""

from __future__ import annotations

import re
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
from hypothesis import given

from conformance.kit.agree import attempt
from conformance.kit.cases import each, every_second
from conformance.kit.compare import assert_unchanged, fingerprint
from conformance.kit.containers import CONTAINERS, READ_ONLY, Settings, dashed
from conformance.kit.data import numbers
from conformance.kit.generated import examples, state_dicts
from conformance.kit.layouts import S, dtensor, rows, sharded_tensor
from conformance.kit.levels import EXOTIC
from conformance.kit.nested import (
    assert_same_structure,
    leaves,
    sample,
    with_metadata,
)
from conformance.kit.refusals import MISSING, assert_refusal, refused

EVERY = CONTAINERS | READ_ONLY
UNFLATTEN = "_state_dict_utils._unflatten_state_dict"


LOOK_ALIKE: dict[str, dict[Any, Any]] = {
    "dotted key before dict": {"a.b": 1, "a": {"b": 2}},
    "dict before dotted key": {"a": {"b": 1}, "a.b": 2},
    "list": {"a": [1], "a.0": 2},
    "int and str": {1: "int", "1": "str"},
    "int and str below": {"a": {0: 1, "0": 2}},
    "None and str": {None: 1, "None": 2},
    "bool and str": {True: 1, "True": 2},
    "three ways": {"a": {"b.c": 1}, "a.b": {"c": 2}, "a.b.c": 3},
    "empty keys": {"": {"": 1}, ".": 2},
    "backslash": {"a\\.b": 1, "a.b": 2, "a": {"b": 3}},
}
"""Legal dicts in which a joined path is met twice."""


class Nameless:
    """A key that looks like every other of its class."""

    def __str__(self) -> str:
        return "nameless"

    __repr__ = __str__


@pytest.mark.judges("_state_dict_utils._flatten_state_dict")
class TestFlattenStateDict:
    @pytest.mark.law("structure")
    @pytest.mark.should("upstream refuses keys of one spelling")
    @pytest.mark.world(1)
    def test_an_element_of_a_list_keeps_its_name(self, judged: Any) -> None:
        """Of two entries of one spelling the dotted key is escaped, the list's element is not."""
        flat, _ = judged({"a.0": 1, "a": [2]})
        assert list(flat.values()) == [1, 2], f"{flat}"
        assert flat["a.0"] == 2, f"{flat}"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_keys_are_dotted_paths(self, judged: Any) -> None:
        """Keys of the flat dict are the paths of the leaves, joined by dots, in order."""
        weight, step = numbers(2, 3), numbers()
        given_dict = {
            "model": with_metadata(("layers.0.weight", weight), ("layers.0.bias", None)),
            "optim": {"state": {"w": {"step": step}}, "groups": [{"lr": 0.5}, (1, [2])]},
            "epoch": 3,
        }
        flat, mapping = judged(given_dict)
        expected = [
            ("model.layers.0.weight", weight),
            ("model.layers.0.bias", None),
            ("optim.state.w.step", step),
            ("optim.groups.0.lr", 0.5),
            ("optim.groups.1.0", 1),
            ("optim.groups.1.1.0", 2),
            ("epoch", 3),
        ]
        assert list(flat) == [key for key, _ in expected]
        for key, value in expected:
            assert flat[key] is value, f"{key} is not the leaf itself but {flat[key]!r}"
        assert list(mapping) == list(flat)
        paths = {key: tuple(path) for key, path in mapping.items()}
        assert paths["model.layers.0.weight"] == ("model", "layers.0.weight")
        assert paths["optim.groups.1.1.0"] == ("optim", "groups", 1, 1, 0)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_tensors_are_leaves(self, judged: Any, mesh: Any) -> None:
        """Tensors of every kind, strings, bytes and sets are leaves, handed on as they are."""
        full = numbers(4, 2)
        held = {
            "tensor": full,
            "dtensor": dtensor(full, mesh(1), [S(0)]),
            "sharded": sharded_tensor(full, rows(full.shape, [2, 2], [0, 0])),
            "text": "text",
            "bytes": b"bytes",
            "set": {1, 2},
        }
        flat, _ = judged({"x": held})
        assert list(flat) == [f"x.{name}" for name in held]
        for name, value in held.items():
            assert flat[f"x.{name}"] is value, f"{name} is not the leaf itself"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_ties_stay(self, judged: Any) -> None:
        """A tensor that stands at two paths is the same object under both flat keys."""
        shared = numbers(3)
        flat, _ = judged({"a": {"x": shared}, "b": [shared]})
        assert flat["a.x"] is shared
        assert flat["b.0"] is shared

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_paths_that_look_alike_are_told_apart(self, judged: Any) -> None:
        """A legal dict is never refused as a collision: each leaf has a flat key of its own."""

        def flatten(name: str) -> None:
            flat, mapping = judged(LOOK_ALIKE[name])
            expected = sorted(str(leaf) for _, leaf in leaves(LOOK_ALIKE[name]))
            assert sorted(map(str, flat.values())) == expected, f"{flat} holds not the leaves"
            assert set(mapping) == set(flat)

        each(LOOK_ALIKE, flatten)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_a_collision_is_refused_by_name(self, judged: Any, subject: Any) -> None:
        """Keys that cannot be told apart are refused by name; none is lost in silence."""
        value = {"here": {Nameless(): 1, Nameless(): 2}}
        error = attempt(lambda: judged(value))
        if error is None:
            back = subject.function(UNFLATTEN)(*judged(value))
            assert_same_structure(back, value)
        else:
            assert_refusal(error, "here", "nameless", kinds=(ValueError,))

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_the_input_stays_as_it_was(self, judged: Any) -> None:
        """The nested dict is not changed, nor does a change of the flat dict reach it."""
        value = sample()
        before = fingerprint(value)
        flat, mapping = judged(value)
        again, same = judged(value)
        assert list(flat) == list(again), "a second call gives other keys"
        assert dict(mapping) == dict(same), "a second call gives other paths"
        flat.clear()
        assert_unchanged(value, before)


@pytest.mark.judges("_state_dict_utils._unflatten_state_dict")
class TestUnflattenStateDict:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("name", EVERY, ids=dashed)
    @every_second([dashed(name) for name in EVERY])
    def test_every_container_comes_back(self, judged: Any, subject: Any, name: str) -> None:
        """unflatten(flatten(x)) equals x, types and keys included, for every container."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        value = EVERY[name](numbers(2, 3), numbers(3, salt=1))
        if isinstance(value, Mapping):
            assert_same_structure(judged(*flatten(value)), value, f"{name} as the root")
        nested = {"before": 1, "here": value, "after": [{"deep": value}]}
        assert_same_structure(judged(*flatten(nested)), nested, name)

    @pytest.mark.law("structure")
    @pytest.mark.should(EXOTIC)
    @pytest.mark.world(1)
    def test_every_container_comes_back_as_the_root(self, judged: Any, subject: Any) -> None:
        """What is no dict comes back as well."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")

        def round_trip(name: str) -> None:
            value = CONTAINERS[name](1, [2])
            assert_same_structure(judged(*flatten(value)), value)

        each(CONTAINERS, round_trip)

    @pytest.mark.law("structure")
    @pytest.mark.should(EXOTIC)
    @pytest.mark.world(1)
    def test_attributes_of_containers_come_back(self, judged: Any, subject: Any) -> None:
        """A defaultdict keeps its factory, a dict of somebody's own type its attributes."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        default: Any = defaultdict(list, {"a": 1})
        settings = Settings(a=1)
        settings.source = "command line"
        value = {"default": default, "settings": settings}
        back = judged(*flatten(value))
        assert_same_structure(back, value)
        assert back["default"].default_factory is list
        assert back["settings"].source == "command line"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("root", [{}, with_metadata(version=4)], ids=["dict", "_metadata"])
    def test_an_empty_state_dict_comes_back(self, judged: Any, subject: Any, root: Any) -> None:
        """An empty state dict comes back empty, its type and `_metadata` kept."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        assert_same_structure(judged(*flatten(root)), root)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_a_whole_state_dict_comes_back(self, judged: Any, subject: Any) -> None:
        """A model's and an optimizer's state come back with each tensor the same object."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        value = sample()
        back = judged(*flatten(value))
        assert_same_structure(back, value)
        for (path, ours), (_, theirs) in zip(leaves(back), leaves(value), strict=True):
            assert ours is theirs or ours == theirs, f"{path}: not the same leaf"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_deep_nesting_comes_back(self, judged: Any, subject: Any) -> None:
        """A hundred levels of dicts and lists come back."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        value: Any = 1
        for level in range(100):
            value = {"key": value, "level": level} if level % 2 else [value, level]
        value = {"root": value}
        assert_same_structure(judged(*flatten(value)), value)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_generated_state_dicts_come_back(self, judged: Any, subject: Any, world: Any) -> None:
        """unflatten(flatten(x)) equals x for generated x: types, key order, ties, bits."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")

        @examples(world.seed, 60)
        @given(state_dicts())
        def round_trip(value: Any) -> None:
            before = fingerprint(value)
            assert_same_structure(judged(*flatten(value)), value)
            assert_unchanged(value, before)

        round_trip()

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_other_values_find_their_places(self, judged: Any, subject: Any) -> None:
        """Values that were loaded under the flat keys, in any order, land at their paths."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        value = {"a": {"b": 1, "c.d": 2}, "l": [3, {"x": 4, "y": 5}, 6]}
        flat, mapping = flatten(value)
        loaded = {key: flat[key] * 10 for key in reversed(flat)}
        expected = {"a": {"b": 10, "c.d": 20}, "l": [30, {"x": 40, "y": 50}, 60]}
        assert judged(loaded, mapping) == expected

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_plain_paths_are_understood(self, judged: Any) -> None:
        """A mapping of plain tuples makes dicts where a str follows and lists where an int does."""
        mapping = {"a.b": ("a", "b"), "a.l.0": ("a", "l", 0), "a.l.1.x": ("a", "l", 1, "x")}
        got = judged({"a.b": 1, "a.l.0": 2, "a.l.1.x": 3}, mapping)
        assert_same_structure(got, {"a": {"b": 1, "l": [2, {"x": 3}]}})

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_results_are_apart(self, judged: Any, subject: Any) -> None:
        """Containers of the result are new: filling them changes nothing else."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        value = {"d": {"x": 1}, "l": [1, {"y": 2}]}
        before = fingerprint(value)
        flat, mapping = flatten(value)
        keys, paths = list(flat), dict(mapping)
        first = judged(flat, mapping)
        first["d"]["new"] = first["l"][1]["new"] = 1
        first["l"].append(2)
        assert fingerprint(value) == before, "the original was changed through the result"
        assert list(flat) == keys, "the flat dict was changed"
        assert dict(mapping) == paths, "the mapping was changed"
        assert_same_structure(judged(flat, mapping), value, "second call")

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_empty_results_are_apart(self, judged: Any, subject: Any) -> None:
        """Empty containers and `_metadata` of the result are its own, too."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        value = {"d": {}, "l": [1, []], "o": with_metadata(("x", 1)), "e": with_metadata()}
        before = fingerprint(value)
        flat, mapping = flatten(value)
        first = judged(flat, mapping)
        assert_same_structure(first, value)
        first["d"]["new"] = first["e"]["new"] = 1
        first["l"][1].append(2)
        first["o"]._metadata["new"] = first["e"]._metadata["new"] = 1
        assert fingerprint(value) == before, "the original was changed through the result"
        assert_same_structure(judged(flat, mapping), value, "second call")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(1)
    def test_a_key_without_path_is_named(self, judged: Any, subject: Any) -> None:
        """A flat key that the mapping lacks is an error that names it."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        _, mapping = flatten({"a": {"b": 1}})
        flat = {"a.b": 1, "a.stranger": 2}
        refused(lambda: judged(flat, mapping), "a.stranger", kinds=MISSING)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(1)
    def test_a_place_that_is_a_leaf_and_a_container(self, judged: Any, subject: Any) -> None:
        """A place that paths make a leaf and a container is an error that names it, in any order.

        Paths are plain, or those of two state dicts flattened one by one.
        """
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        for leaf in (1, numbers(3), None, "text"):
            for below in ({"b": 2}, {1: 2}, [2], {"b": {"c": 2}}):
                flat, paths = flatten({"w": {"a": leaf}})
                deep, deep_paths = flatten({"w": {"a": below}})
                plain: dict[str, Any] = {"w.a": ("w", "a"), "w.a.b": ("w", "a", "b")}
                cases = [(flat | deep, paths | deep_paths), ({"w.a": leaf, "w.a.b": 2}, plain)]
                for whole, mapping in cases:
                    for order in (list(whole), list(whole)[::-1]):
                        refused(
                            partial(
                                judged,
                                {key: whole[key] for key in order},
                                {key: mapping[key] for key in order},
                            ),
                            re.compile(r"w\W+a"),
                            what=f"{leaf} {below} {order}",
                        )

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_containers_whose_keys_look_alike(self, judged: Any, subject: Any) -> None:
        """Containers under keys of one spelling, at any depth, stay apart."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        groups: list[list[Any]] = [[0, "0", (0,), "(0,)"], [None, "None"], [1.5, "1.5"]]
        for keys in groups:
            distinct = {key: {"x": n, "y": {"z": n}} for n, key in enumerate(keys)}
            for value in (distinct, {"a": distinct}, {"a": {"b": distinct, "c": {"x": 8}}}):
                assert_same_structure(judged(*flatten(value)), value, str(keys))

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("typed", [False, True], ids=["plain", "typed"])
    def test_a_path_through_a_leaf_is_refused(self, judged: Any, subject: Any, typed: bool) -> None:
        """A path that leads through the leaf of another must be refused by name, in any order."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        leaf: dict[str, Any] = {"a": {"b": 1}}
        inner: dict[str, Any] = {"a": {"b": {"c": {"d": 2}}}}
        if typed:  # what more than dicts with str keys and lists makes of a path
            leaf, inner = ({"a": OrderedDict(v["a"])} for v in (leaf, inner))
        flats, mappings = zip(*[flatten(value) for value in (leaf, inner)], strict=True)
        for order in (1, -1):
            flat = {key: value for some in flats[::order] for key, value in some.items()}
            mapping = {key: path for some in mappings for key, path in some.items()}
            refused(partial(judged, flat, mapping), "b", kinds=MISSING, what=f"{flat}")
            # A loaded leaf may be a dict itself.
            flat["a.b"] = {"other": 1}
            refused(partial(judged, flat, mapping), "b", kinds=MISSING, what=f"{flat}")

    @pytest.mark.law("structure")
    @pytest.mark.should(EXOTIC)
    @pytest.mark.world(1)
    def test_plain_paths_beside_those_of_a_flattening(self, judged: Any, subject: Any) -> None:
        """Where a plain path says less of a container than another, what is known counts."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        value = {"a": with_metadata(("x", 1), version=2), "l": (1, 2)}
        flat, mapping = flatten(value)
        more: dict[str, Any] = {"y": ("a", "y"), "z": ("l", 2)}
        expected = {"a": with_metadata(("x", 1), ("y", 9), version=2), "l": (1, 2, 9)}
        paths = dict(mapping) | more
        assert_same_structure(judged(flat | {"y": 9, "z": 9}, paths), expected, "last")
        first = judged({"y": 9} | flat, paths)
        assert type(first["a"]) is OrderedDict, f"a {type(first['a']).__name__}"
        assert dict(first["a"]) == {"y": 9, "x": 1}
