"""Each fault of the table in each phase: the verdict, who is named, in time, and nothing left.

Sessions play the cells of one phase each, one after the other, and a check in order after each;
all sessions run side by side, for most of a cell is waiting.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import own_disk
from faults.page import PAGE, page
from faults.sessions import CASES, Outcome, Session
from faults.table import CELLS, COLLECTIVE, LIMIT, PARENT, PHASES, RANK, Cell
from harness.parent import local_ranks
from report.read import read

MEMORY = Path("/sys/fs/cgroup/memory")
CLOCKS = ("--collective-limit", str(COLLECTIVE), "--check-limit", str(LIMIT), "--world-size", "2")
ON_RANKS = [cell for cell in CELLS if cell.where == RANK]
IN_PARENTS = [cell for cell in CELLS if cell.where == PARENT]


def unmet(cell: Cell) -> str:
    """What this machine cannot plant, in words."""
    if cell.kind == "disk full" and (why := own_disk.why_not()):
        return f"needs to mount a tmpfs: {why}"
    if cell.kind == "ended by the kernel" and not os.access(MEMORY / "cgroup.procs", os.W_OK):
        return f"needs a memory cgroup to write to, at {MEMORY}"
    return ""


def start(folder: Path, case: str, **env: str) -> Session:
    (folder / "tmp").mkdir(parents=True)
    shutil.copy(CASES / f"{case}.py", folder / "test_it.py")
    return Session(folder, *CLOCKS, env={"TMPDIR": str(folder / "tmp"), **env})


@contextlib.contextmanager
def little_memory() -> Iterator[str]:
    """A memory cgroup of 100 MB; empty where there can be none."""
    group = MEMORY / f"shardproof-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(100 << 20))
    except OSError:
        yield ""
        return
    try:
        yield str(group)
    finally:
        group.rmdir()


Outcomes = dict[str, Outcome]


@pytest.fixture(scope="session", params=[1, pytest.param(0, marks=pytest.mark.thorough)])
def faulty(request: pytest.FixtureRequest) -> int:
    """The rank that meets the faults of one run; 0 leads the process group of its world."""
    return int(request.param)


@pytest.fixture(scope="session")
def on_ranks(
    faulty: int, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Outcomes:
    """Of each phase the session with those of its cells that this run asks for."""
    asked = [
        item.callspec.params.get("cell")
        for item in request.session.items
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
    ]
    with little_memory() as memory:
        sessions = {}
        for phase in PHASES:
            cells = [c for c in ON_RANKS if c.phase == phase and c in asked and not unmet(c)]
            if not cells:
                continue
            names = [c.name for c in cells]
            folder = tmp_path_factory.mktemp(f"rank-{phase}")
            planted = {"FAULT_RANK": str(faulty), "FAULT_CELLS": "\n".join(names)}
            sessions[phase] = start(folder, "table_rank", FAULT_MEMORY=memory, **planted)
        return {phase: session.finish() for phase, session in sessions.items()}


@pytest.fixture(scope="session")
def in_parents(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Of each cell of the parent its session."""
    sessions = {
        cell.name: start(tmp_path_factory.mktemp("parent"), "table_parent", FAULT_CELL=cell.name)
        for cell in IN_PARENTS
        if not unmet(cell)
    }
    return {name: session.finish() for name, session in sessions.items()}


def assert_nothing_is_left(outcome: Outcome) -> None:
    """No process, which alone could hold a port or memory; no file but the run's own."""
    assert outcome.survivors == []
    assert os.listdir(outcome.folder / "tmp") == []
    assert not list(outcome.run_dir.glob(".*"))


def check_of(outcome: Outcome, name: str) -> dict[str, Any]:
    found = [c for c in read(outcome.run_dir)["checks"] if f"[{name}]" in c["id"]]
    assert len(found) == 1, (name, outcome.output)
    return found[0]


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(c, id=c.name, marks=[pytest.mark.thorough] if c.thorough else [])
        for c in ON_RANKS
    ],
)
def test_a_fault_of_a_rank(cell: Cell, on_ranks: Outcomes, faulty: int) -> None:
    if why := unmet(cell):
        pytest.skip(why)
    outcome = on_ranks[cell.phase]
    check = check_of(outcome, cell.name)
    assert check["verdict"] == cell.verdict, check["message"]
    assert cell.said in check["message"], check["message"]
    said = check["message"].removeprefix("the world did not start: ")
    if cell.who == RANK:
        assert said.startswith(f"rank {faulty}: "), check["message"]
    else:
        assert said.startswith("rank") is (cell.who == "any rank"), check["message"]
    assert check["seconds"] < cell.within
    after = check_of(outcome, f"after {cell.name}")
    assert after["verdict"] == "pass", after["message"]
    assert_nothing_is_left(outcome)


ENDS = {
    "no descriptors, start, the parent": 3,
    "disk full, start, the parent": 3,
    "SIGSTOP, body, the parent": 0,
    "SIGKILL, body, the parent": -9,
    "SIGKILL, report, the parent": -9,
    "disk full, report, the parent": 3,
    "clock jump, report, the parent": 0,
    "raise, report, the parent": 3,
}


@pytest.mark.parametrize("cell", IN_PARENTS, ids=lambda cell: cell.name)
@pytest.mark.thorough
def test_a_fault_of_the_parent(
    cell: Cell, in_parents: Outcomes, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why := unmet(cell):
        pytest.skip(why)
    outcome = in_parents[cell.name]
    assert outcome.exit == ENDS[cell.name]
    seen = outcome.folder / "seen.json"
    results = read(seen if seen.exists() else outcome.run_dir)
    verdicts = {c["id"].rpartition("::test_")[2]: c for c in results["checks"]}
    assert verdicts.pop("before[w2]")["verdict"] == "pass"
    if cell.verdict and not seen.exists():
        check = verdicts["planted[w2]"]
        assert check["verdict"] == cell.verdict, check["message"]
        assert cell.said in check["message"], check["message"]
        assert check["seconds"] < cell.within
        assert verdicts["after[w2]"]["verdict"] == "pass"
    else:
        assert results["run"]["exit"] == 3
        assert "after[w2]" not in verdicts
    if cell.kind == "SIGKILL":  # the next run finds what this one could not take away
        for folder in (outcome.folder / "tmp").iterdir():
            os.utime(folder, (0, 0))
        monkeypatch.setattr(tempfile, "tempdir", str(outcome.folder / "tmp"))
        local_ranks.remove_abandoned()
        for half in outcome.run_dir.glob(".results-*"):
            half.unlink()
    assert_nothing_is_left(outcome)


def test_the_page_is_that_of_the_table() -> None:
    assert PAGE.read_text() == page(), "ci/faults writes it"
