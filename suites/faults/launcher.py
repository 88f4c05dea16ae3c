"""Starts the sessions that the tests of the harness run: a process of one thread, torch imported.

A session of the harness on a small suite spends nine tenths of its time on importing torch. This
process imports it once and forks a session for each request; the fork then runs `harness` as
`python -m harness` would. A session that must begin as a user's does is forked and executed
afresh instead (`fresh`). The launcher adopts the orphans of its sessions, so that whatever one
leaves behind is its child, under whichever environment, group or session it tries to hide.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness.system import processes, warm

SUITES = Path(__file__).parent.parent


class Launcher:
    """The end of the tests: starts sessions, and asks after them."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "faults.launcher", str(theirs.fileno())],
                cwd=SUITES,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": str(SUITES)},
                pass_fds=[theirs.fileno()],
            )
        self._socket = ours
        self._stream = ours.makefile("rw")

    def close(self) -> None:
        """End the launcher; sessions end with it."""
        self._stream.close()
        self._socket.close()
        self._server.wait(30)

    def ask(self, operation: str, **values: Any) -> Any:
        """One request, and its answer."""
        self._stream.write(json.dumps([operation, values]) + "\n")
        self._stream.flush()
        answer = self._stream.readline()
        if not answer:
            raise RuntimeError(f"the launcher of sessions is gone: exit {self._server.wait(30)}")
        return json.loads(answer)

    def start(
        self, arguments: list[str], cwd: Path, output: Path, env: dict[str, str], *, fresh: bool
    ) -> Launched:
        """Run `python -m harness ARGUMENTS` in `cwd`, its output into the file `output`."""
        values = {"arguments": arguments, "cwd": str(cwd), "output": str(output)}
        return Launched(self, self.ask("start", **values, env=env, fresh=fresh))


class Launched:
    """A session, with the methods of `subprocess.Popen` that the tests need."""

    def __init__(self, launcher: Launcher, pid: int) -> None:
        self._launcher = launcher
        self.pid = pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while it runs."""
        code: int | None = self._launcher.ask("poll", pid=self.pid)
        return code

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"session {self.pid}", timeout)
            time.sleep(0.02)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        self._launcher.ask("signal", pid=self.pid, number=int(number))

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def survivors(self) -> list[str]:
        """Command lines of what ended sessions left alive; it is ended now."""
        found: list[str] = self._launcher.ask("survivors")
        return found


class _Server:
    """The launcher itself."""

    def __init__(self) -> None:
        self._codes: dict[int, int | None] = {}

    def start(
        self, arguments: list[str], cwd: str, output: str, env: dict[str, str], fresh: bool
    ) -> int:
        parent = os.getpid()
        pid = os.fork()
        if pid:
            self._codes[pid] = None
            return pid
        processes.die_with_parent(parent)
        # What a shell starts in the background ignores it, and hands that on.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(cwd)
        for descriptor, path, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND),
        ):
            opened = os.open(path, flags, 0o600)
            os.dup2(opened, descriptor)
            os.close(opened)
        os.dup2(1, 2)
        command = [sys.executable, "-m", "harness", *arguments]
        if fresh:
            os.execve(sys.executable, command, env)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = ["harness", *arguments]
        paths = env.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:1] = [cwd, *(path for path in paths if path and path not in sys.path)]
        raise _Become

    def poll(self, pid: int) -> int | None:
        self._reap()
        return self._codes[pid]

    def signal(self, pid: int, number: int) -> None:
        self._reap()
        if self._codes[pid] is None:
            os.kill(pid, number)

    def survivors(self) -> list[str]:
        deadline = time.monotonic() + 0.5
        while (found := self._strangers()) and time.monotonic() < deadline:
            time.sleep(0.02)
        named = [processes.command(pid) for pid in found]
        known = frozenset(pid for pid, code in self._codes.items() if code is None)
        if found:
            processes.reap(known)
        return named

    def _strangers(self) -> list[int]:
        self._reap()
        return [
            pid
            for pid in processes.children(os.getpid())
            if self._codes.get(pid, 0) is not None and processes.state(pid) not in {"Z", ""}
        ]

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                if pid in self._codes:
                    self._codes[pid] = os.waitstatus_to_exitcode(status)


class _Become(BaseException):
    """Unwinds a forked child to the top, where it becomes a session."""


def _serve(descriptor: int) -> None:
    processes.die_with_parent(os.getppid())
    processes.adopt_orphans()
    warm.limit_threads()
    warm.warm_up(everything=False)
    server = _Server()
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    stream = connection.makefile("rw")
    try:
        for line in stream:
            operation, values = json.loads(line)
            answer = getattr(server, operation)(**values)
            stream.write(json.dumps(answer) + "\n")
            stream.flush()
    finally:
        # In a forked child, too: a session holds no end of this channel.
        connection.detach()
        with contextlib.suppress(OSError):
            os.close(descriptor)


if __name__ == "__main__":
    try:
        _serve(int(sys.argv[1]))
    except _Become:
        become = True
    else:
        become = False
    if become:
        runpy.run_module("harness", run_name="__main__", alter_sys=True)
