"""Two runs of one code: what counts as agreement, and what the command says and ends with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.settings import FLOOR, REFERENCE


def line(name: str, ratio: float, collectives: float = 2) -> dict[str, Any]:
    """A measurement as the journal holds it, of a round in each of ten equal worlds."""
    ours = {
        "wrong": "",
        "seconds": [[ratio]] * 10,
        "ratio_to_floor": ratio,
        "collectives": collectives,
    }
    floor = {"wrong": "", "seconds": [[1.0]] * 10}
    arms = {REFERENCE: ours, FLOOR: floor}
    return {"where": "here", "benchmark": name, "regime": "many", "size": 4, "arms": arms}


def agree(folder: Path, *runs: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    """What `ci/bench --agree` makes of two journals."""
    files = []
    for number, lines in enumerate(runs):
        files.append(folder / f"{number}.jsonl")
        files[-1].write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    command = [sys.executable, "-m", "benchmarks.command", "--agree", *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("ratio", "collectives", "status"), [(2.3, 2, 0), (1.8, 2, 0), (2.4, 2, 1), (2.0, 3, 1)]
)
def test_ratios_have_room_and_counts_have_none(
    tmp_path: Path, ratio: float, collectives: float, status: int
) -> None:
    told = agree(tmp_path, [line("Gather", 2.0)], [line("Gather", ratio, collectives)])
    assert told.returncode == status, told.stderr
    off = ("Gather many x4, shardproof: ratio_to_floor", "Gather many x4, shardproof: collectives")
    assert (off[0] in told.stdout) is (ratio == 2.4)
    assert (off[1] in told.stdout) is (collectives == 3)
    assert f"{ratio != 2.4:d} of 1 ratios agree within 15%" in told.stdout
    assert f"{collectives == 2:d} of 1 counts are the same" in told.stdout


def test_ratios_that_a_run_does_not_know_are_told_and_no_more(tmp_path: Path) -> None:
    """One run ended before the second ratio was known: it is apart, and that may be chance."""
    runs = [[line("Gather", 2.0), line("Copy", 2.0)] for _ in range(2)]
    left = line("Copy", 2.4)
    left["arms"][REFERENCE]["seconds"] = [[1.8], [2.4], [2.4], [3.2]]
    left["arms"][FLOOR]["seconds"] = [[1.0]] * 4
    runs[1][1] = left
    told = agree(tmp_path, *runs)
    assert told.returncode == 0
    assert "1 of 2 ratios agree within 15%" in told.stdout
    assert "1 of 1 that both runs know within 3.5% do so" in told.stdout
    assert "Copy many x4, shardproof: ratio_to_floor: 2 and 2.4, known within 0.0% and 20.3%" in (
        told.stdout
    )


def test_runs_that_know_no_ratio_do_not_agree(tmp_path: Path) -> None:
    """Of one world, as a quick run has it, nobody can tell."""
    one = line("Gather", 2.0)
    for arm in one["arms"].values():
        del arm["seconds"][1:]
    told = agree(tmp_path, [one], [one])
    assert told.returncode == 3
    assert "no ratio is known to both runs" in told.stderr


def test_a_number_that_one_run_lacks_is_told(tmp_path: Path) -> None:
    """A run that measured less does not agree by that."""
    less = line("Gather", 2.0)
    del less["arms"][REFERENCE]["collectives"]
    told = agree(tmp_path, [line("Gather", 2.0), line("Copy", 2.0)], [less])
    assert told.returncode == 1
    assert "Gather many x4, shardproof: collectives: only the first run has it" in told.stdout
    assert "Copy many x4: only the first run has it" in told.stdout


def test_what_neither_run_has_is_no_agreement(tmp_path: Path) -> None:
    """Two runs in which the same result was wrong."""
    wrong = line("Gather", 2.0)
    wrong["arms"][REFERENCE] = {"wrong": "its result is wrong: got 2", "seconds": []}
    told = agree(tmp_path, [wrong, line("Copy", 2.0)], [wrong, line("Copy", 2.0)])
    assert told.returncode == 1
    assert (
        "Gather many x4, shardproof (its result is wrong: got 2): neither run has it" in told.stdout
    )


def test_numbers_of_two_machines_are_no_run(tmp_path: Path) -> None:
    told = agree(tmp_path, [line("Gather", 2.0), line("Copy", 2.0) | {"where": "there"}], [])
    assert told.returncode == 2
    assert "has numbers of several: here; there" in told.stderr


def test_nothing_in_common_is_no_agreement(tmp_path: Path) -> None:
    told = agree(tmp_path, [], [])
    assert told.returncode == 3
    assert "measured nothing" in told.stderr


def test_what_is_no_journal_is_named(tmp_path: Path) -> None:
    text, missing = tmp_path / "notes.txt", tmp_path / "missing.jsonl"
    text.write_text("a note\n")
    command = [sys.executable, "-m", "benchmarks.command", "--agree"]
    for first, said in ((text, "no journal"), (missing, "No such file")):
        told = subprocess.run(
            [*command, str(first), str(text)], capture_output=True, text=True, check=False
        )
        assert told.returncode == 2
        assert said in told.stderr
        assert str(first) in told.stderr
        assert "Traceback" not in told.stderr
