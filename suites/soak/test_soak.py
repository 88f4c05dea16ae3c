"""A verdict that changes and a parent that grows are found; what is steady passes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from soak.trend import FEWEST, Sample, grown

SUITES = Path(__file__).parents[1]


def parent(count: int, *, kilobytes: int = 0, descriptors: float = 0) -> list[Sample]:
    """A parent after each of so many checks, with what each leaves in it."""
    return [
        Sample(
            n, 300_000 + n * kilobytes + 1500 * (n % 3), int(20 + 12 * (n % 3) + n * descriptors)
        )
        for n in range(count)
    ]


def test_what_grows_is_told_from_what_goes_up_and_down() -> None:
    assert grown(parent(5000)) == []
    assert "memory grew from 29" in grown(parent(5000, kilobytes=3))[0]
    assert "descriptors grew from 22 to 39" in grown(parent(5000, descriptors=0.005))[0]
    assert grown(parent(FEWEST - 1, kilobytes=99)) == []


SUITE = """
import os, pathlib, pytest
from harness.world import World

@pytest.mark.world(1)
@pytest.mark.parametrize("n", range(20))
def test_it(n):
    seen = pathlib.Path(__file__).with_name(f"seen-{n}")
    with seen.open("a") as file:
        file.write("x")
    assert not (FLAPS and n == 7 and seen.stat().st_size == 3)

kept = []
def end(self, original=World.end):
    if LEAKS:
        kept.append((bytearray(os.urandom(100_000)), os.open(os.devnull, os.O_RDONLY)))
    return original(self)
World.end = end
"""


def soak(folder: Path, *, flaps: bool, leaks: bool) -> tuple[int, str]:
    (folder / "test_it.py").write_text(f"FLAPS, LEAKS = {flaps}, {leaks}\n{SUITE}")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "soak", "--checks", "240", "--json", str(folder / "soak.json")),
            *(f"--rootdir={folder}", "-p", "harness.session.plugin", "--no-warm-up"),
            *("--subject", "torch.distributed", str(folder / "test_it.py")),
        ],
        env=os.environ | {"PYTHONPATH": str(SUITES)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.thorough
def test_what_is_steady_passes(tmp_path: Path) -> None:
    code, output = soak(tmp_path, flaps=False, leaks=False)
    assert code == 0, output
    assert "240 checks in " in output
    assert "12.0 rounds of 20: 0 verdicts changed" in output
    figures = json.loads((tmp_path / "soak.json").read_text())
    assert len(figures["samples"]) == 240


@pytest.mark.thorough
def test_a_verdict_that_changes_and_a_parent_that_grows_are_found(tmp_path: Path) -> None:
    code, output = soak(tmp_path, flaps=True, leaks=True)
    assert code == 1, output
    assert "test_it[w1-7]: pass at first, fail as check " in output
    assert "1 verdicts changed" in output
    assert "the parent's memory grew from " in output
    assert "the parent's descriptors grew from " in output


def test_wrong_usage_is_told() -> None:
    command = [sys.executable, "-m", "soak", "--minutes", "0"]
    done = subprocess.run(command, cwd=SUITES, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "expected --minutes above 0" in done.stderr
