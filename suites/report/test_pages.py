"""Pages: they say what results.json holds, and nothing in it can act; ci/report and its codes."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from defects.catalogue import read as catalogue
from report import comparison, page_command, slower
from report.answer import answer
from report.browser import chromium, example_runs
from report.changes import changes
from report.html import comparison_page, run_page
from report.html.pages import FOLDER
from report.read import read

SUMS = {
    "d3-7.9.2.min.js": "912111098ea99503a6f4967361d2bbdc9dbf58cf9c678c8e27e5b02d1a07f0c1",
    "plot-0.6.17.umd.min.js": "4358086467740777dd788d6b27a95cebdbaefdd50c730a3060117073bd7134cb",
    "licences.js": "672b1efc1777c99afea9bf7c7754fb7581fa50cf6857b6049de407b8c78ddc9c",
}
"""SHA-256 of the vendored files: of D3 and Plot as their authors publish them."""


def saved(folder: Path, data: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(data))
    return folder


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


@pytest.mark.parametrize("name", ["everything", "reference", "empty", "interrupted", "large"])
def test_examples_are_results(tmp_path: Path, name: str) -> None:
    """The pages of the browser's tests are of runs as the schema has them."""
    assert read(saved(tmp_path, getattr(example_runs, name)()))["checks"] is not None


def test_the_page_holds_each_check_as_the_results_do() -> None:
    data = example_runs.everything()
    shown = {check["id"]: check for check in data_of(run_page.page(data))["checks"]}
    assert len(shown) == len(data["checks"])
    for check in data["checks"]:
        told = shown[check["id"]]
        for name in ("verdict", "message", "command", "clause", "law", "expected", "seconds"):
            assert told.get(name) == (check[name] or None)
        for rank, seen in zip(check["ranks"], told.get("ranks", ()), strict=True):
            like = rank if "as" not in seen else check["ranks"][seen["as"]]
            assert seen.get("details", like["details"]) == rank["details"]


def test_no_text_of_a_run_acts() -> None:
    """Hostile texts stand in the data and in the page's own text, never as markup."""
    page = run_page.page(example_runs.everything())
    assert "<img" not in page
    assert example_runs.HOSTILE not in page
    before, now = example_runs.compared()
    page = comparison_page.page(changes(before, now), (before, now), ("<b>", "</title><i>"))
    assert "<img" not in page
    assert "</title><i>" not in page
    assert "<b>" not in page.partition("<table")[0].partition("<body>")[2].partition("<h1")[0]


def test_no_page_asks_the_network() -> None:
    """Addresses are links to read, and the policy of the page forbids everything else."""
    page = run_page.page(example_runs.everything(), {"where": "here", "rows": []})
    own = page.partition('id="data"')[0]
    assert re.findall(r'(?:src|srcset|action)="', own) == []
    assert "default-src 'none'" in own
    assert "@import" not in own
    assert "url(" not in own


@pytest.mark.parametrize("name", SUMS)
def test_the_charting_library_is_as_published(name: str) -> None:
    digest = hashlib.sha256((FOLDER / "vendor" / name).read_bytes()).hexdigest()
    assert digest == SUMS[name]
    assert {path.name for path in (FOLDER / "vendor").iterdir()} == set(SUMS)


def test_scripts_of_charts_come_with_benchmarks_only() -> None:
    plain = run_page.page(example_runs.reference())
    measured = run_page.page(example_runs.reference(), {"where": "here", "rows": []})
    assert len(measured) - len(plain) > 400_000


@pytest.mark.parametrize(
    ("data", "state", "sentence"),
    [
        (example_runs.results(example_runs.check("a")), "holds", "the one check that ran holds"),
        (example_runs.reference(), "holds", "shardproof on torch 2.13.0 on Gloo: all 30"),
        (example_runs.results(exit=3), "nothing", "Nothing was judged"),
        (
            example_runs.results(example_runs.check("a", "precondition", message="no GPU")),
            "nothing",
            "Nothing was judged: none of 1 check could run",
        ),
        (
            example_runs.results(example_runs.check("a", "fail"), example_runs.check("b")),
            "failed",
            "1 of 2 checks fails unexpectedly",
        ),
        (
            example_runs.results(*(example_runs.check(n, "timeout") for n in "ab")),
            "failed",
            "2 of 2 checks time out unexpectedly",
        ),
        (
            example_runs.results(example_runs.known("a", "SP-001")),
            "known",
            "torch 2.13.0 on Gloo breaks the contract in 1 way: 1 loses data silently",
        ),
        (
            example_runs.results(example_runs.known("a", reason="r"), subject="my.fork"),
            "known",
            "my.fork on torch 2.13.0 on Gloo: 1 of 1 check fail as expected",
        ),
        (example_runs.interrupted(), "incomplete", "38 of 40 checks did not run"),
    ],
)
def test_the_answer(data: dict[str, Any], state: str, sentence: str) -> None:
    found = answer(data, catalogue())
    assert found.state == state
    assert sentence in found.sentence


def test_the_answer_names_what_it_does_not_cover() -> None:
    notes = " ".join(answer(example_runs.everything(), catalogue()).notes)
    assert "1 check could not run: needs 8 GPUs" in notes
    assert "3 checks marked thorough were left out" in notes
    assert "In 1 more way" in notes
    notes = " ".join(answer(example_runs.interrupted(), catalogue()).notes)
    assert "So far: torch 2.13.0 on Gloo breaks the contract in 1 way" in notes


def test_the_sentence_of_a_comparison() -> None:
    before, now = example_runs.compared()
    assert comparison_page.sentence(changes(before, now)) == (
        "Something got worse: 1 new defect, 1 new failure without a defect, "
        "1 known failure that is worse; 1 defect gone"
    )
    assert comparison_page.sentence(changes(now, before)) == (
        "Something got worse: 1 new defect; 1 defect gone, 1 failure without a defect gone"
    )
    assert comparison_page.sentence(changes(now, now)) == "Nothing got worse"


def test_compare_writes_the_page(tmp_path: Path) -> None:
    runs = [saved(tmp_path / n, d) for n, d in zip("ab", example_runs.compared(), strict=True)]
    file = tmp_path / "changes.html"
    assert comparison.main([*map(str, runs), "--html", str(file)]) == 1
    assert "Something got worse" in file.read_text()


# --- ci/report ----------------------------------------------------------------------------------


def test_ci_report_writes_beside_the_results(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", example_runs.reference())
    assert page_command.main([str(run)]) == 0
    assert "all 30 checks hold" in (run / "report.html").read_text()
    other = tmp_path / "other.html"
    assert page_command.main([str(run / "results.json"), "--output", str(other)]) == 0
    assert other.read_text() == (run / "report.html").read_text()


def test_ci_report_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert page_command.main([str(tmp_path)]) == 3
    assert "there is no such file" in capsys.readouterr().err
    run = saved(tmp_path / "run", example_runs.reference())
    (run / slower.NAME).write_text("{")
    assert page_command.main([str(run)]) == 3
    assert "is no journal: line 1" in capsys.readouterr().err


def test_a_picture_without_a_browser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run = saved(tmp_path / "run", example_runs.reference())
    assert page_command.main([str(run), "--screenshot", str(tmp_path / "x.png")]) == 3
    assert "apt-get install chromium" in capsys.readouterr().err
    with pytest.raises(chromium.NoBrowserError):
        chromium.find()


def test_a_text_that_no_encoding_has_is_written(tmp_path: Path) -> None:
    """A message may hold half of a surrogate pair."""
    data = example_runs.results(example_runs.known("a", reason="half \ud83c"))
    run_page.write(data, tmp_path / "report.html", tmp_path)
    assert "half ?" in (tmp_path / "report.html").read_text()


def small_run(folder: Path, text: str = "pass") -> subprocess.CompletedProcess[str]:
    """A run of one test, as the project's settings have it."""
    root, file = Path(__file__).parents[2], folder / "test_one.py"
    file.write_text(f"def test_one():\n    {text}\n")
    words = ["-c", str(root / "pyproject.toml"), "--subject", "shardproof", "-q", "--no-warm-up"]
    return subprocess.run(
        [sys.executable, "-m", "harness", *words, "--run-dir", str(folder / "run"), str(file)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_run_leaves_its_page(tmp_path: Path) -> None:
    ended = small_run(tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"^report: .*run/report.html$", ended.stdout, re.MULTILINE)
    assert "the one check that ran holds" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.thorough
def test_a_page_that_cannot_be_written_changes_no_verdict(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / slower.NAME).write_text("no journal")
    ended = small_run(tmp_path, "assert 0")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert re.search(r"run/report.html cannot be written: .*is no journal", ended.stdout)
    assert not list((tmp_path / "run").glob("*report*"))
