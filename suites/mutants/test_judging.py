"""Faults are judged: caught only for sure, told from what a busy machine does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mutants import marks, patches, run
from mutants.catalog import MUTANTS
from mutants.executed import Executed
from mutants.judge import ROOT, Judge, Plant
from mutants.statements import statements


class _Scripted(Judge):
    """Says of the checks what the test says that they say: of the copy, then of the reference."""

    def __init__(self, **verdicts: list[str]) -> None:
        super().__init__(lambda _: None)
        self._verdicts = verdicts

    def run(
        self, plant: Plant, checks: Sequence[str], *, to_the_end: bool = False
    ) -> Iterator[dict[str, Any]]:
        for check in checks:
            said = self._verdicts[check]
            verdict = said.pop(0) if len(said) > 1 else said[0]
            if verdict == "end":
                return
            if verdict in {"broken", "silent", "import"}:
                yield {verdict: "why"}
                return
            yield {"check": check, "verdict": verdict, "message": ""}
            if verdict in {"fail", "timeout", "crash", "error"}:
                return


@pytest.mark.parametrize(
    ("verdicts", "state", "said"),
    [
        ({"a": ["pass"], "b": ["pass"]}, "survived", ""),
        ({"a": ["pass"], "b": ["fail", "pass"]}, "caught", "b"),
        ({"a": ["crash", "pass"], "b": ["pass"]}, "caught", "a"),
        ({"a": ["fail", "fail"], "b": ["pass"]}, "survived", ""),
        ({"a": ["fail", "fail"], "b": ["fail", "pass"]}, "caught", "b"),
        ({"a": ["timeout", "timeout", "pass"], "b": ["pass"]}, "caught", "a"),
        ({"a": ["timeout", "pass"], "b": ["pass"]}, "survived", ""),
        ({"a": ["timeout", "pass"], "b": ["fail", "pass"]}, "caught", "b"),
        ({"a": ["timeout"], "b": ["pass"]}, "survived", ""),
        ({"a": ["error", "error", "pass"], "b": ["pass"]}, "caught", "a"),
        ({"a": ["import"], "b": ["pass"]}, "caught", "import"),
        ({"a": ["silent", "pass"], "b": ["pass"]}, "survived", ""),
        ({"a": ["silent"], "b": ["pass"]}, "caught", "import"),
        ({"a": ["broken"], "b": ["pass"]}, "broken", "why"),
        ({"a": ["pass"], "b": ["end"]}, "broken", "the session ended after 1 of 2 checks"),
        ({"a": ["end"], "b": ["pass"]}, "broken", "the session said nothing"),
    ],
)
def test_a_failure_counts_where_the_reference_passes_and_a_timeout_where_it_repeats(
    verdicts: dict[str, list[str]], state: str, said: str
) -> None:
    judge = _Scripted(**{check: list(words) for check, words in verdicts.items()})
    result = judge.judge(lambda _: None, ["a", "b"])
    assert (result.state, result.said) == (state, said)


_FLATTEN = "reference/shardproof/_state_dict_utils/flatten.py"


def _patch(old: str, new: str) -> str:
    lines = (ROOT / _FLATTEN).read_text().splitlines()
    at = lines.index(old)
    return (
        "Fault: paths collide\nDimension: 2\nFunctions: _set_element, _flatten_state_dict\n\n"
        f"--- a/{_FLATTEN}\n+++ b/{_FLATTEN}\n@@ -{at},3 +{at},3 @@\n"
        f" {lines[at - 1]}\n-{lines[at]}\n+{new}\n {lines[at + 1]}\n"
    )


def test_patches_are_judged_by_the_checks_of_their_functions(tmp_path: Path) -> None:
    old = "    if len(flat) != len(names):"
    (tmp_path / "bad.patch").write_text(_patch(old, "    if False:"))
    (tmp_path / "harmless.patch").write_text(_patch(old, "    if len(names) != len(flat):"))
    (tmp_path / "unfit.patch").write_text(_patch(old, "    no code").replace("-" + old, "-x"))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mutants.run", "--patches", str(tmp_path)),
            *("--json", str(tmp_path / "out.json")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 3, done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())}
    assert {n: row["state"] for n, row in rows.items()} == {
        "bad": "caught",
        "harmless": "survived",
        "unfit": "broken",
    }
    assert "test_flatten_state_dict" in rows["bad"]["said"]
    assert "2. keys and containers               1 of 2    caught 1 broken" in done.stdout


@pytest.mark.parametrize(
    ("text", "user"), [("BUCKET_BYTES =", "buckets.py"), ("_ALONE =", "limits.py")]
)
def test_who_uses_a_constant_is_found_across_modules(text: str, user: str, tmp_path: Path) -> None:
    every = statements()
    number = next(n for n, s in enumerate(every) if s.text.startswith(text))
    users = [every[n] for n in Executed(tmp_path).users_of(number)]
    assert users
    assert all(not s.imported for s in users)
    assert {s.file.rpartition("/")[2] for s in users} >= {user}


def test_marks_are_left_in_compiled_code_in_forks_and_in_other_interpreters() -> None:
    import torch

    @torch.compile(backend="eager", fullgraph=True)
    def double(x: torch.Tensor) -> torch.Tensor:
        marks.mark(0)
        return x * 2

    with marks.in_a_file():
        assert double(torch.ones(1)).item() == 2
        program = "from mutants.marks import mark; mark(3)"
        subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
        if (pid := os.fork()) == 0:
            marks.mark(5)
            os._exit(0)
        os.waitpid(pid, 0)
        assert marks.taken() == 0b101001
        assert marks.taken() == 0


def test_what_caught_a_fault_before_comes_first() -> None:
    patch = patches.read_all(patches.FOLDER)[0]
    judge = _Scripted()
    judge.items = dict.fromkeys(["a", "b", "elsewhere"])  # type: ignore[assignment]
    assert run.known_first(patch, ["a", "b"], judge, "b") == ["b", "a"]
    assert run.known_first(patch, ["a", "b"], judge, "elsewhere") == ["elsewhere", "a", "b"]
    assert run.known_first(patch, ["a", "b"], judge, "gone") == ["a", "b"]
    # Of a mutant of the catalog the checks of its files alone.
    assert run.known_first(MUTANTS[0], ["a", "b"], judge, "elsewhere") == ["a", "b"]
    assert run.known_first(MUTANTS[0], ["a", "b"], judge, None) == ["a", "b"]
