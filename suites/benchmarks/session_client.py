"""In asv's process: find the session's server or start it, ask, and wait with a deadline."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.settings import PREFIX, Settings

SUITES = Path(__file__).parents[1]
START_LIMIT = 90.0
"""Seconds that the server has to import what it needs."""
OWNER = f"{PREFIX}OWNER"


class SessionError(Exception):
    """There is no number: the text says why."""


def ask(request: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The server's answer; raises SessionError with the cause when there is none."""
    owner = int(os.environ.get(OWNER, 0)) or run_of(os.getpid())
    folder = _folder(owner)
    key = _key(settings)
    line = json.dumps({**request, "key": key}).encode() + b"\n"
    limit = settings.limit + 60
    for _ in range(2):
        with _locked(folder):
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


def run_of(pid: int) -> int:
    """The process whose end is the end of the run: asv above `pid`, or the nearest parent."""
    found = _parent(pid)
    above = found
    while above > 1:
        if any(Path(word).name in {"asv", "__main__.py"} for word in _words(above)[:3]):
            found = above
        above = _parent(above)
    return found


def _words(pid: int) -> list[str]:
    """Its command line; empty when it is gone."""
    try:
        return [os.fsdecode(w) for w in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
    except OSError:
        return []


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _folder(owner: int) -> Path:
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    folder = base / f"shardproof-bench-{os.getuid()}" / str(owner)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _key(settings: Settings) -> str:
    """What must be the same for two processes to share a server: code, interpreter, settings."""
    digest = hashlib.sha256(repr((sys.executable, settings)).encode())
    spec = importlib.util.find_spec("shardproof")
    roots = [Path(spec.origin).parent] if spec and spec.origin else []
    for root in roots:
        for file in sorted(root.rglob("*.py")):
            digest.update(f"{file}{file.stat().st_mtime_ns}{file.stat().st_size}".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _connect(path: Path) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    return sock


def _start(folder: Path, owner: int, key: str, settings: Settings) -> socket.socket:
    """Start the server and wait until it listens; it is nobody's child, and off asv's pipes."""
    path = folder / "socket"
    for stale in (path, folder / "pid"):
        stale.unlink(missing_ok=True)
    # Where objects lie in memory follows the hashes: alike in every run.
    environment = os.environ | settings.environment() | {"PYTHONHASHSEED": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(SUITES), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    with (folder / "log").open("w") as log:
        # It returns at once: the server is a fork of it, and nobody's child.
        subprocess.run(
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
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline:
        if (sock := _connect(path)) is not None:
            return sock
        if not _runs(folder / "pid"):
            raise SessionError(f"the session's server ended as it started{_log(folder)}")
        time.sleep(0.05)
    raise SessionError(f"the session's server was not up within {START_LIMIT} s{_log(folder)}")


def _runs(file: Path) -> bool:
    try:
        return Path("/proc", file.read_text()).exists()
    except OSError:
        return False


def _log(folder: Path) -> str:
    try:
        text = (folder / "log").read_text(errors="replace")[-3000:].strip()
    except OSError:
        return ""
    return f"; its log:\n{text}" if text else ""
