"""Runs a reproducer on real ranks: with torchrun, as a user does, or in forks of a warm process.

Torch takes seconds to import on every rank, and forks share what one process has imported; a
catalogue of runs is affordable only so. What a file sees is the same: the environment of torchrun,
with the store in a process of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_LIMIT = 60
_GRACE = 2
_INSTALL_FIRST = Path(__file__).parent / "install_first.py"
_SIGNAL = re.compile(r"Signal \d+ \((SIG(?:ABRT|SEGV|BUS|FPE|ILL|KILL))\) received")
_QUIET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    """The worst exit code of a rank."""
    signal: str
    """By which a rank was ended, as SIGABRT; empty where none was."""
    output: str
    errors: str


class ByTorchrun:
    """Each run is torchrun's."""

    def __init__(self, install: bool, *, callers: bool = False) -> None:
        self._before = [str(_INSTALL_FIRST), *["--callers"] * callers] if install else []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, path: Path, ranks: int) -> Ended:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words += ["--nproc-per-node", str(ranks), *self._before, str(path)]
        # Nothing of this project is on the path of a script that needs torch alone.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | _QUIET
        with subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        ) as running:
            try:
                output, errors = running.communicate(timeout=_LIMIT)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
                output, errors = running.communicate()
                errors += f"not over after {_LIMIT} s: its watchdog should have ended it\n"
        ended_by = _SIGNAL.search(errors)
        return Ended(running.returncode, ended_by[1] if ended_by else "", output, errors)


class Warm:
    """Each run's ranks are forks of this process, which has imported torch and has one thread."""

    def __init__(self, install: bool, *, callers: bool = False) -> None:
        self._install, self._options = install, {"callers": True} if callers else {}

    def __enter__(self) -> Self:
        from harness.system import warm

        os.environ.update(_QUIET)
        warm.warm_up(everything=True)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, path: Path, ranks: int) -> Ended:
        sys.stdout.flush()
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            port, store = _store()
            try:
                pids = [
                    _fork(
                        path,
                        rank,
                        ranks,
                        port,
                        (output.fileno(), errors.fileno()),
                        self._options if self._install else None,
                    )
                    for rank in range(ranks)
                ]
                codes = _wait(pids)
            finally:
                os.kill(store, signal.SIGKILL)
                os.waitpid(store, 0)
            texts = [_text(file.fileno()) for file in (output, errors)]
        by = [signal.Signals(-code).name for code in codes if code < 0 and -code != signal.SIGTERM]
        return Ended(max(map(abs, codes)), by[0] if by else "", *texts)


def _store() -> tuple[int, int]:
    """Start a TCPStore in a process of its own; its port, and its pid."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        from torch import distributed

        store = distributed.TCPStore(  # type: ignore[attr-defined]
            "localhost", 0, is_master=True, wait_for_workers=False
        )
        os.write(write, f"{store.port}\n".encode())
        while True:
            signal.pause()
    os.close(write)
    with os.fdopen(read) as told:
        return int(told.readline()), pid


def _fork(
    path: Path,
    rank: int,
    ranks: int,
    port: int,
    streams: tuple[int, int],
    install: dict[str, bool] | None,
) -> int:
    """Start one rank; `install` holds the options of install(), None leaves torch as it is."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number, stream in enumerate(streams, 1):
            os.dup2(stream, number)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="localhost",
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
        if install is not None:
            import shardproof

            shardproof.install(**install)
        sys.argv = [str(path)]
        runpy.run_path(str(path), run_name="__main__")
        code = 0
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(pids: list[int]) -> list[int]:
    """Exit codes, negative for signals. As under torchrun one failure ends the others."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + _LIMIT
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (got := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(got[1])
                if codes[pid]:
                    deadline = min(deadline, time.monotonic() + _GRACE)
        if time.monotonic() > deadline:
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    codes[pid] = -signal.SIGTERM
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def _text(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    with os.fdopen(os.dup(descriptor), "rb") as file:
        return file.read().decode(errors="replace")
