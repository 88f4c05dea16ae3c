"""The cost model holds: counted bytes and collectives lie within its formulas."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import cost_model
from benchmarks.results.baseline import FILE
from benchmarks.settings import Leaf, leaves

COUNTS: dict[str, Any] = json.loads(FILE.read_text())["counts"]
ROWS = [
    *[("GatherStateDict", r, n) for r in ("many", "model", "large") for n in (2, 4)],
    *[("BroadcastStateDict", r, n) for r in ("many", "model", "large") for n in (2, 4)],
    *[("DistributeStateDict", r, n) for r in ("many", "model", "large") for n in (2, 4)],
    ("GatherAtScale", "scale", 8),
    ("GatherAtScale", "scale", 512),
]
_FORMULAS: dict[str, Callable[[Sequence[Leaf], int], cost_model.Cost]] = {
    "Gather": cost_model.gather,
    "Broadca": cost_model.broadcast,
    "Distrib": cost_model.distribute,
}


@pytest.mark.parametrize(("name", "regime", "n"), ROWS)
def test_counts_lie_within_the_formulas(name: str, regime: str, n: int) -> None:
    """The payload is a lower limit, payload and overhead an upper one; so are the collectives."""
    counted = COUNTS[f"{name} {regime} x{n}"]
    formula = next(f for prefix, f in _FORMULAS.items() if name.startswith(prefix))
    stated = formula(leaves(regime, quick=True), n)
    assert stated.payload <= counted["received"] <= stated.received
    assert counted["collectives"] <= stated.collectives


def test_a_call_that_moves_everything_twice_is_outside() -> None:
    """The limits are tight enough to tell M from 2 M, and one collective a tensor."""
    model = leaves("many", quick=True)
    stated = cost_model.gather(model, 4)
    assert stated.received < 2 * stated.payload
    assert stated.collectives < len(model)


def test_the_example_of_the_document() -> None:
    """COST.md shows what its example prints."""
    text = (Path(__file__).parent / "COST.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (shown,) = re.findall(r"```text\n(.*?)```", text, re.S)
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=Path(__file__).parents[1],
    )
    assert ran.stdout == shown


def test_parts_of_a_leaf() -> None:
    assert Leaf("a", (8, 8), placement="S0").parts(4) == 4
    assert Leaf("a", (8, 8), placement="R").parts(4) == 1
    assert Leaf("a", (8, 8), placement="S0-R").parts(8) == 4
    assert Leaf("a", (8, 8), placement="S0-S1").parts(8) == 8
