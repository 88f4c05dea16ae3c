"""Goals are held against measurements that exist, and a miss without a reason is not hidden."""

from __future__ import annotations

import pytest

from benchmarks import goals
from benchmarks.goals import GOALS, Goal
from benchmarks.listing import benchmarks
from benchmarks.settings import FLOOR, REFERENCE, TORCH


@pytest.mark.parametrize("goal", GOALS, ids=lambda g: f"{g.benchmark}-{g.regime}")
def test_a_goal_is_of_a_measurement(goal: Goal) -> None:
    known = {type(b).__name__: b for b in benchmarks()}
    assert goal.regime in known[goal.benchmark].regimes
    assert goal.size in known[goal.benchmark].sizes


@pytest.mark.parametrize(
    ("ours", "torch", "missed"),
    [(1.5, 2.0, []), (1.71, 4.0, ["floor"]), (1.5, 1.4, ["torch"]), (2.0, 1.9, ["floor", "torch"])],
)
def test_each_limit_is_kept_or_missed(ours: float, torch: float, missed: list[str]) -> None:
    goal = Goal("AnyBenchmark", "many", 4, floor=1.5, per_tensor=100, torch=1)
    times = {REFERENCE: ours, TORCH: torch, FLOOR: 1.0}
    reached = goal.reached(times, tensors=2000)
    assert [limit for limit, kept in reached.items() if not kept] == missed


def test_a_miss_without_a_reason_fails() -> None:
    times = {REFERENCE: 3.0, TORCH: 2.0, FLOOR: 1.0}
    goal = Goal("AnyBenchmark", "many", 4, floor=1.3, per_tensor=0, torch=1)
    row, fine = goals._row(goal, times, 10)
    assert not fine
    assert "slower than torch" in row
    assert "no reason recorded" in row
    row, fine = goals._row(goal._replace(why="because"), times, 10)
    assert fine
    assert "because" in row
