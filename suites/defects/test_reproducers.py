"""Each reproducer shows its defect with torch as it is, and none that install() mends after it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from defects import catalogue
from defects.reproduce import expected, files, ranks, reproduced, sides, verdict
from defects.runs import ByTorchrun, Ended

FILES = files()
DEFECTS = catalogue.read()
_SUITES = Path(__file__).parents[1]


@pytest.mark.parametrize("identity", FILES)
def test_it_needs_torch_and_the_standard_library_alone(identity: str) -> None:
    tree = ast.parse(FILES[identity].read_text())
    names = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    }
    assert names <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("identity", FILES)
def test_it_tells_what_it_shows_and_how_to_run_it(identity: str) -> None:
    text = FILES[identity].read_text()
    told = ast.get_docstring(ast.parse(text)) or ""
    assert told.startswith(f"{identity}: "), identity
    assert 1 <= ranks(FILES[identity]) <= 8
    for answer in ("What breaks", "Why", "For whom"):
        assert re.search(rf"(?m)^{answer}: \w", told), f"{identity}: say {answer.lower()}"
    assert "Ends with 0 where torch is right, with 1 where" in " ".join(told.split())
    private = set(re.findall(r"(?:import|from) [\w.]*\b_[a-z]\w*|import _\w+", text))
    assert not private or "rivate" in told, f"{private}: say that no public call meets it"
    assert len(text.splitlines()) <= 80
    assert identity in DEFECTS


def shown(*arguments: str, wanted: Iterable[str] = ()) -> dict[str, str]:
    """What a run said of these defects; without any, of all."""
    ids = list(wanted)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "defects.reproduce",
            *(ids or ["--all"]),
            "--run",
            "--warm",
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(_SUITES)},
        check=False,
    )
    found = dict(re.findall(r"(?m)^(SP-\d+) (shows|does not show|broke)", done.stdout))
    assert found.keys() == set(ids or FILES), done.stdout + done.stderr
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return found


@pytest.mark.parametrize("side", ["plain", "installed"])
@pytest.mark.thorough
def test_every_defect_shows_where_the_catalogue_says(side: str) -> None:
    """With torch as it is; and of those that install() mends none after it."""
    import torch

    said = {i: expected(DEFECTS[i], str(torch.__version__), side) for i in FILES}
    assert shown(*["--install"] * (side == "installed")) == said


@pytest.mark.thorough
def test_install_with_callers_mends_what_the_catalogue_says() -> None:
    mended = [i for i in FILES if "install(callers=True)" in DEFECTS[i].mended_by]
    assert shown("--callers", wanted=mended) == dict.fromkeys(mended, "does not show")


@pytest.mark.parametrize("install", [False, True])
@pytest.mark.thorough
def test_torchrun_runs_it(install: bool) -> None:
    path = FILES["SP-051"]
    with ByTorchrun(install) as runs:
        ended = runs.run(path, ranks(path))
    assert verdict("SP-051", ended) == ("does not show" if install else "shows"), ended


def test_an_exit_that_was_not_meant_is_no_verdict() -> None:
    assert verdict("SP-001", Ended(1, "", "", "ImportError")) == "broke"
    assert verdict("SP-001", Ended(0, "", "", "")) == "broke"
    assert verdict("SP-001", Ended(0, "", "SP-001 shows", "")) == "broke"
    assert verdict("SP-001", Ended(6, "SIGABRT", "", "")) == "broke"
    assert verdict("SP-020", Ended(6, "SIGABRT", "", "")) == "shows", "its severity has crashes"


def test_every_defect_has_a_reproducer() -> None:
    assert FILES.keys() == DEFECTS.keys()


def test_what_is_kept_for_the_page_is_of_all_defects() -> None:
    """`ci/reproduce --all --check --write` keeps it; it is what the catalogue says of that torch.

    What is kept names no build, so that it cannot tell of a defect of one. Another torch than ours
    may not be at hand where a defect is added: the page then says "not run".
    """
    kept = reproduced()
    assert set(kept) >= {"2.11.0", "2.13.0", "2.15.0"}
    assert kept["2.13.0"].keys() == DEFECTS.keys()
    for torch, said in kept.items():
        assert said.keys() <= DEFECTS.keys(), torch
        for identity in said:
            defect = DEFECTS[identity]
            assert [*said[identity]] == sides(defect), (torch, identity)
            for side, told in said[identity].items():
                assert defect.build or told == expected(defect, torch, side), (torch, identity)
