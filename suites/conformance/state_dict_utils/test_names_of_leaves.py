"""Keys that look like the path of another leaf, or like no name at all: each leaf stays itself.

An implementation that knows leaves by names made of their paths has to make names that differ:
``{"a[0]": x, "a": [y]}`` and ``{"": [x], 0: y}`` hold two leaves each, and ``""`` is a key as any
other.
"""

from __future__ import annotations

from typing import Any

import pytest

from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.layouts import S, dtensor


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherTellsLeavesApart:
    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_keys_that_look_like_paths(self, judged: Any, mesh: Any) -> None:
        """Leaves whose paths can be written alike must each get their own values."""
        first, second = numbers(4, 3, salt=1), numbers(4, 3, salt=2)

        def pair() -> Any:
            return tuple(dtensor(full, mesh(2), [S(0)]) for full in (first, second))

        x, y = pair()
        got = judged({"a[0]": x, "a": [y]})
        assert_same(got["a[0]"], first, "a[0]")
        assert_same(got["a"][0], second, "a, element 0")
        got = judged({"['a']": x, ("a",): y})
        assert_same(got["['a']"], first, "['a']")
        assert_same(got["a",], second, "('a',)")
        got = judged({"": [x, "text"], 0: y, 1: None})
        assert_same(got[""][0], first, "'', element 0")
        assert_same(got[0], second, "0")
        assert got[""][1] == "text", f"got {got[''][1]!r}, expected 'text'"
        assert got[1] is None, f"got {got[1]!r}, expected None"

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("keys", [("", "a"), ("a", "")], ids=["empty first", "empty last"])
    @pytest.mark.thorough(but=["empty first"])
    def test_an_empty_key_of_a_tied_tensor(self, judged: Any, mesh: Any, keys: Any) -> None:
        """A tensor of which one rank has nothing must be whole under "" and another key."""
        full = numbers(1, 2)
        got = judged(dict.fromkeys(keys, dtensor(full, mesh(2), [S(0)])))
        for key in keys:
            assert_same(got[key], full, repr(key))
