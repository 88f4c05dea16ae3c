"""The walk to the leaves, and setting one element at the end of a path."""

from __future__ import annotations

import re
from collections import UserDict
from types import MappingProxyType
from typing import Any

import pytest

from conformance.kit.agree import attempt
from conformance.kit.cases import each
from conformance.kit.compare import assert_unchanged, fingerprint
from conformance.kit.data import numbers
from conformance.kit.layouts import S, dtensor, rows, sharded_tensor
from conformance.kit.nested import Pair, assert_same_structure, sample, with_metadata
from conformance.kit.refusals import MISSING, assert_refusal


def visited(traverse: Any, value: Any) -> list[tuple[Any, Any]]:
    """What the visitor is called with, in order."""
    calls: list[tuple[Any, Any]] = []
    traverse(value, lambda path, leaf: calls.append((path, leaf)))
    return calls


@pytest.mark.judges("_state_dict_utils._traverse_state_dict")
class TestTraverseStateDict:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_each_leaf_is_visited_with_its_path(self, judged: Any) -> None:
        """Each leaf is visited once, in order, with a path of str keys and int indices."""
        weight, step = numbers(2, 3), numbers()
        value = {
            "model": with_metadata(("layer.weight", weight), ("layer.bias", None)),
            "optim": {"groups": [{"lr": 0.5, "betas": (0.5, 0.75)}], "step": step},
            "pair": Pair(1, [2]),
            "epoch": 3,
        }
        expected = [
            (("model", "layer.weight"), weight),
            (("model", "layer.bias"), None),
            (("optim", "groups", 0, "lr"), 0.5),
            (("optim", "groups", 0, "betas", 0), 0.5),
            (("optim", "groups", 0, "betas", 1), 0.75),
            (("optim", "step"), step),
            (("pair", 0), 1),
            (("pair", 1, 0), 2),
            (("epoch",), 3),
        ]
        calls = visited(judged, value)
        assert [path for path, _ in calls] == [path for path, _ in expected]
        for (path, got), (_, leaf) in zip(calls, expected, strict=True):
            assert got is leaf, f"{path}: visited {got!r}, not the leaf itself"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_every_mapping_is_walked(self, judged: Any) -> None:
        """The walk goes into every Mapping, not into dicts alone."""
        calls = visited(
            judged, {"user": UserDict({"x": 1}), "proxy": MappingProxyType({"y": {"z": 2}})}
        )
        assert calls == [(("user", "x"), 1), (("proxy", "y", "z"), 2)]

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_tensors_and_other_values_are_leaves(self, judged: Any, mesh: Any) -> None:
        """Tensors of every kind, strings, bytes and sets are leaves."""
        full = numbers(4, 2)
        held = {
            "tensor": full,
            "dtensor": dtensor(full, mesh(1), [S(0)]),
            "sharded": sharded_tensor(full, rows(full.shape, [2, 2], [0, 0])),
            "text": "text",
            "bytes": b"bytes",
            "set": {1, 2},
        }
        calls = visited(judged, held)
        assert [path for path, _ in calls] == [(name,) for name in held]
        for (path, got), leaf in zip(calls, held.values(), strict=True):
            assert got is leaf, f"{path}: not the leaf itself"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_a_leaf_at_two_paths_is_visited_at_both(self, judged: Any) -> None:
        """Tied tensors, and containers that stand at two places, are visited at each place."""
        tied, twice = numbers(3), {"x": 1}
        calls = visited(judged, {"a": tied, "b": [tied], "c": twice, "d": [twice, twice]})
        assert [path for path, _ in calls] == [
            ("a",), ("b", 0), ("c", "x"), ("d", 0, "x"), ("d", 1, "x"),
        ]  # fmt: skip
        assert calls[1][1] is tied

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_the_input_stays_as_it_was(self, judged: Any) -> None:
        """The walk changes nothing, and a second one visits the same."""
        value = sample()
        before = fingerprint(value)
        first = visited(judged, value)
        assert_unchanged(value, before)
        again = visited(judged, value)
        assert [path for path, _ in first] == [path for path, _ in again]

    @pytest.mark.law("symmetry")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("kind", [LookupError, StopIteration, KeyboardInterrupt])
    def test_an_error_of_the_visitor_gets_through(
        self, judged: Any, kind: type[BaseException]
    ) -> None:
        """What the visitor raises reaches the caller as it is, and the walk ends there."""
        seen: list[Any] = []

        def visit(path: Any, leaf: Any) -> None:
            seen.append(leaf)
            if leaf == 2:
                raise kind("two")

        with pytest.raises(kind, match="two"):
            judged({"a": 1, "b": [2, 3], "c": 4}, visit)
        assert seen == [1, 2]


SET: dict[str, tuple[Any, tuple[Any, ...], Any]] = {
    "new key": ({}, ("a",), {"a": 9}),
    "other key": ({"a": 1}, ("a",), {"a": 9}),
    "beside others": ({"a": {"x": 1}, "b": 2}, ("a", "y"), {"a": {"x": 1, "y": 9}, "b": 2}),
    "new dicts": ({}, ("a", "b", "c"), {"a": {"b": {"c": 9}}}),
    "new list": ({}, ("a", 0), {"a": [9]}),
    "list with gap": ({}, ("a", 2), {"a": [None, None, 9]}),
    "list grows": ({"a": [1]}, ("a", 2), {"a": [1, None, 9]}),
    "in list": ({"a": [1, 2, 3]}, ("a", 1), {"a": [1, 9, 3]}),
    "dict in list": ({}, ("a", 1, "b"), {"a": [None, {"b": 9}]}),
    "list in list": ({}, ("a", 1, 0), {"a": [None, [9]]}),
    "dict in gap": ({"a": [None, 2]}, ("a", 0, "b"), {"a": [{"b": 9}, 2]}),
    "dict in list that is there": ({"a": [{"x": 1}]}, ("a", 0, "b"), {"a": [{"x": 1, "b": 9}]}),
    "dotted key": ({}, ("a.b", "c.d"), {"a.b": {"c.d": 9}}),
    "OrderedDict": (with_metadata(("x", 1)), ("y",), with_metadata(("x", 1), ("y", 9))),
    "OrderedDict below": (
        {"o": with_metadata(("x", 1))}, ("o", "y"), {"o": with_metadata(("x", 1), ("y", 9))},
    ),
    "OrderedDict in a list": (
        [with_metadata(("x", 1))], (0, "y"), [with_metadata(("x", 1), ("y", 9))],
    ),
    "from the end": ({"a": [1, 2]}, ("a", -2), {"a": [9, 2]}),
    "from the end on the way": ({"a": [{"x": 1}]}, ("a", -1, "x"), {"a": [{"x": 9}]}),
}  # fmt: skip
"""Name to (root, path, the root once 9 is set there)."""

REFUSED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "through a number": ({"first": 1}, ("first", "second", "third")),
    "through a tensor": ({"first": numbers(3)}, ("first", "second", "third")),
    "into a tuple": ({"first": (1, 2)}, ("first", 0)),
    "negative index": ({"x": 1}, ("first", -1)),
    "negative index below": ({"first": {"x": 1}}, ("first", "second", "third", -1)),
    "negative index on the way": ({"x": 1}, ("first", -1, "second")),
    "index of a list grown": ({"first": [1]}, ("first", 3, -1)),
    "negative index of a list": ({"first": [1]}, ("first", -2)),
    "negative index of a list on the way": ({"first": [1]}, ("first", -2, "second")),
    "through a None": ({"first": None}, ("first", "second")),
    "through a None below": ({"first": {"x": None}}, ("first", "x", 0)),
    "str for a list": ({"first": [1]}, ("first", "second")),
    "str for a list on the way": ({"first": [1]}, ("first", "second", "third")),
    "index before a list": ({"first": [1]}, ("first", -2)),
    "index before a list on the way": ({"first": [1]}, ("first", -2, "third")),
    "into a read-only mapping": (MappingProxyType({"x": 1}), ("first",)),
    "through a read-only mapping": ({"first": MappingProxyType({"x": 1})}, ("first", "second")),
    "no path": ({"first": [1]}, ()),
}
"""Name to (root, path) where nothing can be set."""


@pytest.mark.judges("_state_dict_utils._set_element")
class TestSetElement:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_the_value_lands_at_its_path(self, judged: Any) -> None:
        """The value is set at the path; missing containers are made, others stay as they are."""

        def place(name: str) -> None:
            root, path, expected = SET[name]
            judged(root, path, 9)
            assert_same_structure(root, expected, name)

        each(SET, place)

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_only_the_path_changes(self, judged: Any) -> None:
        """Containers on the way are kept, not copied, and the value is set as it is."""
        inner: dict[str, Any] = {"x": [1]}
        root = {"a": inner, "b": numbers(3)}
        before = fingerprint(root["b"])
        value = [numbers(2)]
        judged(root, ("a", "y"), value)
        assert root["a"] is inner
        assert inner["y"] is value
        assert_unchanged(root["b"], before)

    @pytest.mark.law("all-or-nothing")
    @pytest.mark.world(1)
    def test_after_an_error_nothing_is_set(self, judged: Any) -> None:
        """Where nothing can be set, the error leaves the root as it was."""

        def refuse(name: str) -> None:
            root, path = REFUSED[name]
            before = fingerprint(root)
            error = attempt(lambda: judged(root, path, 9))
            assert fingerprint(root) == before, f"{name}: after {error!r} the root is {root}"
            words = [rf"\b{s}\b" if isinstance(s, str) else str(s) for s in path] or ["path"]
            step = re.compile("|".join(words))
            assert_refusal(error, step, kinds=MISSING, what=f"{name}: {path} of {root}")

        each(REFUSED, refuse)
