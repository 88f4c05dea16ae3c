"""In asv's process: find the session's server or start it, ask, and wait with a deadline."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.settings import PREFIX, Settings

SUITES = Path(__file__).parents[1]
START_LIMIT = 90.0
"""Seconds that the server has to import what it needs."""
OWNER = f"{PREFIX}OWNER"
"""Names the process whose end is the end of the run: ci/bench, or asv."""


class SessionError(Exception):
    """There is no number: the text says why."""


def ask(request: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The server's answer; raises SessionError with the cause when there is none."""
    owner = int(os.environ.get(OWNER, 0)) or os.getppid()
    folder = _folder(owner)
    key = _key(settings)
    line = json.dumps({**request, "key": key}).encode() + b"\n"
    limit = settings.limit + 60
    for _ in range(2):
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            sock = _connect(folder / "socket") or _start(folder, owner, key, settings)
        with sock:
            sock.settimeout(limit)
            try:
                sock.sendall(line)
                with sock.makefile("rb") as stream:
                    text = stream.readline()
            except TimeoutError:
                raise SessionError(f"no answer within {limit:.0f} s{_log(folder)}") from None
            except OSError as error:
                raise SessionError(f"the session broke off: {error}{_log(folder)}") from error
        if not text:
            raise SessionError(f"the session's server went away{_log(folder)}")
        answer: dict[str, Any] = json.loads(text)
        if not answer.get("stale"):  # a server of another commit, which goes now
            break
    if "error" in answer:
        raise SessionError(answer["error"])
    return answer


def _folder(owner: int) -> Path:
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    folder = base / f"shardproof-bench-{os.getuid()}" / str(owner)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _key(settings: Settings) -> str:
    """What must be the same for two processes to share a server: code, interpreter, settings."""
    spec = importlib.util.find_spec("shardproof")
    files = sorted(Path(spec.origin).parent.rglob("*.py")) if spec and spec.origin else []
    code = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    return hashlib.sha256(repr((sys.executable, settings, code)).encode()).hexdigest()


def _connect(path: Path) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    return sock


def _start(folder: Path, owner: int, key: str, settings: Settings) -> socket.socket:
    """Start the server, which is nobody's child and off asv's pipes, and wait until it listens."""
    path = folder / "socket"
    path.unlink(missing_ok=True)
    # Where objects lie in memory follows the hashes: alike in every run.
    environment = os.environ | settings.environment() | {"PYTHONHASHSEED": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(SUITES), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    with (folder / "log").open("w") as log:
        try:
            started = subprocess.run(
                [sys.executable, "-m", "benchmarks.run.server", str(path), str(owner), key],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=folder,
                start_new_session=True,
                timeout=START_LIMIT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise SessionError(
                f"the session's server was not up within {START_LIMIT} s{_log(folder)}"
            ) from None
    sock = _connect(path) if started.returncode == 0 else None
    if sock is None:
        raise SessionError(f"the session's server ended as it started{_log(folder)}")
    return sock


def _log(folder: Path) -> str:
    try:
        text = (folder / "log").read_text(errors="replace")[-3000:].strip()
    except OSError:
        return ""
    return f"; its log:\n{text}" if text else ""
