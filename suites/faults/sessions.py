"""A run of the harness on a small suite, as a user would start it, and what it leaves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from faults.launcher import SUITES, Launcher

CASES = Path(__file__).parent / "cases"


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
    """A running session of the harness on a small suite.

    `fresh`: in an interpreter of its own, with all that it imports, as a user starts it; else in a
    fork of one that has imported torch, without what only some checks need (`warm`: with it). One
    check at a time, but for SHARDPROOF_FAULTS_JOBS or --jobs among the arguments.
    """

    launcher: ClassVar[Launcher]

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        env: dict[str, str] | None = None,
        fresh: bool = False,
        warm: bool = False,
    ) -> None:
        self.folder = folder
        name = uuid.uuid4().hex[:8]
        self.run_dir = folder / "out" / f"run-{name}"
        self._began = time.monotonic()
        # To a file: a pipe that a leaked process holds open would keep this test waiting.
        self._output = folder / f"output-{name}.txt"
        self.process = self.launcher.start(
            [
                *("-p", "harness.session.plugin"),
                f"--rootdir={folder}",
                *("--run-dir", str(self.run_dir)),
                "-q",
                *("-W", "error"),
                *("--expectations", str(folder / "expectations")),
                *("--jobs", os.environ.get("SHARDPROOF_FAULTS_JOBS", "1")),
                *arguments,
                # Imports that take seconds, and are no part of what most sessions are to show.
                *([] if fresh else ["-p", "no:hypothesispytest"]),
                *([] if fresh or warm else ["--no-warm-up"]),
            ],
            cwd=folder,
            output=self._output,
            env={
                **{k: v for k, v in os.environ.items() if k != "SHARDPROOF_COMMAND"},
                "PYTHONPATH": str(SUITES),
                **(env or {}),
            },
            fresh=fresh,
        )

    def finish(self, timeout: float = 200) -> Outcome:
        """Wait for the end; what the session left alive is ended, and told."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            survivors = self.process.survivors()
            output = self._output.read_text(errors="replace")
            print(output[-20_000:])
        return Outcome(
            code, output, time.monotonic() - self._began, self.folder, self.run_dir, survivors
        )
