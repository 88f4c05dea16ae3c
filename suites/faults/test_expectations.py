"""Expectations are strict: what they name must exist, fail, fail so, and say why."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.sessions import Outcome, Session
from harness.system import devices

SOURCE = """
import os, pytest
@pytest.mark.world(2)
@pytest.mark.parametrize("kind", ["a", "b"])
def test_fails(rank, kind): assert rank != 1
@pytest.mark.world(1, 2)
def test_passes(rank): pass
@pytest.mark.world(2)
def test_exits(rank):
    if rank == 1: os._exit(3)
"""
Judge = Callable[..., Outcome]


@pytest.fixture
def judge(suite: Callable[..., Path]) -> Judge:
    def run(entries: str, *arguments: str) -> Outcome:
        folder = suite(SOURCE)
        (folder / "expectations").mkdir(exist_ok=True)
        (folder / "expectations" / "torch.distributed.toml").write_text(entries)
        return Session(folder, *arguments).finish()

    return run


def entry(check: str, **more: str) -> str:
    values = {"reason": "a known defect", **more}
    return f'[[expect]]\ncheck = "{check}"\n' + "".join(f"{k} = {v!r}\n" for k, v in values.items())


KNOWN = entry("test_it.py::test_fails*") + entry("*::test_exits*", verdict="crash")


def test_expected_failures_are_green_and_carry_their_reason(judge: Judge) -> None:
    outcome = judge(KNOWN)
    assert outcome.exit == 0, outcome.output
    assert sorted(outcome.verdicts().values()) == ["pass", "pass", "xfail", "xfail", "xfail"]
    check = outcome.check(r"test_fails\[w2-a\]")
    assert check["expected"]["reason"] == "a known defect"
    assert check["message"].startswith("rank 1: ")


@pytest.mark.thorough
def test_one_reason_may_explain_several_checks(judge: Judge) -> None:
    several = '["test_it.py::test_fails[w2-a]", "test_it.py::test_fails[w2-b]"]'
    text = KNOWN.replace('"test_it.py::test_fails*"', several)
    assert judge(text).exit == 0
    lost = judge(text.replace("w2-b", "w2-c"))
    assert lost.exit == 2
    assert "entries that match no check: test_it.py::test_fails[w2-c]" in lost.output


def test_a_check_that_passes_against_its_entry_is_an_error(judge: Judge) -> None:
    outcome = judge(KNOWN + entry("test_it.py::test_passes[w1]"))
    assert outcome.check(r"test_passes\[w1\]")["verdict"] == "xpass"
    assert outcome.check(r"test_passes\[w2\]")["verdict"] == "pass"
    assert outcome.exit == 1
    assert "take the entry" in outcome.output


def test_another_failure_than_the_expected_is_not_expected(judge: Judge) -> None:
    outcome = judge(entry("test_it.py::test_fails*") + entry("*::test_exits*"))
    assert outcome.check("test_exits")["verdict"] == "crash"
    assert "expected to fail: a known defect" in outcome.output
    assert outcome.exit == 1


@pytest.mark.thorough
def test_conditions_choose_the_runs_that_an_entry_is_for(judge: Judge) -> None:
    build = devices.built()
    here = (
        f'["torch>=2.11", "torch<3", "backend==gloo", "device==cpu", "build=={build}", "world>1"]'
    )
    outcome = judge(KNOWN.replace("reason", f"when = {here}\nreason"))
    assert outcome.exit == 0, outcome.output
    for condition in ("world>2", f"build!={build}"):
        elsewhere = judge(KNOWN.replace("reason", f'when = "{condition}"\nreason'))
        assert elsewhere.exit == 1
        assert "xfail" not in elsewhere.verdicts().values()


WRONG = [
    (entry("test_it.py::test_gone*"), "entries that match no check: test_it.py::test_gone*"),
    (entry("test_it.py::test_fails*", reason=" "), "needs a defect of suites/defects/catalogue"),
    (entry("test_it.py::test_fails*", verdict="passes"), "verdict ['passes']: expected some of"),
    (entry("test_it.py::test_fails*", when="moon==full"), "condition 'moon==full': expected"),
    (entry("test_it.py::test_fails*", when="build>=cpu"), "condition 'build>=cpu': expected"),
    (entry("test_it.py::test_fails*", whn="x"), "has no use for whn"),
    ("[[expect]\n", "torch.distributed.toml: "),
]


@pytest.mark.parametrize(("entries", "message"), WRONG)
def test_a_wrong_entry_stops_the_run_before_it_starts(
    judge: Judge, entries: str, message: str
) -> None:
    outcome = judge(entries)
    assert message in outcome.output
    assert outcome.exit == 2
    assert not (outcome.run_dir / "results.json").exists()


@pytest.mark.thorough
def test_narrowing_a_run_makes_no_entry_unmatched(judge: Judge) -> None:
    assert judge(KNOWN, "-k", "passes").exit == 0


@pytest.mark.thorough
def test_updated_expectations_wait_for_their_reasons(judge: Judge) -> None:
    outcome = judge("", "--update-expectations")
    assert outcome.exit == 1
    written = outcome.folder / "expectations" / "torch.distributed.toml"
    text = written.read_text()
    assert 'check = "test_it.py::test_fails[*]"' in text
    assert 'verdict = "crash"' in text
    again = Session(outcome.folder).finish()
    assert again.exit == 2
    assert "or a reason, one sentence, as do 1 more" in again.output
    for unrelated in (["-k", "passes"], ["test_it.py::test_passes[w1]"]):
        other = Session(outcome.folder, *unrelated).finish()
        assert other.exit == 0, other.output
    assert Session(outcome.folder, "-k", "exits").finish().exit == 2
    written.write_text(text.replace('defect = ""', 'reason = "seen"'))
    assert Session(outcome.folder).finish().exit == 0


CAUSES = """
import os, pytest
pytestmark = pytest.mark.world(2)
@pytest.mark.parametrize("kind", ["a", "b"])
def test_shape(rank, kind): assert False, f"{kind!r}: shape ({ord(kind)}, 3) is lost"
@pytest.mark.parametrize("kind", ["c", "d", "e"])
def test_other(rank, kind): assert kind == "d", f"{kind!r}: shape (1, {ord(kind)}) is lost"
def test_dtype(rank): assert False, "the dtype is lost"
def test_dies(rank): os._exit(3)
"""


@pytest.mark.thorough
def test_one_cause_is_one_entry(suite: Callable[..., Path]) -> None:
    folder = suite(CAUSES)
    outcome = Session(folder, "--update-expectations").finish()
    assert "3 entries for 6 checks written to torch.distributed.toml" in outcome.output
    written = folder / "expectations" / "torch.distributed.toml"
    found = [e["check"] for e in tomllib.loads(written.read_text())["expect"]]
    assert found == [
        "test_it.py::test_dies[w2]",
        "test_it.py::test_dtype[w2]",
        [
            "test_it.py::test_other[w2-c]",
            "test_it.py::test_other[w2-e]",
            "test_it.py::test_shape[*]",
        ],
    ]
    written.write_text(written.read_text().replace('defect = ""', 'reason = "seen"'))
    assert Session(folder).finish().exit == 0
