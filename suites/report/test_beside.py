"""At the end of a run: what differs from a run of another torch that stands beside it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from report.beside import lines
from report.browser.example_runs import check, known, results
from report.terminal import Screen, show


def left(folder: Path, name: str, data: dict[str, Any]) -> Path:
    (folder / name).mkdir()
    (folder / name / "results.json").write_text(json.dumps(data))
    return folder / name


def test_new_and_gone_defects_are_named(tmp_path: Path) -> None:
    left(tmp_path, "old", results(known("a", "SP-001"), check("b"), torch="2.11.0+cpu"))
    now = results(check("a"), known("b", "SP-002"), known("c", "SP-003"), torch="2.13.0+cpu")
    folder = left(tmp_path, "now", now)
    told = list(lines(now, folder))
    assert told[0] == "since torch 2.11.0 (old), in 2 checks that ran in both:"
    assert [line.split()[:2] for line in told[1:]] == [["new", "SP-002"], ["gone", "SP-001"]]
    shown = io.StringIO()
    show(now, str(folder), Screen(shown, False), beside=told)
    assert "since torch 2.11.0 (old)" in shown.getvalue()


def test_the_same_defects_are_said_to_be_the_same(tmp_path: Path) -> None:
    left(tmp_path, "old", results(known("a", "SP-001"), torch="2.11.0+cpu"))
    now = results(known("a", "SP-001"), torch="2.13.0+cpu")
    (told,) = lines(now, left(tmp_path, "now", now))
    assert told == "the same defects as torch 2.11.0 (old), in 1 checks of both"


def test_only_a_run_of_the_same_kind_counts(tmp_path: Path) -> None:
    more = [check(f"a{n}") for n in range(9)]
    now = results(known("a", "SP-001"), *more, torch="2.13.0+cpu")
    folder = left(tmp_path, "now", now)
    left(tmp_path, "same", results(check("a"), torch="2.13.0+cpu"))
    left(tmp_path, "fork", results(check("a"), torch="2.11.0+cpu", subject="my.fork"))
    left(tmp_path, "gpu", results(check("a"), torch="2.11.0+cpu", backend="nccl"))
    left(tmp_path, "others", results(check("z"), torch="2.11.0+cpu"))
    left(tmp_path, "few", results(*more[:5], torch="2.11.0+cpu"))
    left(tmp_path, "broken", {"run": {}})
    assert list(lines(now, folder)) == []
