"""Whole sessions: interrupted, side by side, in other orders, narrowed, over their limit."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.sessions import Session

SLEEPER = """
import os, time, pathlib, pytest
pytestmark = pytest.mark.world(2)
def test_first(rank): pass
def test_sleeps(rank):
    pathlib.Path(os.environ["STARTED"]).touch()
    time.sleep(1000)
def test_last(rank): pass
"""

MIXED = """
import os, pytest, torch
import torch.distributed as dist
pytestmark = pytest.mark.world(2)
@pytest.mark.parametrize("number", [1, 2])
def test_sum(rank, number):
    total = torch.tensor([rank * number]); dist.all_reduce(total); assert total.item() == number
def test_fails(rank): assert rank == 0
@pytest.mark.world(1, 3)
def test_size(world): assert dist.get_world_size() == world.size
def test_exits(rank):
    if rank == 1: os._exit(3)
class TestMesh:
    def test_mesh(self, mesh, rank, device):
        found = mesh(2)
        assert found.get_local_rank() == rank and device.type == "cpu"
def test_plain_output(capsys, tmp_path):
    print("hello"); (tmp_path / "x").write_text("y")
    assert capsys.readouterr().out == "hello\\n"
"""

SPAWNED = "fails or exits or mesh"  # a spawned rank imports all again: a few of them will do
Suite = Callable[..., Path]


def _wait_for(path: Path, session: Session) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert session.process.poll() is None, "the session ended early"
        assert time.monotonic() < deadline, "the check never started"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.thorough(but=["2"])
def test_an_interrupted_session_says_what_it_did_and_leaves_nothing(
    suite: Suite, number: signal.Signals
) -> None:
    folder = suite(SLEEPER)
    session = Session(folder, "--check-limit", "60", env={"STARTED": str(folder / "started")})
    _wait_for(folder / "started", session)
    session.process.send_signal(number)
    outcome = session.finish(timeout=60)
    assert outcome.survivors == []
    assert outcome.exit == 3
    assert list(outcome.verdicts().values()) == ["pass"]
    assert outcome.results["run"]["selected"] == 3
    assert "2 of 3 selected checks did not run" in outcome.output


SWALLOWER = """
import os, pathlib, signal
def test_swallows():
    try: os.kill(os.getpid(), signal.SIGTERM)
    except BaseException: pass
def test_next(): pathlib.Path(os.environ["STARTED"]).touch()
"""


def test_an_interruption_that_a_test_swallows_is_one_still(suite: Suite) -> None:
    """As is one that arrives while a finalizer runs, which loses the exception."""
    folder = suite(SWALLOWER)
    outcome = Session(folder, env={"STARTED": str(folder / "started")}).finish(timeout=60)
    assert outcome.exit == 3
    assert not (folder / "started").exists()
    assert "KeyboardInterrupt: signal 15" in outcome.output


@pytest.mark.thorough
def test_two_sessions_at_once_do_not_meet(suite: Suite) -> None:
    folder = suite(MIXED)
    one, two = Session(folder), Session(folder)
    first, second = one.finish(), two.finish()
    assert first.verdicts() == second.verdicts()
    assert sorted(set(first.verdicts().values())) == ["crash", "fail", "pass"]
    assert (folder / "out" / "latest").resolve() in {first.run_dir, second.run_dir}


@pytest.mark.thorough
def test_order_and_start_method_change_no_verdict(suite: Suite) -> None:
    folder = suite(MIXED)
    normal = Session(folder).finish()
    reverse = Session(folder, "--order", "reverse").finish()
    shuffled = Session(folder, "--order", "random:7").finish()
    spawned = Session(folder, "--start-method", "spawn", "-k", SPAWNED).finish()
    verdicts = normal.verdicts()
    assert sorted(set(verdicts.values())) == ["crash", "fail", "pass"]
    assert list(reverse.verdicts()) == list(reversed(verdicts))
    assert list(shuffled.verdicts()) not in (list(verdicts), list(reverse.verdicts()))
    assert reverse.verdicts() == shuffled.verdicts() == verdicts
    assert sorted(set(spawned.verdicts().values())) == ["crash", "fail", "pass"]
    said = {c["id"]: (c["verdict"], c["message"]) for c in normal.results["checks"]}
    for other in (reverse, shuffled, spawned):
        for check in other.results["checks"]:
            assert (check["verdict"], check["message"]) == said[check["id"]]
    assert normal.exit == reverse.exit == shuffled.exit == spawned.exit == 1


@pytest.mark.thorough
def test_a_run_is_narrowed_as_pytest_users_expect(suite: Suite) -> None:
    folder = suite(MIXED)
    named = Session(folder, "-k", "sum or fails", "-x", "--order", "reverse").finish()
    assert named.verdicts() == {"test_it.py::test_fails[w2]": "fail"}
    assert named.exit == 1
    again = Session(folder, "--lf").finish()
    assert again.verdicts() == {"test_it.py::test_fails[w2]": "fail"}
    one = Session(
        folder, "test_it.py::test_sum[w2-2]", "--junit-xml", str(folder / "j.xml")
    ).finish()
    assert one.verdicts() == {"test_it.py::test_sum[w2-2]": "pass"}
    assert one.exit == 0
    assert 'tests="1"' in (folder / "j.xml").read_text()


def test_the_command_of_a_check_repeats_it(suite: Suite) -> None:
    folder = suite(MIXED)
    outcome = Session(folder, "-k", "size", "--seed", "5").finish()
    command = outcome.check(r"test_size\[w3\]")["command"]
    assert (
        command
        == "python -m pytest --subject torch.distributed --seed 5 'test_it.py::test_size[w3]'"
    )
    assert (outcome.run_dir / "junit.xml").exists()


@pytest.mark.thorough
def test_a_session_over_its_limit_is_not_green(suite: Suite) -> None:
    folder = suite(
        "import pytest, time\n"
        "@pytest.mark.world(1)\n"
        "@pytest.mark.parametrize('n', range(9))\n"
        "def test_slow(n): time.sleep(1)\n"
    )
    outcome = Session(
        folder, "--collective-limit", "2", "--check-limit", "5", "--session-limit", "8"
    ).finish()
    ran = outcome.verdicts()
    assert 0 < len(ran) < 9
    assert set(ran.values()) == {"pass"}
    assert outcome.exit == 3
    assert "the session's limit of 8 s is over" in outcome.output


def test_a_world_that_cannot_start_is_the_environments_error(suite: Suite) -> None:
    folder = suite("import pytest\n@pytest.mark.world(2)\ndef test_it(rank): pass\n")
    outcome = Session(folder, env={"GLOO_SOCKET_IFNAME": "nosuch0"}).finish()
    check = outcome.check("test_it")
    assert check["verdict"] == "error"
    assert "the world did not start: rank" in check["message"]
    assert outcome.exit == 3


def test_a_parent_with_threads_starts_no_rank(suite: Suite) -> None:
    folder = suite(
        "import pytest, threading, time\n"
        "threading.Thread(target=time.sleep, args=(20,), name='busy', daemon=True).start()\n"
        "@pytest.mark.world(2)\n"
        "def test_it(rank): pass\n"
    )
    outcome = Session(folder).finish()
    check = outcome.check("test_it")
    assert check["verdict"] == "error"
    assert re.search(r"the parent has 2 threads .*busy", check["message"])


def test_a_world_is_shared_only_where_asked_and_never_after_a_failure(suite: Suite) -> None:
    folder = suite(
        "import os, pytest, torch\n"
        "import torch.distributed as dist\n"
        "@pytest.mark.world(2, reuse=True)\n"
        "class TestShared:\n"
        "    pids = {}\n"
        "    @pytest.mark.parametrize('n', range(5))\n"
        "    def test_it(self, world, rank, n):\n"
        "        dist.barrier()\n"
        "        with open(os.environ['PIDS'], 'a') as file:\n"
        "            file.write(f'{n} {rank} {os.getpid()}\\n')\n"
        "        assert not (n == 2 and rank == 1)\n"
    )
    outcome = Session(folder, env={"PIDS": str(folder / "pids")}).finish()
    assert list(outcome.verdicts().values()) == ["pass", "pass", "fail", "pass", "pass"]
    rows = [line.split() for line in (folder / "pids").read_text().splitlines()]
    of = {(n, rank): pid for n, rank, pid in rows}
    assert of["0", "0"] == of["1", "0"] == of["2", "0"]
    assert of["3", "0"] == of["4", "0"] != of["2", "0"]
    assert outcome.survivors == []


@pytest.mark.parametrize("world", ["2", "2, reuse=True"])
def test_warning_filters_are_those_of_the_check(suite: Suite, world: str) -> None:
    """The ranks of a check start, or have run another, under the filters of the one before."""
    folder = suite(
        "import pytest, warnings\n"
        f"@pytest.mark.world({world})\n"
        "class TestFilters:\n"
        "    @pytest.mark.filterwarnings('ignore:loud')\n"
        "    def test_ignores(self):\n"
        "        warnings.warn('loud')\n"
        "    def test_does_not(self):\n"
        "        with pytest.raises(UserWarning):\n"
        "            warnings.warn('loud')\n"
        "    @pytest.mark.filterwarnings('ignore:loud')\n"
        "    def test_ignores_again(self):\n"
        "        warnings.warn('loud')\n"
    )
    outcome = Session(folder).finish()
    assert list(outcome.verdicts().values()) == ["pass", "pass", "pass"], outcome.output


@pytest.mark.thorough
def test_the_world_that_starts_ahead_suffers_nothing_from_the_one_that_runs(suite: Suite) -> None:
    folder = suite(
        "import os, pytest, signal, time\n"
        "@pytest.mark.world(3)\n"
        "@pytest.mark.parametrize('n', range(4))\n"
        "def test_it(rank, n):\n"
        "    if n % 2 == 0 and rank == 1:\n"
        "        if os.fork() == 0:\n"  # an orphan that the parent adopts
        "            os.setsid()\n"
        "            time.sleep(60)\n"
        "        time.sleep(0.5)\n"  # the next world has started by now
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    outcome = Session(folder).finish()
    assert list(outcome.verdicts().values()) == ["crash", "pass", "crash", "pass"], outcome.output
    assert outcome.survivors == []


def test_the_world_that_starts_ahead_is_ended_where_the_session_stops(suite: Suite) -> None:
    folder = suite(
        "import pytest, time\n"
        "@pytest.mark.world(2)\n"
        "@pytest.mark.parametrize('n', range(3))\n"
        "def test_it(n):\n"
        "    time.sleep(0.5)\n"
        "    assert n\n"
    )
    outcome = Session(folder, "-x").finish()
    assert list(outcome.verdicts().values()) == ["fail"], outcome.output
    assert outcome.survivors == []


def test_environment_of_the_caller_reaches_the_ranks(suite: Suite) -> None:
    folder = suite(
        "import os, pytest\n@pytest.mark.world(2)\n"
        "def test_it(rank):\n"
        "    assert os.environ['OMP_NUM_THREADS'] == '1' and os.environ['MINE'] == 'yes'\n"
        "    assert os.environ['RANK'] == str(rank) and os.environ['WORLD_SIZE'] == '2'\n"
    )
    outcome = Session(folder, env={"OMP_NUM_THREADS": "8", "MINE": "yes"}).finish()
    assert outcome.exit == 0, os.linesep + outcome.output
