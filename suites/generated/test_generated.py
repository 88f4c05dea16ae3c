"""Generated cases: the oracle by itself, the reference against it, and how the command behaves.

`test_planted.py` shows that planted faults are found, and takes longer.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from generated import command, judge, repeat
from generated.compare import Comparison
from generated.oracle import sims
from generated.oracle.steps import connected
from generated.search import functions
from generated.tensor_texts import Case

ROOT = Path(__file__).parents[2]
MESH = ((2,), (0, 1), None)


def fuzz(*words: str) -> subprocess.CompletedProcess[str]:
    """`ci/fuzz` in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, "-m", "generated", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "suites")},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )


def case(**more: Any) -> Case:
    """A row-sharded tensor that two ranks gather."""
    entry = {"kind": "dtensor", "dtype": "float32", "shape": (3, 2), "fill": 1, "mesh": MESH}
    return {
        "world": 2,
        "pool": [{**entry, "placements": ("S0",)}],
        "trees": {"state": ("dict", [("a", ("t", 0))])},
        "steps": [{"call": "gather"}],
        **more,
    }


def test_a_few_cases_of_every_function_agree() -> None:
    """The reference and the oracle say the same of the same eight cases of each function."""
    done = fuzz("--cases", "8", "--seed", "22")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 differences" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--function", "nothing"), "nothing"),
        (("--minutes", "0"), "--minutes 0"),
        (("--subject", "no.such.fork"), "no.such.fork"),
        (("--seed", "x"), "--seed x"),
        (("--planted", "nothing"), "nothing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_usage_is_named(
    words: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wrong usage ends with 2 and names what is wrong."""
    monkeypatch.setenv("SHARDPROOF_BUCKET_MIB", "1")  # what the command sets, and leaves set
    assert command.main(words) == 2
    assert said in capsys.readouterr().err


def test_the_oracle_cuts_as_torch_chunks() -> None:
    """What each rank holds is what torch.chunk gives its number in the group, which is sorted."""
    whole = torch.arange(7 * 3).reshape(7, 3)
    for size in (1, 2, 3, 4):
        mesh = (size,), tuple(reversed(range(size)))
        pieces = [*torch.chunk(whole, size), *[whole[:0]] * size]
        for rank in range(size):
            assert torch.equal(sims.cut(whole, mesh, ("S0",), rank), pieces[rank])
    grid = (2, 2), (3, 1, 2, 0)
    assert [sims.numbers(grid, r) for r in range(4)] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    strided = [sims.cut(whole[:4], ((2, 2), (0, 1, 2, 3)), ("SS0x2", "S0"), r) for r in range(4)]
    assert [part[0, 0].item() for part in strided] == [0, 6, 3, 9]


def test_the_oracle_knows_whom_an_error_reaches() -> None:
    """A rank meets those of its groups, and whom they meet in theirs."""
    assert connected([(0, 1), (1, 2)], 4) == [{0, 1, 2}, {0, 1, 2}, {0, 1, 2}, {3}]


def test_a_difference_is_seen_in_each_field() -> None:
    """Whatever a rank tells otherwise than expected is a difference, and what is equal is none."""
    made = case()
    wanted = judge.expected(made)[0][1]
    told = {"word": "returned", "changed": [], "given": wanted["given"]}
    told["result"] = wanted["result"]
    assert not Comparison().difference(wanted, told)
    kind, ((key, leaf),), more = wanted["result"]
    for name, value in leaf.items():
        other = wanted["given"]["state"][1][0][1]["local"]["memory"] if name == "memory" else None
        if name == "object":
            other = wanted["given"]["state"][1][0][1]["object"]
        changed = (kind, [(key, {**leaf, name: other})], more)
        assert Comparison().difference(wanted, {**told, "result": changed}), f"{name}: {value}"
    for changed in (("OrderedDict", [(key, leaf)], more), (kind, [("'b'", leaf)], more)):
        assert Comparison().difference(wanted, {**told, "result": changed})
    assert Comparison().difference(wanted, {**told, "word": "raised", "error": ("X", "y")})
    assert Comparison().difference(wanted, {**told, "changed": ["environment"]})


def test_a_case_is_found_in_its_script(tmp_path: Path) -> None:
    """A script holds its case, whole; another file is refused by name."""
    made = case(wrong=[(0, 1, "shape")], turned=["state"])
    script = tmp_path / "script.py"
    difference = judge.Difference("gather", 0, 1, "it hangs", hang=True)
    script.write_text(repeat.script(made, difference, "shardproof", script.name))
    assert repeat.case_in(script) == made
    compile(script.read_text(), str(script), "exec")
    with pytest.raises(ValueError, match=r"test_generated\.py"):
        repeat.case_in(Path(__file__))


def test_functions_go_by_upstreams_names_too() -> None:
    assert functions(["_gather_state_dict", "gather", "sync_grad_hook"]) == ("gather", "seams")
    with pytest.raises(LookupError, match="no function _gather; --list names"):
        functions(["_gather"])
