"""The session of a run: what becomes of wrong results, dead ranks, hangs, clients and owners."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import session_client
from benchmarks.settings import PREFIX, Settings
from harness.system import processes

FAULTY = '''
import os, time
from pathlib import Path
from benchmarks.base import Measured
from benchmarks.work import Work

class Faulty(Measured):
    """A benchmark whose reference misbehaves as its class says."""
    regimes, sizes = ("model",), (2,)
    count = 0

    def work(self, ctx):
        def call():
            type(self).count += 1
            return self.fault(ctx) if bed_arm == "shardproof" else 1
        def check(got):
            assert got == 1, f"got {got}"
        bed_arm = ctx.arm
        return Work(call, check, lambda: None)

    def floor(self, ctx):
        return self.work(ctx)

class Wrong(Faulty):
    def fault(self, ctx):
        return 2

class WrongLate(Faulty):
    def fault(self, ctx):
        return 1 if self.count < 12 else 2

class Raises(Faulty):
    def fault(self, ctx):
        raise RuntimeError("refused on purpose")

class Dies(Faulty):
    def fault(self, ctx):
        if ctx.rank == 1:
            os._exit(7)
        return 1

class Lags(Faulty):
    def fault(self, ctx):
        time.sleep(0.03 * ctx.rank)
        return 1

class Hangs(Faulty):
    def fault(self, ctx):
        Path(os.environ["PIDS"], str(os.getpid())).touch()
        time.sleep(1000)
'''
SETTINGS = Settings(quick=True, seconds=0.1, deadline=8.0)
LONG = replace(SETTINGS, deadline=60.0)


class Run:
    """A process that stands for asv, and the folder where its session lives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.owner = subprocess.Popen(["sleep", "300"])

    @property
    def home(self) -> Path:
        return self.folder / f"shardproof-bench-{os.getuid()}" / str(self.owner.pid)

    def server(self) -> int:
        """The server's pid."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(str(self.home / "socket"))
            peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(peer[:4], sys.byteorder)

    def ask(self, name: str, settings: Settings = SETTINGS) -> dict[str, Any]:
        """What the session says of one of the FAULTY benchmarks."""
        return session_client.ask(request(name), settings)["arms"]


def request(name: str) -> dict[str, Any]:
    return {"module": "faulty", "benchmark": name, "regime": "model", "size": 2, "reader": "test"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("run")
    (folder / "faulty.py").write_text(FAULTY)
    (folder / "pids").mkdir()
    made = Run(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("PIDS", str(folder / "pids"))
        patch.setenv(f"{PREFIX}OWNER", str(made.owner.pid))
        yield made
    made.owner.kill()
    made.owner.wait()


@pytest.mark.parametrize("name", ["Wrong", "WrongLate"])
def test_a_wrong_result_has_no_number(run: Run, name: str) -> None:
    """Wrong at once or in a later round: no sample of that arm survives; the others' do."""
    arms = run.ask(name)
    assert "its result is wrong: got 2" in arms["shardproof"]["wrong"]
    assert arms["shardproof"]["seconds"] == []
    assert "median" not in arms["shardproof"]
    assert "peak" not in arms["shardproof"]
    assert arms["floor"]["seconds"]
    assert not arms["floor"]["wrong"]


def test_the_slowest_rank_counts(run: Run) -> None:
    """A call is over when its last rank is done: each time is that rank's."""
    arms = run.ask("Lags")
    (ours,), (floor,) = arms["shardproof"]["seconds"], arms["floor"]["seconds"]
    assert min(ours) >= 0.03
    assert max(floor) < 0.03
    assert len(floor) == len(ours), "rounds"


def test_an_exception_has_no_number(run: Run) -> None:
    """The text of the exception is told, and no number."""
    found = run.ask("Raises")["shardproof"]
    assert "RuntimeError: refused on purpose" in found["wrong"]
    assert found["seconds"] == []


def test_a_dead_rank_is_an_error(run: Run) -> None:
    """The rank that died is named, with its exit code; there is no answer at all."""
    with pytest.raises(session_client.SessionError, match="rank 1: exited with 7"):
        run.ask("Dies")


def test_a_hang_ends_at_the_deadline(run: Run) -> None:
    """A rank that never returns is ended, and the server answers the next request."""
    begin = time.monotonic()
    with pytest.raises(session_client.SessionError, match="never answered"):
        run.ask("Hangs")
    assert time.monotonic() - begin < SETTINGS.limit + 20
    assert_gone(run)
    assert run.ask("Wrong")["floor"]["seconds"]


def assert_gone(run: Run, within: float = 15) -> None:
    """The ranks that hang are no more; forget them."""
    pids = [int(file.name) for file in (run.folder / "pids").iterdir()]
    assert pids, "no rank has begun"
    deadline = time.monotonic() + within
    while any(processes.state(pid) not in {"", "Z"} for pid in pids):
        assert time.monotonic() < deadline, f"still there: {pids}"
        time.sleep(0.05)
    for file in (run.folder / "pids").iterdir():
        file.unlink()


def wait_for_ranks(run: Run) -> None:
    deadline = time.monotonic() + 30
    while len(list((run.folder / "pids").iterdir())) < 2:
        assert time.monotonic() < deadline, "the ranks never began"
        time.sleep(0.05)


def start_and_leave_alone(run: Run, settings: Settings) -> subprocess.Popen[bytes]:
    """A client in a process of its own, as asv starts them, in the middle of a measurement."""
    code = (
        "import json, sys; from benchmarks import session_client; "
        "from benchmarks.settings import Settings; "
        "session_client.ask(json.loads(sys.argv[1]), Settings(**json.loads(sys.argv[2])))"
    )
    arguments = [json.dumps(request("Hangs")), json.dumps(vars(settings))]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments])
    wait_for_ranks(run)
    return process


def test_a_killed_client_takes_its_ranks_along(run: Run) -> None:
    """Asv kills a benchmark: its ranks end, the session goes on with the same server."""
    run.ask("Wrong")
    server = run.server()
    process = start_and_leave_alone(run, SETTINGS)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert_gone(run, within=4)  # sooner than their deadline
    assert run.ask("Wrong")["floor"]["seconds"]
    assert run.server() == server


def test_other_settings_get_another_server(run: Run) -> None:
    """A server never answers for other code or settings than it was started with."""
    run.ask("Wrong")
    server = run.server()
    assert run.ask("Wrong", LONG)["floor"]["seconds"]
    assert run.server() != server
    deadline = time.monotonic() + 15
    while processes.state(server) not in {"", "Z"}:
        assert time.monotonic() < deadline, "the old one is still there"
        time.sleep(0.05)


def test_nothing_outlives_the_run(run: Run) -> None:
    """When asv ends, however it ends, server and ranks end, even within a measurement."""
    process = start_and_leave_alone(run, LONG)
    server = run.server()
    run.owner.kill()
    run.owner.wait()
    process.wait(timeout=20)
    assert process.returncode != 0
    assert_gone(run)
    deadline = time.monotonic() + 15
    while processes.state(server) not in {"", "Z"}:
        assert time.monotonic() < deadline, "the server is still there"
        time.sleep(0.05)
    assert not (run.home / "socket").exists()
