"""Generated examples depend on the seed alone: all ranks of a check have to draw the same."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance.kit.generated import drawn, examples

CONSTANT = 987_654_321_012_345


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module is loaded that no other rank knows, full of one number."""
    (tmp_path / "of_one_rank.py").write_text(f"NUMBER = {CONSTANT}\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("of_one_rank")
    yield
    del sys.modules["of_one_rank"]


@pytest.mark.usefixtures("loaded")
def test_no_loaded_module_has_a_say() -> None:
    assert CONSTANT not in drawn(st.integers(), 300, seed=1)
    seen: list[int] = []

    @examples(seed=1, count=300)
    @given(st.integers())
    def one(value: int) -> None:
        seen.append(value)

    one()
    assert len(seen) > 200
    assert CONSTANT not in seen
