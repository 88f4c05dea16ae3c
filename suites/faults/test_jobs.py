"""Several checks at a time: the same verdicts, each blamed on its own check, nothing left."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.sessions import Outcome, Session
from report.read import read

Suite = Callable[..., Path]

MIXED = """
import os, signal, time, warnings, pytest, torch
import torch.distributed as dist
@pytest.fixture(scope="module")
def once(tmp_path_factory):
    with open(os.environ["NOTES"], "a") as file: file.write("once\\n")
    return tmp_path_factory.mktemp("once")
@pytest.mark.world(2)
class TestWorlds:
    @pytest.mark.parametrize("number", range(4))
    def test_sum(self, rank, number):
        total = torch.tensor([rank * number]); dist.all_reduce(total); assert total.item() == number
    def test_fails(self, rank): assert rank == 0
    def test_dies(self, rank):
        time.sleep(0.3)
        if rank == 1: os.kill(os.getpid(), signal.SIGKILL)
    def test_leaks(self, rank): os.environ["LEFT"] = "behind"
    def test_forks(self, rank):
        if rank == 0 and os.fork() == 0:
            os.setsid(); time.sleep(100)
    def test_hangs(self, rank):
        if rank == 0: dist.barrier()
        else: time.sleep(100)
@pytest.mark.world(2, reuse=True)
class TestShared:
    @pytest.mark.parametrize("number", range(3))
    def test_it(self, number): dist.barrier()
def test_first(once): assert once.is_dir()
def test_plain_failure(tmp_path, capsys):
    print("what it printed"); assert False
def test_second(once): assert once.is_dir()
def test_skips(): pytest.skip("not here")
"""
LIMITS = ("--collective-limit", "3", "--check-limit", "6")


def run(folder: Path, *arguments: str, **env: str) -> Outcome:
    return Session(folder, *arguments, env={"NOTES": str(folder / "notes"), **env}).finish()


def told(outcome: Outcome) -> dict[str, tuple[str, str, str]]:
    return {
        check["id"]: (check["verdict"], check["message"].partition(" 0x")[0], check["command"])
        for check in outcome.results["checks"]
        if "child process" not in check["message"]  # the message has its number
    }


@pytest.mark.thorough
def test_verdicts_do_not_depend_on_how_many_are_judged_at_a_time(suite: Suite) -> None:
    folder = suite(MIXED)
    one = run(folder, *LIMITS, "--jobs", "1")
    assert sorted(set(one.verdicts().values())) == [
        "crash",
        "fail",
        "pass",
        "precondition",
        "timeout",
    ]
    for count, order in (("2", "normal"), ("4", "random:5"), ("3", "reverse")):
        (folder / "notes").unlink()
        other = run(folder, *LIMITS, "--jobs", count, "--order", order)
        assert other.results["run"]["jobs"] == int(count)
        assert other.verdicts() == one.verdicts()
        assert other.exit == one.exit == 1
        assert other.survivors == []
        assert (folder / "notes").read_text() == "once\n"
        assert "what it printed" in other.output
        if order == "normal":
            assert list(other.verdicts()) == list(one.verdicts())
            assert told(other) == told(one)


SLEEPERS = """
import os, time, pathlib, pytest
pytestmark = pytest.mark.world(2)
@pytest.mark.parametrize("number", range(6))
def test_sleeps(rank, number):
    if number:
        pathlib.Path(os.environ["STARTED"], f"{number} {rank}").touch()
        time.sleep(1000)
"""


def _wait_for(count: int, folder: Path, session: Session) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < count:
        assert session.process.poll() is None, "the session ended early"
        assert time.monotonic() < deadline, "the checks never started"
        time.sleep(0.05)


def sleeping(folder: Path) -> Session:
    started = folder / "started"
    started.mkdir()
    env = {"STARTED": str(started)}
    session = Session(folder, "--jobs", "4", "--check-limit", "90", env=env)
    _wait_for(8, started, session)
    return session


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.thorough(but=["15"])
def test_an_interrupt_ends_all_worlds_that_are_under_way(
    suite: Suite, number: signal.Signals
) -> None:
    session = sleeping(suite(SLEEPERS))
    session.process.send_signal(number)
    outcome = session.finish(timeout=60)
    assert outcome.survivors == []
    assert outcome.exit == 3
    assert outcome.verdicts() == {"test_it.py::test_sleeps[w2-0]": "pass"}
    assert "5 of 6 selected checks did not run" in outcome.output


def test_a_killed_run_leaves_no_judge_and_no_rank(suite: Suite) -> None:
    session = sleeping(suite(SLEEPERS))
    session.process.kill()
    outcome = session.finish(timeout=60)
    assert outcome.survivors == []
    assert [check["verdict"] for check in read(outcome.run_dir)["checks"]] == ["pass"]


@pytest.mark.thorough
def test_a_judge_that_dies_is_replaced_and_its_check_is_an_error(suite: Suite) -> None:
    folder = suite(
        "import os, pytest, signal, time\n"
        "@pytest.mark.world(2)\n"
        "@pytest.mark.parametrize('n', range(8))\n"
        "def test_it(rank, n):\n"
        "    if n == 2 and rank == 0: os.kill(os.getppid(), signal.SIGKILL); time.sleep(100)\n"
        "def test_plain(): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    outcome = Session(folder, "--jobs", "2").finish()
    verdicts = outcome.verdicts()
    assert verdicts.pop("test_it.py::test_it[w2-2]") == "error"
    assert verdicts.pop("test_it.py::test_plain") == "error"
    assert set(verdicts.values()) == {"pass"}
    assert len(verdicts) == 7
    for name in (r"test_it\[w2-2\]", "test_plain"):
        message = outcome.check(name)["message"]
        assert message == "the process that judged it ended with signal SIGKILL"
    assert outcome.exit == 3
    assert outcome.survivors == []


@pytest.mark.thorough
def test_what_needs_the_machine_for_itself_has_it(suite: Suite) -> None:
    folder = suite(
        "import os, pytest, time\n"
        "def note(kind, begin):\n"
        "    with open(os.environ['NOTES'], 'a') as file:\n"
        "        file.write(f'{kind} {begin} {time.monotonic()}\\n')\n"
        "@pytest.mark.alone\n"
        "@pytest.mark.world(2)\n"
        "@pytest.mark.parametrize('n', range(2))\n"
        "def test_alone(rank, n): begin = time.monotonic(); time.sleep(0.3); note('alone', begin)\n"
        "@pytest.mark.world(2)\n"
        "@pytest.mark.parametrize('n', range(6))\n"
        "def test_other(rank, n): begin = time.monotonic(); time.sleep(0.3); note(n, begin)\n"
        "@pytest.mark.alone\n"
        "def test_plain(): begin = time.monotonic(); time.sleep(0.3); note('plain', begin)\n"
    )
    outcome = run(folder, "--jobs", "3")
    assert outcome.exit == 0, outcome.output
    rows = [line.split() for line in (folder / "notes").read_text().splitlines()]
    spans = [(kind, float(begin), float(end)) for kind, begin, end in rows]
    others = [span for span in spans if span[0].isdigit()]
    assert any(a[0] != b[0] and a[1] < b[2] and b[1] < a[2] for a in others for b in others)
    for index, (kind, begin, end) in enumerate(spans):
        for other, its_begin, its_end in spans[:index]:
            if ("alone" in (kind, other) and kind != other) or "plain" in (kind, other):
                assert end < its_begin or its_end < begin, (kind, other)


@pytest.mark.thorough
def test_a_timeout_counts_when_nothing_runs_beside_the_check(suite: Suite) -> None:
    folder = suite(
        "import os, pathlib, pytest, time\n"
        "pytestmark = pytest.mark.world(2)\n"
        "@pytest.mark.parametrize('n', range(2))\n"
        "def test_slow_at_first(rank, n):\n"
        "    seen = pathlib.Path(os.environ['NOTES'] + f'{n} {rank}')\n"
        "    if not seen.exists(): seen.touch(); time.sleep(100)\n"
        "def test_hangs(rank): time.sleep(100)\n"
        "def test_passes(rank): pass\n"
    )
    outcome = run(folder, *LIMITS, "--jobs", "2")
    assert list(outcome.verdicts().values()) == ["pass", "pass", "timeout", "pass"]
    said = "judged alone, after a timeout beside other checks: "
    assert outcome.check(r"test_slow_at_first\[w2-1\]")["message"].startswith(said)
    assert said not in outcome.check("test_hangs")["message"]
    assert outcome.exit == 1


@pytest.mark.thorough
def test_a_run_stops_at_the_first_failure_and_begins_with_it_again(suite: Suite) -> None:
    folder = suite(
        "import pytest, time\n"
        "pytestmark = pytest.mark.world(2)\n"
        "@pytest.mark.parametrize('n', range(9))\n"
        "def test_it(n):\n"
        "    time.sleep(0.2)\n"
        "    assert n != 2\n"
    )
    first = Session(folder, "-x", "--jobs", "2").finish()
    assert first.exit == 1
    assert 1 <= len(first.verdicts()) < 9
    assert [n for n, v in first.verdicts().items() if v != "pass"] == ["test_it.py::test_it[w2-2]"]
    again = Session(folder, "--lf", "--jobs", "2").finish()
    assert again.verdicts() == {"test_it.py::test_it[w2-2]": "fail"}
    assert first.survivors == again.survivors == []


@pytest.mark.thorough
def test_an_error_of_a_fixture_is_told_as_with_one_at_a_time(suite: Suite) -> None:
    folder = suite(
        "import pytest\n"
        "@pytest.fixture(scope='module')\n"
        "def broken(): raise OSError('no such thing')\n"
        "@pytest.fixture\n"
        "def breaks_later():\n"
        "    yield\n"
        "    raise OSError('too late')\n"
        "def test_one(broken): pass\n"
        "def test_two(breaks_later): pass\n"
        "@pytest.mark.world(1)\n"
        "def test_three(): pass\n"
    )
    one, two = (Session(folder, "--jobs", count).finish() for count in ("1", "2"))
    assert told(one) == told(two)
    assert list(one.verdicts().values()) == ["error", "error", "pass"]
    assert one.exit == two.exit == 3


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_a_number_that_is_none_is_refused(suite: Suite, value: str) -> None:
    folder = suite("def test_it(): pass\n")
    outcome = Session(folder, f"--jobs={value}").finish()
    assert outcome.exit == 2
    assert f"--jobs {value!r}: expected a number from 1 up" in outcome.output
