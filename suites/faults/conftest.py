"""Runs small suites as a user would, and reads what they leave."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CASES = Path(__file__).parent / "cases"
SUITES = Path(__file__).parent.parent
_MARK = "SHARDPROOF_FAULTS_MARK"


@dataclass
class Outcome:
    """What one session left."""

    exit: int
    output: str
    seconds: float
    folder: Path
    run_dir: Path
    survivors: list[str]
    """Command lines of processes of the session that outlived it."""

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "results.json").read_text())

    def check(self, name: str) -> dict[str, Any]:
        """The one check whose function has this name."""
        found = [c for c in self.results["checks"] if re.search(rf"::{name}(\[|$)", c["id"])]
        assert len(found) == 1, f"{name}: {[c['id'] for c in found]}\n{self.output}"
        return found[0]

    def verdicts(self) -> dict[str, str]:
        return {c["id"]: c["verdict"] for c in self.results["checks"]}


class Session:
    """A running session of the harness on a small suite."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        env: dict[str, str] | None = None,
        warm_up: bool = False,
    ) -> None:
        self.folder = folder
        self.run_dir = folder / "out" / f"run-{uuid.uuid4().hex[:8]}"
        self._mark = uuid.uuid4().hex
        self._began = time.monotonic()
        # To a file: a pipe that a leaked process holds open would keep this test waiting.
        self._output = (folder / f"output-{self._mark[:8]}.txt").open("w+")
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "harness",
                "-p",
                "harness.plugin",
                f"--rootdir={folder}",
                "--run-dir",
                str(self.run_dir),
                "-q",
                "-W",
                "error",
                "--expectations",
                str(folder / "expectations"),
                *arguments,
                *([] if warm_up else ["--no-warm-up"]),
            ],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={
                **{k: v for k, v in os.environ.items() if k != "SHARDPROOF_COMMAND"},
                _MARK: self._mark,
                "PYTHONPATH": str(SUITES),
                **(env or {}),
            },
        )

    def finish(self, timeout: float = 200) -> Outcome:
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self._output.seek(0)
            output = self._output.read()
            survivors = self.survivors()
            self._output.close()
            print(output[-20_000:])
        return Outcome(
            code, output, time.monotonic() - self._began, self.folder, self.run_dir, survivors
        )

    def survivors(self, patience: float = 0.5) -> list[str]:
        """Living processes that carry the session's mark in their environment."""
        deadline = time.monotonic() + patience
        while (found := list(_marked(self._mark))) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid, _ in found:
            os.kill(pid, signal.SIGKILL)
        return [command for _, command in found]


def _marked(mark: str) -> Iterator[tuple[int, str]]:
    needle = f"{_MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if needle in (entry / "environ").read_bytes():
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                yield int(entry.name), command.decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue


@pytest.fixture
def suite(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder with a small suite: `suite("its source")`, or `suite(case="its file")`."""

    def make(source: str = "", case: str = "") -> Path:
        target = tmp_path / "test_it.py"
        if case:
            shutil.copy(CASES / f"{case}.py", target)
        else:
            target.write_text(source)
        return tmp_path

    return make
