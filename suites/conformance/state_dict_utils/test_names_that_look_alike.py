"""Keys with dots and backslashes: each leaf has a flat name of its own, and leads back."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

_KEYS = ["a", "b", "a.b", "a\\", "a\\.b", "\\", "\\\\", ".", "", "a\\\\"]
_BELOW = ["b", "", ".", "\\", "\\b"]
PATHS = [(key,) for key in _KEYS] + [(key, below) for key in _KEYS for below in _BELOW]


def _nested(paths: tuple[tuple[str, ...], ...]) -> dict[str, Any] | None:
    """Each path's number at its place; None where one leads through another."""
    found: dict[str, Any] = {}
    for number, (key, *below) in enumerate(paths):
        if below and isinstance(inner := found.setdefault(key, {}), dict):
            inner[below[0]] = number
        elif below or key in found:
            return None
        else:
            found[key] = number
    return found


@pytest.mark.judges("_state_dict_utils._flatten_state_dict")
class TestFlattenNamesThatLookAlike:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.thorough)])
    def test_each_has_its_own(self, judged: Any, subject: Any, count: int) -> None:
        """Keys that look like the paths of other leaves must have their own names and lead back."""
        unflatten = subject.function("_state_dict_utils._unflatten_state_dict")
        for paths in combinations(PATHS, count):
            value = _nested(paths)
            if value is None:
                continue
            flat, mapping = judged(value)
            assert sorted(flat.values()) == list(range(count)), f"{value} became {flat}"
            assert unflatten(flat, mapping) == value, f"{value} came back otherwise from {flat}"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_three_that_meet(self, judged: Any, subject: Any) -> None:
        """A dotted key, a path that looks like it and a key with a backslash must stay apart."""
        unflatten = subject.function("_state_dict_utils._unflatten_state_dict")
        for odd in ("a\\", "a\\\\", "a\\.b", "\\a"):
            value: dict[str, Any] = {"a.b": 0, "a": {"b": 1}, odd: {"b": 2}}
            flat, mapping = judged(value)
            assert sorted(flat.values()) == [0, 1, 2], f"{value} became {flat}"
            assert unflatten(flat, mapping) == value, f"{value} came back otherwise from {flat}"
