"""Several nodes on this machine: a launcher each, as a user would start it on each of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from faults.launcher import SUITES
from harness.system import processes

LIMIT = 120.0


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class NodeProcess:
    """One node: a launcher, the worker under it, and the worker's ranks."""

    def __init__(
        self,
        suite: Path,
        port: int,
        nodes: int,
        *arguments: str,
        prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        hosts: tuple[str, str] = ("127.0.0.1", "127.0.0.1"),
    ) -> None:
        folder = suite if suite.is_dir() else suite.parent
        self.output = folder / f"node-{time.monotonic_ns()}.txt"
        self.run_dir = self.output.with_suffix("")
        environment = os.environ | {"PYTHONPATH": str(SUITES)} | dict(env or {})
        rendezvous, own = hosts
        with self.output.open("w") as out:
            self._process = subprocess.Popen(
                [
                    *prefix,
                    *(sys.executable, "-m", "harness.nodes.launch", "--nnodes", str(nodes)),
                    *("--nproc-per-node", "2", "--rendezvous", f"{rendezvous}:{port}"),
                    *("--local-address", own, "--no-warm-up", "-q"),
                    *("-p", "harness.session.plugin", "-p", "no:hypothesispytest"),
                    *("--rootdir", str(folder), "--run-dir", str(self.run_dir)),
                    *("--expectations", str(folder / "expectations"), *arguments, str(suite)),
                ],
                cwd=folder,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        """All it wrote so far."""
        return self.output.read_text(errors="replace")

    @property
    def results(self) -> dict[str, Any] | None:
        """Its results.json, which only the first node leaves."""
        path = self.run_dir / "results.json"
        return json.loads(path.read_text()) if path.exists() else None

    def family(self) -> list[int]:
        """The launcher and all that descend from it."""
        found, open_ends = [], [self._process.pid]
        while open_ends:
            pid = open_ends.pop()
            found.append(pid)
            open_ends += processes.children(pid)
        return found

    def signal_all(self, number: signal.Signals) -> list[int]:
        """Signal the whole node at once, as a machine's end does; the processes that it had."""
        family = self.family()
        for pid in family:
            processes.signal_quietly(pid, number)
        return family

    def end(self) -> None:
        """End it, where a test did not wait for it."""
        self.signal_all(signal.SIGKILL)
        self._process.wait()

    def finish(self) -> int:
        """Its exit code; ends it when it takes too long."""
        try:
            return self._process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"no end within {LIMIT:g} s:\n{self.text}") from None


def run(suite: Path, *arguments: str) -> tuple[NodeProcess, NodeProcess]:
    """Two nodes from start to end: (the first, which leaves the results; the other)."""
    port = free_port()
    pair = [NodeProcess(suite, port, 2, *arguments) for _ in range(2)]
    for node in pair:
        node.finish()
    return first_of(pair)


def first_of(pair: list[NodeProcess]) -> tuple[NodeProcess, NodeProcess]:
    """The pair, the node that collects before the other."""
    one, other = pair
    if one.results is None and not one.run_dir.exists():
        one, other = other, one
    return one, other
