"""The session's server: `python -m benchmarks.run.server SOCKET OWNER KEY`.

Started by the first benchmark process of a run, not by hand. It answers one request a connection,
and goes when the process that it serves (OWNER, a pid) goes, when it has been idle for IDLE
seconds, or when asked for another KEY: another commit, or other settings. A client that goes away
in the middle of a measurement has its world ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from benchmarks.run.parent import Parent, named
from benchmarks.settings import Settings

IDLE = 300.0
"""Seconds without a request after which nobody is taken to be there any more."""


class _AbandonedError(Exception):
    """Nobody waits for the answer."""


class Server:
    """One warm parent behind a unix socket."""

    def __init__(self, path: Path, owner: int, key: str) -> None:
        self._path, self._key = path, key
        self._owner = os.pidfd_open(owner)
        self._parent = Parent(Settings.from_environment())
        self._results: dict[tuple[Any, ...], tuple[dict[str, Any], set[str]]] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(8)

    def serve(self) -> None:
        """Answer until there is no one left to answer."""
        listener = self._listener.fileno()
        while _readable(IDLE, listener, self._owner) == [listener]:
            client, _ = self._listener.accept()
            with client:
                if not self._answer(client):
                    return
        shutil.rmtree(self._path.parent, ignore_errors=True)  # the run is over

    def _answer(self, client: socket.socket) -> bool:
        """Serve one connection; whether to go on."""
        client.settimeout(10)
        try:
            with client.makefile("rb") as stream:
                request = json.loads(stream.readline())
        except (ValueError, OSError):  # the client went before it had asked
            return True
        answer: dict[str, Any]
        is_stale = request["key"] != self._key
        try:
            if is_stale:
                self._path.unlink(
                    missing_ok=True
                )  # first, or the client would find this server again
                answer = {"stale": True}
            elif size := request.get("fresh_worlds"):
                answer = {"seconds": self._parent.fresh_worlds(size, request["count"])}
            else:
                answer = {"arms": self._measured(request, client)}
        except _AbandonedError:
            return True  # where the owner is gone, too, the next wait ends it
        except Exception as error:
            print(traceback.format_exc(), flush=True)
            answer = {"error": f"{type(error).__name__}: {error}"}
        with contextlib.suppress(OSError):  # it went; the answer is kept for the next who asks
            client.sendall(json.dumps(answer).encode() + b"\n")
        return not is_stale

    def _measured(self, request: dict[str, Any], client: socket.socket) -> dict[str, Any]:
        """What the arms gave; measured again once a reader comes for the same a second time."""
        name = (request["module"], request["benchmark"], request["regime"], request["size"])
        kept, readers = self._results.get(name, ({}, set()))
        if not kept or request["reader"] in readers:

            def abandoned() -> None:
                # A client sends one line and then waits: readable means closed.
                if _readable(0, client.fileno(), self._owner):
                    raise _AbandonedError

            benchmark = named(request["module"], request["benchmark"])
            kept = self._parent.measure(benchmark, *name[2:], abandoned=abandoned)
            readers = set()
            self._results[name] = (kept, readers)
        readers.add(request["reader"])
        return kept


def _readable(timeout: float, *descriptors: int) -> list[int]:
    return select.select(descriptors, [], [], timeout)[0]


def main() -> int:
    """Serve until the owner is gone, in a fork, which is nobody's child; 0 once it listens."""
    path, owner, key = sys.argv[1:]
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        return 0 if os.read(reader, 1) else 1
    os.close(reader)
    server = Server(Path(path), int(owner), key)
    os.write(writer, b"1")
    os.close(writer)
    server.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
