"""The order of keys after flattening and the way back.

The flat dict decides: containers come in the order in which it names them, as upstream's do. So a
flat dict that was sorted, filtered or filled by another rank gives containers in that order, and
one that nobody has touched those of the original.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conformance.kit.data import numbers
from conformance.kit.generated import examples, state_dicts
from conformance.kit.nested import Pair, assert_same_structure, sample, with_metadata


def _orders(value: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], list[Any]]:
    """Path of each mapping -> its keys in order."""
    found = {}
    items: Any = ()
    if isinstance(value, dict):
        found[path] = list(value)
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    for key, item in items:
        found.update(_orders(item, (*path, key)))
    return found


def _nested() -> dict[str, Any]:
    return {
        "b": {"y": 1, "x": {"q": 2, "p": 3}},
        "a": [{"n": 4, "m": 5}, {"l": 6, "k": 7}],
        "c": OrderedDict([("s", 8), ("r", 9)]),
        "d": with_metadata(("u", numbers(2)), ("t", numbers(2, salt=1))),
        "e": (Pair({"w": 10, "v": 11}, 12), 13),
    }


@pytest.mark.judges("_state_dict_utils._unflatten_state_dict")
class TestUnflattenOrder:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_untouched(self, judged: Any, subject: Any) -> None:
        """A flat dict that nobody has touched must give the keys in their original order."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        for value in (_nested(), sample()):
            got = judged(*flatten(value))
            assert _orders(got) == _orders(value), f"keys {_orders(got)}"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_sorted(self, judged: Any, subject: Any) -> None:
        """A flat dict in another order must give every container in that order."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        flat, mapping = flatten(_nested())
        got = judged(dict(sorted(flat.items())), mapping)
        expected = {
            (): ["a", "b", "c", "d", "e"],
            ("a", 0): ["m", "n"],
            ("a", 1): ["k", "l"],
            ("b",): ["x", "y"],
            ("b", "x"): ["p", "q"],
            ("c",): ["r", "s"],
            ("d",): ["t", "u"],
            ("e", 0, 0): ["v", "w"],
        }
        assert _orders(got) == expected, f"keys {_orders(got)}, expected {expected}"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_reversed(self, judged: Any, subject: Any) -> None:
        """Containers that the flat dict enters and leaves again must keep the order of entry."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        flat, mapping = flatten({"a": {"x": 1, "y": 2}, "b": 3, "c": {"z": [4, {"q": 5, "p": 6}]}})
        keys = ["c.z.1.p", "a.y", "b", "c.z.0", "a.x", "c.z.1.q"]
        assert set(keys) == set(flat), f"flat keys {list(flat)}"
        got = judged({key: flat[key] for key in keys}, mapping)
        assert got == {"a": {"x": 1, "y": 2}, "b": 3, "c": {"z": [4, {"q": 5, "p": 6}]}}
        orders = _orders(got)
        expected = {
            (): ["c", "a", "b"],
            ("c",): ["z"],
            ("c", "z", 1): ["p", "q"],
            ("a",): ["y", "x"],
        }
        assert orders == expected, f"keys {orders}, expected {expected}"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_the_order_of_the_mapping_does_not_matter(self, judged: Any, subject: Any) -> None:
        """The mapping's own order, and keys of it that the flat dict lacks, must not show."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        flat, mapping = flatten({"a": {"x": 1, "y": 2, "z": 3}, "b": {"w": 4}})
        other = type(mapping)()
        other.update(dict(reversed(mapping.items())))
        kept = {key: flat[key] for key in ("a.z", "a.x")}
        got = judged(kept, other)
        assert _orders(got) == {(): ["a"], ("a",): ["z", "x"]}, f"keys {_orders(got)}"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_elements_of_a_sequence_stand_where_they_stood(self, judged: Any, subject: Any) -> None:
        """Elements of lists and tuples must keep their places, in whatever order they are named."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        value = {"l": [1, 2, [3, 4]], "t": (5, Pair(6, 7)), "w": numbers(3)}
        flat, mapping = flatten(value)
        got = judged(dict(reversed(flat.items())), mapping)
        assert list(got) == ["w", "t", "l"], f"keys {list(got)}"
        expected = {"w": value["w"], "t": value["t"], "l": value["l"]}
        assert_same_structure(got, expected)
        for order in permutations(name for name in flat if name.startswith("t")):
            again = judged({name: flat[name] for name in order}, mapping)
            assert_same_structure(again, {"t": value["t"]}, f"from {order}")

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_generated_state_dicts(self, judged: Any, subject: Any, world: Any) -> None:
        """Every generated dict, its flat dict in any order, must give equal containers so ordered.

        A container's keys come in the order in which the flat dict first names each of them.
        """
        flatten = subject.function("_state_dict_utils._flatten_state_dict")

        @examples(world.seed)
        @given(state_dicts(), st.randoms(use_true_random=False))
        def check(value: Any, random: Any) -> None:
            flat, mapping = flatten(value)
            keys = list(flat)
            random.shuffle(keys)
            got = judged({key: flat[key] for key in keys}, mapping)
            again, _ = flatten(got)
            if any(len(set(map(str, order))) < len(order) for order in _orders(value).values()):
                return  # 1 beside "1": the paths do not tell which of them a container is under
            first: dict[tuple[str, ...], list[str]] = {}
            for key in keys:
                path = tuple(map(str, mapping[key]))
                for depth, item in enumerate(path):
                    seen = first.setdefault(path[:depth], [])
                    if item not in seen:
                        seen.append(item)
            for at, order in _orders(got).items():
                names, wanted = list(map(str, order)), first.get(tuple(map(str, at)), [])
                assert names == wanted, f"{at}: keys {names}, expected {wanted} of {keys}"
            assert len(again) == len(flat), f"{len(again)} leaves, expected {len(flat)}"

        check()


@pytest.mark.judges("_state_dict_utils._flatten_state_dict")
class TestFlattenOrder:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_depth_first(self, judged: Any) -> None:
        """Flat keys must come in the order in which a walk meets the leaves, the very ones."""
        value = _nested()
        flat, mapping = judged(value)
        assert list(flat) == list(mapping), "the flat dict and the mapping differ in order"
        heads = list(dict.fromkeys(key.partition(".")[0] for key in flat))
        assert heads == list(value), f"top keys {heads}, expected {list(value)}"
        assert list(flat)[:3] == ["b.y", "b.x.q", "b.x.p"], f"flat keys {list(flat)}"
        tensors = [leaf for leaf in flat.values() if isinstance(leaf, torch.Tensor)]
        assert tensors[0] is value["d"]["u"], "a tensor is not the original"
