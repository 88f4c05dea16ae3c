"""ci/compare: what appeared, what went and what got worse, between two runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from report import comparison
from report.changes import changes, lines
from report.compare import NotComparableError
from report.slower import NAME, slower


def check(name: str, verdict: str = "pass", fate: str = "", defects: tuple[str, ...] = ()) -> Any:
    usual = "passed" if verdict in ("pass", "xpass") else "raised"
    return {
        "id": name,
        "verdict": verdict,
        "message": "",
        "ranks": [{"rank": 0, "fate": fate or usual}],
        "expected": {"defects": list(defects)} if verdict == "xfail" else None,
    }


def run(*checks: Any) -> dict[str, Any]:
    return {"checks": list(checks)}


def known(name: str, *defects: str, fate: str = "") -> Any:
    return check(name, "xfail", fate, defects)


def test_a_defect_appears_and_another_vanishes() -> None:
    found = changes(run(check("a"), known("b", "SP-002")), run(known("a", "SP-001"), check("b")))
    assert found.appeared == {"SP-001": ["a"]}
    assert found.vanished == {"SP-002": ["b"]}
    assert found.worse
    told = "\n".join(lines(found, "one", "two"))
    assert "new: 1 defect\n" in told
    assert "SP-001" in told
    assert told.endswith("something got worse")


def test_only_common_checks_count() -> None:
    """A check that did not run, or that the other run lacks, shows nothing."""
    found = changes(
        run(check("a"), check("b", "precondition"), check("c")),
        run(check("a"), known("b", "SP-001"), known("d", "SP-002")),
    )
    assert not found.worse
    assert found.only_before == ["c"]
    assert found.only_now == ["b", "d"]
    with pytest.raises(NotComparableError, match="no check ran in both"):
        changes(run(check("a")), run(check("b")))


def test_a_defect_that_is_met_by_other_checks_is_not_new() -> None:
    found = changes(
        run(known("a", "SP-001"), check("b")), run(known("a", "SP-001"), known("b", "SP-001"))
    )
    assert not found.appeared


@pytest.mark.parametrize("before", [check("a", "fail"), known("a", "SP-002")])
def test_a_failure_that_has_another_name_now_is_told_apart(before: Any) -> None:
    """Whether it got worse cannot be known: the check failed before, too."""
    found = changes(run(before), run(known("a", "SP-001")))
    assert not found.appeared
    assert found.renamed == {"SP-001": ["a"]}
    assert not found.worse
    assert "met now by 1 check that failed before, too" in "\n".join(lines(found, "A", "B"))


@pytest.mark.parametrize(("fate", "kind"), [("silent", "hangs"), ("died", "crashes")])
def test_a_failure_gets_worse(fate: str, kind: str) -> None:
    """A known failure that raised and hangs now is worse; the reverse is not."""
    mild, bad = run(known("a", "SP-001")), run(known("a", "SP-001", fate=fate))
    (change,) = changes(mild, bad).changed
    assert (change.before, change.now) == ("fails", kind)
    assert changes(mild, bad).worse
    assert not changes(bad, mild).worse


def test_a_rank_that_waits_for_one_that_died_does_not_hang() -> None:
    one, other = known("a", "SP-001", fate="died"), known("a", "SP-001", fate="died")
    other["ranks"].append({"rank": 1, "fate": "silent"})
    assert not changes(run(one), run(other)).changed


def test_a_failure_in_another_way_that_its_defect_names_is_no_change() -> None:
    """SP-034 corrupts, hangs or crashes, differently from run to run; SP-001 does neither."""
    mild, bad = run(known("a", "SP-034")), run(known("a", "SP-034", fate="silent"))
    found = changes(mild, bad)
    assert not found.worse
    assert not found.changed
    assert [c.now for c in found.varied] == ["hangs"]
    assert "1 check failed in another of the ways that their defect names" in lines(found, "a", "b")


def test_a_failure_without_a_defect_is_worse() -> None:
    found = changes(run(check("a"), check("b", "fail")), run(check("a", "fail"), check("b")))
    assert [c.check for c in found.new_failures] == ["a"]
    assert [c.check for c in found.mended] == ["b"]
    assert found.worse


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = {"A": run(check("a")), "B": run(known("a", "SP-001"))}
    for name in runs:
        Path(name).touch()
    monkeypatch.setattr(comparison, "read", lambda path: runs[path.name])
    file = tmp_path / "changes.json"
    assert comparison.main(["A", "B", "--json", str(file)]) == 1
    assert json.loads(file.read_text())["appeared"] == {"SP-001": ["a"]}
    assert comparison.main(["B", "A"]) == 0
    assert "gone: 1 defect" in capsys.readouterr().out


def test_a_run_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert comparison.main([str(tmp_path), str(tmp_path)]) == 3
    assert "there is no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        comparison.main(["torch=2.13.0", str(tmp_path)])
    assert ended.value.code == 2
    assert "expected a folder with results.json, or torch==2.13.0" in capsys.readouterr().err


def measured(folder: Path, **torch: float) -> Path:
    """A folder with the measurements of a benchmark of torch's."""
    samples = {"seconds": [[0.5] * 20] * 8, "wrong": ""}
    arm: dict[str, Any] = {"ratio_to_floor": 2.0, "collectives": 3, **torch, **samples}
    line = {"where": "here", "benchmark": "GatherStateDict", "regime": "many", "size": 4}
    folder.mkdir()
    floor = {"received": 5 + (folder.name == "b"), **samples}  # its counts are nobody's
    arms = {"torch.distributed": arm, "floor": floor}
    (folder / NAME).write_text(json.dumps(line | {"arms": arms}) + "\n")
    return folder


@pytest.mark.parametrize(
    ("rose", "told"),
    [
        ({"ratio_to_floor": 2.5}, ["GatherStateDict many x4, torch.distributed: ratio_to_floor"]),
        ({"collectives": 4}, ["GatherStateDict many x4, torch.distributed: collectives"]),
        ({"ratio_to_floor": 2.2}, []),
        ({"ratio_to_floor": 1.0, "collectives": 2}, []),
        ({"calls": 9}, []),
    ],
)
def test_what_costs_more(tmp_path: Path, rose: dict[str, float], told: list[str]) -> None:
    before, now = measured(tmp_path / "a"), measured(tmp_path / "b", **rose)
    found = slower(before, now)
    assert [one.what for one in found] == told
    same = run(check("a"))
    changed = changes(same, same, found)
    assert changed.worse == bool(told)
    assert any(" -> " in line and "x4" in line for line in lines(changed, "A", "B")) == bool(told)


def test_a_run_without_benchmarks_is_not_slower(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    assert not slower(measured(tmp_path / "a"), tmp_path / "b")
