"""Goals are held against measurements that exist, and a miss without a reason is not hidden."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.listing import benchmarks
from benchmarks.results import goals, table
from benchmarks.results.goals import GOALS, Goal, reached
from benchmarks.settings import FLOOR, REFERENCE, TORCH, Settings

HERE = Path(__file__).parent
KEPT = HERE / "goals.jsonl"


@pytest.mark.parametrize("goal", GOALS, ids=lambda g: f"{g.benchmark}-{g.regime}")
def test_a_goal_is_of_a_measurement(goal: Goal) -> None:
    known = {type(b).__name__: b for b in benchmarks()}
    assert goal.regime in known[goal.benchmark].regimes


def test_every_measurement_has_one_goal() -> None:
    names = [(goal.benchmark, goal.regime) for goal in goals.all_goals()]
    assert len(names) == len(set(names))
    real = [b for b in benchmarks() if not b.fake]
    assert set(names) == {(type(b).__name__, regime) for b in real for regime in b.regimes}


def _samples(ours: float, torch: float) -> dict[str, list[list[float]]]:
    """Of seven worlds three rounds each, which are alike."""
    noise = [1.0, 0.9, 1.1, 1.0, 0.95, 1.05, 1.02]
    return {
        REFERENCE: [[ours * n] * 3 for n in noise],
        TORCH: [[torch * n] * 3 for n in reversed(noise)],
        FLOOR: [[1.0] * 3 for _ in noise],
    }


@pytest.mark.parametrize(
    ("ours", "torch", "missed"),
    [
        (1.7, 3.5, ()),
        (1.75, 4.0, ("floor",)),
        (1.5, 2.9, ("torch",)),
        (2.0, 1.9, ("floor", "torch")),
    ],
)
def test_each_limit_is_kept_or_missed(ours: float, torch: float, missed: tuple[str, ...]) -> None:
    goal = Goal("AnyBenchmark", "many", floor=1.4, per_tensor=100, torch=2)
    assert reached(goal, _samples(ours, torch), tensors=2000, agreement=0.125).missed == missed


@pytest.mark.parametrize(
    ("torch", "slower"), [(1.3, False), (1.02, False), (0.97, False), (0.8, True)]
)
def test_noise_makes_nothing_slower_than_torch(torch: float, slower: bool) -> None:
    """Ours takes 1.0: torch is faster where it is so beyond the spread of the worlds."""
    got = reached(Goal("AnyBenchmark", "many"), _samples(1.0, torch), tensors=1, agreement=0)
    assert got.slower is slower
    assert got.missed == (("torch",) if slower else ())


def test_a_goal_is_found_by_its_regime() -> None:
    """One that is named whole by name alone, or by both."""
    goals = [Goal("CopyStateDict", "many"), Goal("CopyStateDict", "large")]
    found = [[goal.matches(p) for goal in goals] for p in ("^Copy", "Dict$", "Dict large", "Off")]
    assert found == [[True, True], [True, True], [False, True], [False, False]]


def test_a_miss_without_a_reason_fails() -> None:
    goal = Goal("AnyBenchmark", "many", floor=1.3)
    got = reached(goal, _samples(3.0, 2.0), tensors=10, agreement=0)
    row, fine = goals._row(goal, 4, got, "")
    assert not fine
    assert "slower than torch" in row
    assert "no reason recorded" in row
    row, fine = goals._row(goal, 4, got, "because")
    assert fine
    assert "because" in row


def test_the_page_says_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """GOALS.md and docs/benchmarks.md show what the commands print of the kept journal."""
    page = (HERE / "GOALS.md").read_text()
    assert goals.main(Settings(), None, 4, KEPT) == 0
    rows, _, profiles = capsys.readouterr().out.partition("\n\n")
    assert goals.main(Settings(), "^(Gather|Broadcast)StateDict$", 8, KEPT) == 0
    larger, _, _ = capsys.readouterr().out.partition("\n\n")
    for part in (rows, larger, profiles):
        assert part.strip() in page, "GOALS.md: not what `ci/bench --goals --from` prints"
    assert table.main(Settings(), KEPT) == 0
    page = (HERE.parents[1] / "docs" / "benchmarks.md").read_text()
    assert capsys.readouterr().out.strip() in page, "stale: `ci/readme 'ci/bench --table'`"
