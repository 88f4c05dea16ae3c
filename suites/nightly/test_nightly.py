"""What a night says, and to whom: two nights compared, speed, the issue, and the chain for real."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nightly import chain, settle, speed, verdicts
from nightly.chain import ROOT
from nightly.report import Found
from nightly.state import BadStateError, State

FORK = """
import os
from shardproof._state_dict_utils import *
from shardproof._state_dict_utils import _iterate_state_dict, _identity_func as _right

def _identity_func(obj, pg, device, companion_obj):
    return None if os.environ.get("FORK_IS_BROKEN") else _right(obj, pg, device, companion_obj)
"""


def test_a_changed_and_a_lost_check_are_told_apart_from_new_ones() -> None:
    before = {"a": "pass", "b": "pass", "c": "xfail", "d": "pass", "e": "precondition"}
    now = {"a": "pass", "b": "fail", "c": "pass", "d": "precondition", "e": "pass", "f": "pass"}
    found = verdicts.compare(before, now)
    assert found.changed == {"b": ("pass", "fail"), "c": ("xfail", "pass")}
    assert found.lost == {"d": "pass"}
    assert (found.ran_before, found.ran_now) == (4, 5)
    assert verdicts.unexpected(now) == {"b": "fail"}


def test_a_lost_check_stays_lost_until_it_returns() -> None:
    first = verdicts.compare({"a": "pass", "b": "pass"}, {"a": "pass"})
    second = verdicts.compare(first.remembered({"a": "pass"}), {"a": "pass"})
    assert second.lost == {"b": "pass"}
    third = verdicts.compare(second.remembered({"a": "pass"}), {"a": "pass", "b": "pass"})
    assert not third.lost
    assert not third.changed


def test_the_worse_verdict_counts_where_orders_disagree() -> None:
    merged, split = verdicts.merged([{"a": "pass", "b": "xfail"}, {"a": "timeout", "b": "xfail"}])
    assert merged == {"a": "timeout", "b": "xfail"}
    assert split == {"a": ["pass", "timeout"]}


def test_the_gate_is_three_spreads_of_tonight() -> None:
    first = {f"{n}": 1.0 for n in range(20)}
    second = {f"{n}": 1.1 for n in range(20)}
    green = {f"{n}": 1.0 for n in range(20)} | {"gone": 1.0}
    quiet, ratios = speed.judge(first, second, green)
    assert quiet.spread == pytest.approx(0.1)
    assert not quiet.slower
    assert ratios == first
    assert quiet.gone == ["gone"]
    for factor, slower in ((1.3, []), (1.4, ["3"])):
        one, two = (times | {"3": times["3"] * factor} for times in (first, second))
        assert list(speed.judge(one, two, green)[0].slower) == slower


def test_the_ratio_of_an_arm_without_a_number_is_none(tmp_path: Path) -> None:
    arms = {"floor": {"median": 2.0}, "shardproof": {"median": 3.0}, "torch.distributed": {}}
    line = {"benchmark": "Gather", "regime": "few", "size": 4, "arms": arms}
    (tmp_path / "journal").write_text(json.dumps(line) + "\n")
    assert speed.ratios(tmp_path / "journal") == {"Gather few x4 shardproof": 1.5}


@pytest.mark.parametrize(("status", "strong"), [(0, True), (1, False)])
def test_mutants_that_survive_are_a_finding(
    status: int, strong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    night = chain.Night(tmp_path, "cpu", "gloo", "torch.distributed", None, False, [])
    said: list[list[str]] = []

    def run(_: str, words: list[str]) -> int:
        said.append(words)
        return status

    monkeypatch.setattr(night, "_run", run)
    assert night.mutate(3, tmp_path / "mutation") is strong
    assert said[0][:3] == ["ci/mutation", "--shard", f"3/{chain.SHARDS}"]
    compared = verdicts.compare({}, {})
    found = Found("night", [], {}, compared, {}, None, [], weak=not strong)
    assert found.wrong is not strong
    assert any("mutants survive" in finding for finding in found.findings()) is not strong


def test_a_reproducer_that_is_not_as_the_catalogue_says_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    night = chain.Night(tmp_path, "cpu", "gloo", "torch.distributed", "2.15.0", False, [])
    line = "SP-001 does not show (plain, torch 2.15.0); the catalogue says: shows"
    (tmp_path / "reproducers.log").write_text(f"SP-002 shows\n--- 1 of 4 differ\n{line}\n")
    said: list[list[str]] = []

    def run(_: str, words: list[str]) -> int:
        said.append(words)
        return 1

    monkeypatch.setattr(night, "_run", run)
    assert night.reproduce() == [line]
    assert said[0][-2:] == ["--torch", "2.15.0"]
    found = Found("night", [], {}, verdicts.compare({}, {}), {}, None, [], reproduced=[line])
    assert found.wrong
    assert "1 reproducers do not show what the catalogue says" in list(found.findings())
    (tmp_path / "reproducers.log").write_text("no such environment")
    with pytest.raises(chain.EnvironmentFailedError, match="could not be run"):
        night.reproduce()


def test_mutants_that_cannot_be_judged_end_the_night(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    night = chain.Night(tmp_path, "cpu", "gloo", "torch.distributed", None, False, [])
    monkeypatch.setattr(night, "_run", lambda *_: 3)
    with pytest.raises(chain.EnvironmentFailedError, match="could not be judged"):
        night.mutate(1, tmp_path)


def test_a_broken_memory_is_named(tmp_path: Path) -> None:
    state = State.of(tmp_path, "torch.distributed", "2.13.0")
    assert state.read("last") is None
    state.write("last", {"verdicts": {}})
    assert state.read("last") == {"schema": 1, "verdicts": {}}
    (state.folder / "last.json").write_text("{")
    with pytest.raises(BadStateError, match=r"last\.json is not what a night leaves"):
        state.read("last")


@pytest.fixture
def gh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A gh that keeps the issues in a file, and notes what it was asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "gh").write_text(
        "#!/usr/bin/env python3\n"
        "import json, pathlib, sys\n"
        "here = pathlib.Path(__file__).parent\n"
        "file = here / 'issues.json'\n"
        "issues = json.loads(file.read_text()) if file.exists() else []\n"
        "words = sys.argv[1:]\n"
        "option = lambda name: words[words.index(name) + 1]\n"
        "if words[1] == 'list':\n"
        "    print(json.dumps([i for i in issues if i['open']]))\n"
        "elif words[1] == 'create':\n"
        "    issues.append({'number': len(issues) + 7, 'title': option('--title'), 'open': True})\n"
        "elif words[1] == 'close':\n"
        "    next(i for i in issues if str(i['number']) == words[2])['open'] = False\n"
        "file.write_text(json.dumps(issues))\n"
        "with (here / 'asked').open('a') as asked: asked.write(words[1] + '\\n')\n"
    )
    (folder / "gh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def leave_night(root: Path, name: str, *, wrong: bool, news: bool) -> None:
    state = State.of(root, "subject")
    (state.folder / name).mkdir()
    found = {"title": "Nightly: subject", "wrong": wrong, "news": news}
    (state.folder / name / "night.json").write_text(json.dumps(found))
    (state.folder / name / "report.md").write_text("the report")
    state.write("last", {"night": name})


def test_one_issue_is_opened_updated_and_closed(tmp_path: Path, gh: Path) -> None:
    nights = [
        ("1", False, True, ["list"]),
        ("2", True, True, ["list", "create"]),
        ("3", True, False, ["list"]),
        ("4", True, True, ["list", "comment"]),
        ("5", False, True, ["list", "close"]),
        ("6", False, False, ["list"]),
    ]
    for name, wrong, news, asked in nights:
        (gh / "asked").unlink(missing_ok=True)
        leave_night(tmp_path, name, wrong=wrong, news=news)
        assert settle.main(["owner/name", "--state", str(tmp_path)]) == 0
        assert (gh / "asked").read_text().split() == asked, name


def test_a_tracker_that_fails_is_no_success(
    tmp_path: Path, gh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (gh / "gh").write_text("#!/bin/sh\necho 'not logged in' >&2\nexit 4\n")
    leave_night(tmp_path, "1", wrong=True, news=True)
    assert settle.main(["owner/name", "--state", str(tmp_path)]) == 3
    assert "not logged in" in capsys.readouterr().err
    assert settle.main(["owner/name", "--state", str(tmp_path / "none")]) == 3


@pytest.mark.parametrize(
    ("last", "of_night", "said"),
    [
        ({"schema": 1, "night": "../../elsewhere"}, {}, "expected the name of a folder"),
        ({"schema": 1}, {}, "'night' is None"),
        ({"schema": 1, "night": "n"}, {"title": "t", "wrong": 0, "news": True}, "two truth values"),
        ({"schema": 1, "night": "n"}, {"title": "t"}, "is not what a night leaves"),
    ],
)
def test_a_night_that_does_not_fit_is_no_news(
    tmp_path: Path, last: Any, of_night: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "it" / "n"
    folder.mkdir(parents=True)
    (folder.parent / "last.json").write_text(json.dumps(last))
    (folder / "night.json").write_text(json.dumps(of_night))
    (folder / "report.md").write_text("all is well\n")
    assert settle.main(["owner/name", "--state", str(tmp_path), "--dry-run"]) == 3
    assert said in capsys.readouterr().err


def night(tmp_path: Path, *words: str, **variables: str) -> tuple[int, str, dict[str, Any]]:
    """One night of the fork: (exit code, output, night.json)."""
    done = subprocess.run(
        [
            *(ROOT / "ci" / "nightly", "--dry-run", "--backend", "gloo", "--no-benchmarks"),
            *("--subject", "their_fork", "-k", "TestIdentityFunc", "--state", tmp_path / "state"),
            *("--issue", "owner/name", *words),
        ],
        # What the few checks of a night here do not need takes seconds to import.
        env=os.environ
        | {"PYTHONPATH": str(tmp_path / "subject"), "PYTEST_ADDOPTS": "--no-warm-up"}
        | variables,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    print(done.stdout, done.stderr)
    last = max((tmp_path / "state").glob("*/*/night.json"))
    return done.returncode, done.stdout, json.loads(last.read_text())


def test_a_verdict_changed_on_purpose_is_reported_as_changed(tmp_path: Path) -> None:
    package = tmp_path / "subject" / "their_fork"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '1'\n")
    (package / "_state_dict_utils.py").write_text(FORK)
    code, said, found = night(tmp_path, "--site", str(tmp_path / "site"))
    assert code == 0, said
    assert found["findings"] == []
    (run,) = json.loads((tmp_path / "site" / "runs.json").read_text())
    assert (run["subject"], run["state"]) == ("their_fork", "holds")
    assert "issue: would close" in said
    code, said, found = night(tmp_path, FORK_IS_BROKEN="yes")
    assert code == 1, said
    changed = found["compared"]["changed"]
    assert changed
    assert all(pair == ["pass", "fail"] for pair in changed.values())
    assert found["unexpected"].keys() == changed.keys()
    assert "pass -> **fail**" in said
    assert "issue: would open or update" in said
