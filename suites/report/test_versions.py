"""The page of versions says what the runs say, and shows what is not the same in all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from report import versions
from report.test_report import CHECK, results

KNOWN = {"reason": "A defect.", "link": "https://example.org/1", "pattern": "*", "file": "x.toml"}
XFAIL = {"verdict": "xfail", "expected": KNOWN}
PASS = {"verdict": "pass"}
UNDER = "under torch 2.15.0"


def run(torch: str, *verdicts: dict[str, Any], subject: str = "torch.distributed") -> Any:
    """A run of checks a, b, … of the function m._f."""
    checks = [{**CHECK, "id": name, **v} for name, v in zip("abcd", verdicts, strict=False)]
    return results(*checks, torch=torch, subject=subject)


def page(*runs: Any) -> str:
    return "\n".join(versions.page(versions.columns(runs)))


def test_a_row_counts_what_holds_in_each_version() -> None:
    text = page(
        run("2.15.0+cu132", PASS, PASS, PASS),
        run("2.9.0", XFAIL, PASS, XFAIL),
        run("2.9.0", PASS, PASS, PASS, subject="ours"),
        run("2.15.0+cu132", PASS, PASS, PASS, subject="ours"),
    )
    assert "| | torch 2.9.0 | torch 2.15.0 | ours, under each |" in text
    assert "| `_f` | 1 of 3 | 3 of 3 | 3 of 3 |" in text
    assert "| **all** | 1 of 3 | 3 of 3 | 3 of 3 |" in text
    assert "✗ 1" not in text
    assert "## Unexpected" not in text


def test_a_subject_that_differs_between_versions_shows_each() -> None:
    text = page(
        run("2.9.0", PASS, XFAIL, subject="ours"), run("2.15.0", PASS, PASS, subject="ours")
    )
    assert "| `_f` | 2.9.0: 1 of 2<br>2.15.0: 2 of 2 |" in text


def test_what_differs_is_listed_with_its_reason() -> None:
    text = page(
        run("2.9.0", XFAIL, PASS, XFAIL, {"verdict": "precondition", "message": "no\nfp4"}),
        run("2.15.0", PASS, PASS, XFAIL, PASS),
    )
    assert text.partition("differs between versions: torch.distributed\n\n")[2].startswith(
        "- 1 check:\n"
        "  - 2.9.0: fails. A defect. ([link](https://example.org/1))\n"
        "  - 2.15.0: holds\n"
        "  - `a`\n"
        "- 1 check:\n"
        "  - 2.9.0: not run: no fp4\n"
        "  - 2.15.0: holds\n"
        "  - `d`\n"
        "\n"
    )
    assert "| `_f` | 1 of 3, 1 not run | 3 of 4 |" in text


def test_what_a_subject_lacks_is_not_run() -> None:
    text = page(run("2.9.0", {"verdict": "precondition", "module": "", "message": "lacks it"}))
    assert "## the root\n\n| | torch 2.9.0 |\n| --- | ---: |\n| `_f` | 1 not run |" in text


def test_a_check_that_one_version_lacks_differs() -> None:
    text = page(run("2.9.0", PASS), run("2.15.0", PASS, PASS))
    assert "  - 2.9.0: there is no such check\n  - 2.15.0: holds\n  - `b`" in text


def test_versions_that_agree_are_said_to() -> None:
    assert "Nothing, in 2 checks." in page(run("2.9.0", XFAIL, PASS), run("2.15.0", XFAIL, PASS))


@pytest.mark.parametrize("verdict", ["fail", "error", "timeout", "crash", "xpass"])
@pytest.mark.parametrize("function", ["_f", ""])
def test_an_unexpected_verdict_is_shown_and_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verdict: str, function: str
) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    wrong = {"verdict": verdict, "function": function}
    for folder, data in zip(
        folders, (run("2.9.0", XFAIL), run("2.15.0", XFAIL, wrong)), strict=True
    ):
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(data))
    target = tmp_path / "page.md"
    assert versions.main([*map(str, folders), "--write", str(target)]) == 1
    assert f"{UNDER}: {verdict} b" in capsys.readouterr().err
    text = target.read_text()
    assert f"- torch.distributed {UNDER}: {verdict} `b`:" in text
    assert ("| ✗ 0 of 2 |" in text) == bool(function)


TROUBLE = [
    ([run("2.9.0", PASS), run("2.9.0+cpu", PASS)], "given twice"),
    ([results({**CHECK, **PASS}, torch="2.9.0", selected=2)], "1 of 2 selected checks ran"),
    ([run("2.9.0")], "0 of 0 selected checks ran"),
    ([run("2.9.0", PASS), results({**CHECK, **PASS}, torch="2.1", backend="nccl")], "several"),
]


@pytest.mark.parametrize(("runs", "message"), TROUBLE, ids=[m for _, m in TROUBLE])
def test_runs_that_make_no_page_are_refused_by_name(runs: list[Any], message: str) -> None:
    with pytest.raises(versions.NotOneTableError, match=message):
        versions.columns(runs)


def test_a_missing_run_ends_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "page.md"
    assert versions.main([str(tmp_path), "--write", str(target)]) == 3
    assert "no such file" in capsys.readouterr().err
    assert not target.exists()


def test_defects_are_counted_in_each_version() -> None:
    """A defect that one version has, and another has not, stands in one row."""
    met = {"verdict": "xfail", "expected": {**KNOWN, "reason": "", "defects": ["SP-001"]}}
    text = page(run("2.13.0", met, met), run("2.15.0", PASS, met))
    (row,) = [line for line in text.splitlines() if line.startswith("| SP-001 |")]
    assert row.endswith("| 2 | 1 |")
    assert "fails: SP-001 (" in text
