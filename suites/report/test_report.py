"""The report: reads only what fits the schema, and counts in the matrix what the checks say."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest

from report.compare import NotComparableError, compare
from report.laws import LAWS
from report.matrix import Cell, matrix
from report.read import BadResultsError, read
from report.terminal import Screen, show, show_known

RANK = {
    "rank": 1,
    "fate": "raised",
    "phase": "call",
    "seconds": 0.1,
    "message": "ValueError: boom",
    "details": "Traceback: boom",
    "waiting_in": "",
    "exitcode": 0,
    "log": "logs/x/rank-1.log",
}
CHECK = {
    "id": "test_x.py::test_it[w2]",
    "module": "m",
    "function": "_f",
    "law": "values",
    "clause": "It is so.",
    "verdict": "fail",
    "seconds": 0.2,
    "message": "rank 1: ValueError: boom",
    "world": 2,
    "ranks": [RANK],
    "expected": None,
    "command": "ci/conformance 'test_x.py::test_it[w2]'",
}
VERDICTS = ("pass", "fail", "error", "timeout", "crash", "precondition", "xfail", "xpass")


def results(*checks: dict[str, Any], **run: Any) -> dict[str, Any]:
    counts = {v: sum(c["verdict"] == v for c in checks) for v in VERDICTS}
    base = {
        "schema": 1,
        "subject": "my.fork",
        "subject_version": "1",
        "torch": "2.13.0",
        "backend": "gloo",
        "device": "cpu",
        "world": None,
        "commit": "abc",
        "seed": 0,
        "order": "normal",
        "start": "2026-01-01T00:00:00.000+00:00",
        "end": "2026-01-01T00:00:01.000+00:00",
        "counts": counts,
        "selected": len(checks),
        "exit": 1,
        "command": "ci/conformance",
    }
    return {"run": base | run, "checks": list(checks)}


def check(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(CHECK) | changes


def text_of(data: dict[str, Any], width: int = 140) -> str:
    stream = io.StringIO()
    show(data, "out/run", Screen(stream, colour=False, width=width))
    return stream.getvalue()


def test_what_fits_the_schema_is_read(tmp_path: Path) -> None:
    data = results(check())
    (tmp_path / "results.json").write_text(json.dumps(data))
    assert read(tmp_path) == read(tmp_path / "results.json") == data


WRONG = [
    (lambda d: d["run"].pop("seed"), "'seed' is a required property"),
    (lambda d: d["checks"][0].update(verdict="green"), "'green' is not one of"),
    (lambda d: d["checks"][0]["ranks"][0].pop("fate"), "'fate' is a required property"),
    (lambda d: d["run"]["counts"].update(fail=0), "do not add up"),
    (lambda d: d.pop("checks"), "'checks' is a required property"),
    (lambda d: d["checks"][0].update(verdict="xfail"), "None is not of type 'object'"),
    (lambda d: d["run"].update(torch="mine"), "'mine' is not a 'version'"),
    (lambda d: d["run"].update(start="2026-13-01"), "'2026-13-01' is not a 'date-time'"),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG, ids=[m for _, m in WRONG])
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, spoil: Any, message: str) -> None:
    data = results(check())
    spoil(data)
    (tmp_path / "results.json").write_text(json.dumps(data))
    with pytest.raises(BadResultsError, match=message) as caught:
        read(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("log", ["../../secret", "/etc/passwd", "logs/../../x", "logs/.."])
def test_a_log_outside_of_the_run_is_refused(tmp_path: Path, log: str) -> None:
    data = results(check(ranks=[RANK | {"log": log}]))
    (tmp_path / "results.json").write_text(json.dumps(data))
    with pytest.raises(BadResultsError, match=r"checks\[0\].ranks\[0\].log"):
        read(tmp_path)


def test_what_a_terminal_would_obey_is_shown(tmp_path: Path) -> None:
    data = results(check(message="\x1b]0;title\x07\x1b[2Jgone\ttab\nline \x9b1m \ud800"))
    (tmp_path / "results.json").write_text(json.dumps(data))
    message = read(tmp_path)["checks"][0]["message"]
    assert message == "\\x1b]0;title\\x07\\x1b[2Jgone\ttab\nline \\x9b1m \\ud800"


def test_a_missing_or_torn_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadResultsError, match="no such file"):
        read(tmp_path)
    (tmp_path / "results.json").write_text('{"run": ')
    with pytest.raises(BadResultsError, match="not JSON"):
        read(tmp_path)


def test_a_cell_shows_its_worst() -> None:
    cells = {}
    for name, verdicts in {
        "holds": ["pass", "pass"],
        "expected": ["pass", "xfail"],
        "unexpected": ["xfail", "fail"],
        "part": ["pass", "xfail", "precondition"],
        "absent": ["precondition"],
        "empty": [],
    }.items():
        cells[name] = Cell()
        cells[name].verdicts.update(verdicts)
    states = {n: n for n in cells} | {"part": "expected"}
    assert {name: cell.state for name, cell in cells.items()} == states
    assert [str(c) for c in cells.values()] == ["✓ 2", "x 1/2", "✗ 0/2", "x 1/2?", "? 1", "·"]


def test_the_matrix_counts_each_check_once() -> None:
    found = matrix([check(), check(verdict="pass"), check(law="cost"), check(function="")])
    cells = found["m"]["_f"]
    assert {law: cell.total for law, cell in cells.items()} == {"values": 2, "cost": 1}


def test_a_failure_is_shown_with_its_rank_cause_log_and_command() -> None:
    text = text_of(results(check(), check(verdict="pass")))
    for part in (
        "FAIL  test_x.py::test_it[w2]",
        "It is so.",
        "rank 1: ValueError: boom",
        "Traceback: boom",
        "out/run/logs/x/rank-1.log",
        "ci/conformance 'test_x.py::test_it[w2]'",
        "✗ 1/2",
        "1 pass, 1 fail",
        "out/run/results.json",
    ):
        assert part in text


def test_in_80_columns_nothing_is_wider_but_what_is_copied() -> None:
    known = {"reason": "r", "link": "", "pattern": "*", "file": "x.toml", "defects": ["SP-002"]}
    words = "several words that go on and on " * 10
    rank = RANK | {"message": words, "details": f"{words}\n  indented\n\n{words}"}
    name = "_create_sharded_tensor_md_from_dt"
    data = results(
        check(message=words, clause=words, ranks=[rank], level="SHOULD", level_reason=words),
        *(check(law=law, id=law, function=name) for law in LAWS),
        *(check(law=law, id=f"{law}, known", verdict="xfail", expected=known) for law in LAWS),
        check(id="absent", verdict="precondition", module="tensor.parallel._data_parallel_utils"),
    )
    for one in data["checks"]:
        one.setdefault("level", "MUST")
    text = text_of(data, 80)
    wide = [line for line in text.splitlines() if len(line) > 80]
    assert all(line.lstrip().startswith(("repeat ", "log ")) for line in wide), wide
    narrow = text_of(data, 20)  # less than anybody can use, and no error
    assert narrow.count("SP-002") == text.count("SP-002") > 2
    lost = set(words.split()) - set(text.split())
    assert not lost


def test_the_signs_of_a_short_matrix() -> None:
    expected = {"reason": "r", "link": "", "pattern": "*", "file": "x.toml"}
    found = {
        "values": [check(), check(verdict="pass"), check(verdict="xfail", expected=expected)],
        "structure": [check(verdict="xfail", expected=expected), check(verdict="pass")],
        "isolation": [check(verdict="pass"), check(verdict="precondition")],
        "symmetry": [check(verdict="precondition")],
        "group": [check(verdict="pass"), check(verdict="pass")],
    }
    data = results(*(c | {"law": law} for law, checks in found.items() for c in checks))
    (row,) = (line for line in text_of(data, 80).splitlines() if line.startswith("_f "))
    assert row.split() == ["_f", "✗1", "x1", "✓?", "?", "·", "✓", "·", "·", "·"]


def test_a_run_says_what_to_do_next() -> None:
    known = {"reason": "r", "link": "", "pattern": "*", "file": "x.toml", "defects": ["SP-002"]}
    lines = text_of(
        results(check(verdict="xfail", expected=known, level="MUST"), check(level="MUST"))
    ).splitlines()
    steps = [line.split("  ")[1] for line in lines[lines.index("next") + 1 :]]
    assert steps == ["each failure's repeat", "ci/defects SP-002", "ci/reproduce SP-002"]
    assert "next" not in text_of(results(check(verdict="pass"))).splitlines()


def test_a_certificate_is_told() -> None:
    found = {"granted": True, "profile": "all checks", "refused": [], "should": 2}
    said = "certificate: every check of a MUST holds; 2 of a SHOULD do not (all checks)"
    assert said in text_of(results(check(verdict="pass"), certificate=found))
    found |= {"granted": False, "refused": ["1 checks of a MUST do not hold"]}
    said = "no certificate: 1 checks of a MUST do not hold"
    assert said in text_of(results(check(), certificate=found))


def test_the_last_collectives_of_each_rank_are_shown(tmp_path: Path) -> None:
    call = {
        "op": "all_gather",
        "group": [0, 1],
        "arguments": "float32 (4, 3)",
        "state": "issued",
        "seconds_before_the_end": 2.04,
    }
    calls = [call | {"number": number} for number in range(1, 8)]
    data = results(check() | {"ranks": [RANK | {"collectives": calls}]})
    (tmp_path / "results.json").write_text(json.dumps(data))
    text = text_of(read(tmp_path))
    line = "of group (0, 1), float32 (4, 3), 2.0 s before the end"
    assert f"  rank 1   issued all_gather #7 {line}\n" in text
    assert "all_gather #4" not in text, "the last three say enough"


def test_checks_that_did_not_run_are_counted() -> None:
    assert "2 selected checks did not run" in text_of(results(check(), selected=3))


def test_known_failures_are_listed_by_reason() -> None:
    expected = {
        "reason": "a defect",
        "link": "https://example.org/1",
        "pattern": "*",
        "file": "x.toml",
    }
    data = results(check(verdict="xfail", expected=expected), check(verdict="pass"))
    stream = io.StringIO()
    show_known(data, Screen(stream, colour=False))
    assert "a defect  https://example.org/1\n  test_x.py::test_it[w2]" in stream.getvalue()
    assert "x 1/2" in text_of(data)
    assert "1 known failures; --known lists each" in text_of(data)


def test_two_runs_are_compared_by_check() -> None:
    known = {"reason": "r", "link": "", "pattern": "*", "file": "callers.toml"}
    area = {"module": "integration", "function": "training.ddp"}
    before = results(
        {**CHECK, "id": "a"},
        {**CHECK, "id": "b", "verdict": "pass"},
        {**CHECK, **area, "id": "c"},
        {**CHECK, **area, "id": "d", "verdict": "xfail", "expected": known},
        {**CHECK, "id": "only here"},
        {**CHECK, "id": "not run", "verdict": "precondition"},
    )
    after = results(
        {**CHECK, "id": "a", "verdict": "pass"},
        {**CHECK, "id": "b", "verdict": "pass"},
        {**CHECK, **area, "id": "c", "verdict": "pass"},
        {**CHECK, **area, "id": "d", "verdict": "xfail", "expected": known},
        {**CHECK, "id": "not run", "verdict": "pass"},
    )
    assert list(compare(before, after))[2:] == [
        "| `m` | 1 of 2 | 2 of 2 |  |",
        "| integration: training.ddp | 0 of 2 | 1 of 2 | 1 |",
        "| **all** | 1 of 4 | 3 of 4 | 1 |",
    ]


def test_runs_without_a_check_in_common_are_not_compared() -> None:
    with pytest.raises(NotComparableError, match="no check ran in both"):
        list(compare(results(CHECK), results({**CHECK, "id": "other"})))


def test_a_should_is_told_apart() -> None:
    lesser = {"level": "SHOULD", "level_reason": "it costs time"}
    text = text_of(
        results(
            check(),
            check(id="test_x.py::test_b", **lesser),
            check(
                id="test_x.py::test_c",
                verdict="xfail",
                expected={"reason": "slow", "link": "", "pattern": "x", "file": "y.toml"},
                **lesser,
            ),
            check(id="test_x.py::test_d", verdict="pass", **lesser),
        )
    )
    assert "2 unexpected, 1 of them SHOULD, not MUST" in text
    assert text.count("  level    SHOULD: it costs time") == 1
    assert "1 of the known failures are SHOULD" in text
    assert "1 of the unexpected failures are SHOULD" in text
    assert "SHOULD" not in text_of(results(check(), check(verdict="pass", **lesser)))
