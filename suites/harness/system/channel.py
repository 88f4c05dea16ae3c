"""Messages between the parent and a rank: JSON frames over a socket pair, one pair a rank.

The parent never blocks on a rank: it reads what is there and keeps the rest for later, so a rank
that is stopped in the middle of a 5 MB message holds nobody up. JSON, not pickle: an exception
that cannot be pickled must not turn a failure into a hang.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from typing import Any

Frame = dict[str, Any]

_HEADER = struct.Struct("!Q")
_LIMIT = 1 << 30
FORKED_EXIT = 70
"""Exit code of a process that a check forked and that came back into the harness's code."""


class RankEnd:
    """The rank's end: blocking, and deaf to processes that the check itself forked."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.setblocking(True)
        self._pid = os.getpid()

    def send(self, kind: str, **payload: Any) -> None:
        """Send one frame, stamped with the monotonic clock."""
        if os.getpid() != self._pid:
            os._exit(FORKED_EXIT)
        body = json.dumps({"kind": kind, "at": time.monotonic(), **payload}).encode("ascii")
        self._sock.sendall(_HEADER.pack(len(body)) + body)

    def receive(self) -> Frame | None:
        """The parent's next frame, or None once the parent is gone."""
        header = self._exactly(_HEADER.size)
        if header is None:
            return None
        body = self._exactly(_HEADER.unpack(header)[0])
        return None if body is None else json.loads(body)

    def fileno(self) -> int:
        """The descriptor, to tell it from one that a check leaked."""
        return self._sock.fileno()

    def _exactly(self, count: int) -> bytes | None:
        data = bytearray()
        while len(data) < count:
            try:
                piece = self._sock.recv(count - len(data))
            except OSError:
                return None
            if not piece:
                return None
            data += piece
        return bytes(data)


class ParentEnd:
    """The parent's end: never blocks."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.setblocking(True)  # each call says that it does not wait
        self._buffer = bytearray()
        self.closed = False
        self.garbage = False
        """Something other than the harness wrote into the channel."""

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, kind: str, **payload: Any) -> None:
        """Send one small frame; a rank that is gone is noticed elsewhere, by its exit."""
        body = json.dumps({"kind": kind, **payload}).encode("ascii")
        try:
            self._sock.sendall(_HEADER.pack(len(body)) + body, socket.MSG_DONTWAIT)
        except OSError:
            self.closed = True

    def frames(self) -> list[Frame]:
        """All whole frames that have arrived."""
        while not self.closed:
            try:
                piece = self._sock.recv(1 << 20, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:  # reset, or timed out: the machine at the other end is cut off
                piece = b""
            if not piece:
                self.closed = True
                break
            self._buffer += piece
        found: list[Frame] = []
        while len(self._buffer) >= _HEADER.size:
            (count,) = _HEADER.unpack_from(self._buffer)
            if count > _LIMIT:
                self.garbage = self.closed = True
                break
            if len(self._buffer) < _HEADER.size + count:
                break
            body = bytes(self._buffer[_HEADER.size : _HEADER.size + count])
            del self._buffer[: _HEADER.size + count]
            try:
                found.append(json.loads(body))
            except ValueError:
                self.garbage = self.closed = True
                break
        return found

    def close(self) -> None:
        self._sock.close()


def pair() -> tuple[ParentEnd, socket.socket]:
    """A channel: the parent's end, and the socket that the rank wraps in a `RankEnd`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return ParentEnd(ours), theirs
