"""The table of libraries: what turned from right to wrong, or to other bits, is never lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ecosystem import table
from ecosystem.digests import folder_of
from report.test_report import CHECK, results

ID = "suites/ecosystem/test_x.py::TestIt::test_resumed[w2-a]"


def check(verdict: str, message: str = "", identity: str = ID) -> dict[str, Any]:
    return CHECK | {
        "id": identity,
        "module": "ecosystem",
        "function": "library",
        "verdict": verdict,
        "message": message,
        "ranks": [],
    }


def leave(folder: Path, name: str, bits: str, *checks: dict[str, Any], status: int = 0) -> None:
    """A run with these checks, each with one digest."""
    run = folder / name
    run.mkdir()
    (run / "results.json").write_text(json.dumps(results(*checks, exit=status)))
    for one in checks:
        where = folder_of(run, one["id"])
        where.mkdir(parents=True)
        (where / "rank-0.json").write_text(json.dumps({"losses": bits}))


def runs(folder: Path, before: tuple[str, str], after: tuple[str, str], message: str = "") -> Path:
    """Of torch and of each moment, where (verdict, bits) of the last moment may differ."""
    leave(folder, "torch", before[1], check(before[0], message))
    for moment in ("after", "before"):
        leave(folder, moment, before[1], check(before[0], message))
    leave(folder, "twice", after[1], check(after[0], message))
    return folder


CASES: dict[str, tuple[tuple[str, str], tuple[str, str], str, int, str]] = {
    "right in both": (("pass", "x"), ("pass", "x"), "", 0, "right 1 | right 1"),
    "other bits": (("pass", "x"), ("pass", "y"), "", 1, "right 1 | right 1"),
    "an error": (("pass", "x"), ("crash", "x"), "rank 0: killed", 1, "right 1 | error 1"),
    "wrong": (("pass", "x"), ("fail", "x"), "rank 0: assert 1 == 2", 1, "right 1 | wrong 1"),
    "mended": (("fail", "x"), ("pass", "y"), "AssertionError: no", 0, "wrong 1 | wrong 1"),
    "an error in both": (("fail", "x"), ("fail", "y"), "ValueError: no", 0, "error 1 | error 1"),
    "not run": (("precondition", "x"), ("precondition", "x"), "", 3, "not run 1 | not run 1"),
}


@pytest.mark.parametrize("case", list(CASES))
def test_what_turned(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    before, after, message, status, row = CASES[case]
    monkeypatch.setattr("sys.argv", ["table", str(runs(tmp_path, before, after, message))])
    assert table.main() == status
    said = capsys.readouterr()
    assert f"| library | It: resumed | {row} |" in said.out
    assert (f"TURNED  {ID}\n  install() twice" in said.err) == (status == 1)


@pytest.mark.parametrize("lost", ["torch", "before"])
def test_a_run_that_is_missing(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    folder = runs(tmp_path, ("pass", "x"), ("pass", "x"))
    (folder / lost / "results.json").unlink()
    monkeypatch.setattr("sys.argv", ["table", str(folder)])
    assert table.main() == 3
    assert lost in capsys.readouterr().err


def test_a_run_that_lacks_a_check(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch", "after", "before"):
        leave(tmp_path, name, "x", check("pass"))
    leave(tmp_path, "twice", "x", check("pass", identity=ID.replace("-a", "-b")))
    monkeypatch.setattr("sys.argv", ["table", str(tmp_path)])
    assert table.main() == 3
    assert "different checks" in capsys.readouterr().err


def test_a_digest_that_is_missing(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs(tmp_path, ("pass", "x"), ("pass", "x"))
    (folder_of(folder / "before", ID) / "rank-0.json").unlink()
    monkeypatch.setattr("sys.argv", ["table", str(folder)])
    assert table.main() == 1
    assert "other bits: losses on rank-0" in capsys.readouterr().err
