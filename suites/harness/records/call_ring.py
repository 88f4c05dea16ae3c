"""The last collectives of a rank, in a file that its parent reads without the rank's help.

A rank that hangs in C++, is stopped, or is killed tells nothing any more, and torch's own flight
recorder lies in its memory. So each call is written, in microseconds, into memory that the parent
has made and shares (`create`): what stands there stays, however the rank ends.

A *stream* is a sequence that ranks go through together: the collectives of one group, or what one
rank sends another under one tag. Calls are numbered in each stream, from 1 at the check's begin.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import struct
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SLOTS, _SLOT = 128, 384
_TOLD = 16
_STREAMS = 1024
_TEXT = 1 << 16
_HEAD = struct.Struct("<QQQQ")  # begun; calls of earlier checks; bytes of text, of the reason
_REASON_AT, _REASON = _HEAD.size, 240
_COUNTS_AT = _REASON_AT + _REASON
_SLOTS_AT = _COUNTS_AT + 8 * _STREAMS
_TEXT_AT = _SLOTS_AT + _SLOT * _SLOTS
_SIZE = _TEXT_AT + _TEXT
_COUNT = struct.Struct("<Q")
_BODY = struct.Struct("<dQIIBH")  # when, number, digest, stream, state, bytes of text
_STATES = ("begun", "issued", "failed", "refused")
BEGUN, ISSUED, FAILED, REFUSED = range(len(_STATES))
_BREAK = "\x1f"

NEW_GROUPS = "new groups"
"""The name of the stream of `new_group`, which all ranks of the world have to call."""
ANY_SOURCE = -1
"""The source of what a rank receives from whoever sends."""


@dataclass(frozen=True)
class Stream:
    """What numbers are counted in: a group, or the way from one of its ranks to another."""

    name: str
    """torch's name of the group, the same on all its ranks."""
    members: tuple[int, ...]
    """Global ranks in the group's order; empty for a group that torch does not list."""
    way: tuple[int, int, int] | None = None
    """Source, destination and tag of point-to-point calls."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Who takes part in each call."""
        return self.members if self.way is None else self.way[:2]

    def __str__(self) -> str:
        size = len(self.members)
        if size > 8:
            return f"group of {size} ranks ({self.members[0]} to {self.members[-1]})"
        return f"group ({', '.join(map(str, self.members)) or 'unknown to torch'})"


@dataclass(frozen=True)
class Call:
    """One call of a rank."""

    stream: Stream
    number: int
    op: str
    kind: str
    """What has to be the same on all ranks: the kind of collective, and its root."""
    data: str
    """What has to be the same, too, or the backend misreads it: dtype and number of elements."""
    arguments: str
    """Root, dtype and shapes, for people."""
    state: str
    """begun: in the call; issued: it returned; failed: it raised what a peer or its clock caused;
    refused: it raised before anything was sent."""
    at: float
    """Monotonic clock, comparable between processes of one machine."""
    digest: int
    """Of the kinds of all calls of the stream up to this one."""

    def __str__(self) -> str:
        said = f", {self.arguments}" if self.arguments else ""
        return f"{self.op} #{self.number} of {self.stream}{said}"

    def as_json(self, end: float) -> dict[str, Any]:
        """The call for results.json; `end` is when the record was read."""
        return {
            "op": self.op,
            "number": self.number,
            "group": list(self.stream.members),
            "arguments": self.arguments,
            "state": self.state,
            "seconds_before_the_end": round(end - self.at, 3),
        }


@dataclass
class Calls:
    """What a rank's file holds: its last calls, and how many it made in each stream."""

    read_at: float
    missing: str = ""
    """Why calls may be missing from the record, in words."""
    calls: list[Call] = field(default_factory=list)
    counts: dict[Stream, int] = field(default_factory=dict)

    def of(self, stream: Stream) -> dict[int, Call]:
        """The calls of a stream that are still held, by number."""
        return {c.number: c for c in self.calls if c.stream == stream and c.state != "refused"}

    def as_json(self) -> list[dict[str, Any]]:
        """The last of the calls for results.json."""
        return [call.as_json(self.read_at) for call in self.calls[-_TOLD:]]

    @classmethod
    def from_json(cls, data: dict[str, Any] | None, offset: float = 0.0) -> Calls | None:
        """What `read` gave, with the clock of another machine set to this one's."""
        if data is None:
            return None
        streams = [
            Stream(name, tuple(members), tuple(way) if way else None)
            for name, members, way in data["streams"]
        ]
        calls = [
            Call(**call | {"stream": streams[call["stream"]], "at": call["at"] - offset})
            for call in data["calls"]
        ]
        counts = dict(zip(streams, data["counts"], strict=True))
        for call in calls:  # the rank may have been ended between its two notes
            if call.state != "refused":
                counts[call.stream] = max(counts[call.stream], call.number)
        return cls(data["read_at"] - offset, data["missing"], calls, counts)


def create() -> int:
    """A descriptor of shared memory for the calls of one rank."""
    descriptor = os.memfd_create("shardproof-collectives")
    os.ftruncate(descriptor, _SIZE)
    return descriptor


class Ring:
    """The rank's end: notes calls."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SIZE)
        self._order = 0
        self._count = itertools.count(1)  # atomic, where threads issue collectives
        self.restart()

    def restart(self) -> None:
        """Forget all calls: another check begins."""
        self._streams: dict[Any, tuple[int, list[int]]] = {}
        self._text = 0
        self._before = self._order
        _HEAD.pack_into(self._map, 0, 1, self._before, 0, 0)

    def begin(
        self, stream: tuple[Any, ...], op: str, kind: str, data: str, arguments: str
    ) -> tuple[int, int, list[int]] | None:
        """Note a call before it is made; what `end` takes, or None where there is no room."""
        found = self._streams.get(stream) or self._new(stream)
        if found is None:
            return None
        index, state = found
        state[0] += 1
        before = state[1]
        state[1] = digest = zlib.crc32(kind.encode(), before)
        order = self._order = next(self._count)
        offset = _SLOTS_AT + order % _SLOTS * _SLOT
        text = _BREAK.join((op, kind, data, arguments)).encode()[: _SLOT - _COUNT.size - _BODY.size]
        body = offset + _COUNT.size
        _COUNT.pack_into(self._map, offset, 0)  # read meanwhile, the slot is empty
        _BODY.pack_into(
            self._map, body, time.monotonic(), state[0], digest, index, BEGUN, len(text)
        )
        self._map[body + _BODY.size : body + _BODY.size + len(text)] = text
        _COUNT.pack_into(self._map, offset, order)
        _COUNT.pack_into(self._map, _COUNTS_AT + 8 * index, state[0])
        return order, before, state

    def end(self, token: tuple[int, int, list[int]], outcome: int) -> None:
        """Note how a call came back."""
        order, before, state = token
        offset = _SLOTS_AT + order % _SLOTS * _SLOT
        if _COUNT.unpack_from(self._map, offset)[0] == order:  # none of 128 others came between
            self._map[offset + _COUNT.size + _BODY.size - 3] = outcome
        if outcome == REFUSED:
            state[0] -= 1
            state[1] = before

    def miss(self, reason: str) -> None:
        """Say that calls are missing from the record, and why."""
        text = reason.encode()[:_REASON]
        self._map[_REASON_AT : _REASON_AT + len(text)] = text
        _HEAD.pack_into(self._map, 0, 1, self._before, self._text, len(text))

    def _new(self, stream: tuple[Any, ...]) -> tuple[int, list[int]] | None:
        line = json.dumps(stream).encode() + b"\n"
        if len(self._streams) == _STREAMS or self._text + len(line) > _TEXT:
            self.miss("it used more groups than the record has room for")
            return None
        self._map[_TEXT_AT + self._text : _TEXT_AT + self._text + len(line)] = line
        self._text += len(line)
        found = (len(self._streams), [0, 0])
        _COUNT.pack_into(self._map, _COUNTS_AT + 8 * found[0], 0)
        _COUNT.pack_into(self._map, 2 * _COUNT.size, self._text)
        self._streams[stream] = found
        return found


def read(descriptor: int) -> dict[str, Any] | None:
    """What the record holds now, as JSON for `Calls.from_json`; None where none was begun."""
    data = os.pread(descriptor, _SIZE, 0)
    begun, before, text, reason = _HEAD.unpack_from(data)
    if not begun:
        return None
    lines = data[_TEXT_AT : _TEXT_AT + text].splitlines()
    streams = [json.loads(line) for line in lines]
    return {
        "read_at": time.monotonic(),
        "missing": data[_REASON_AT : _REASON_AT + reason].decode(errors="replace"),
        "streams": streams,
        "counts": [
            _COUNT.unpack_from(data, _COUNTS_AT + 8 * index)[0] for index in range(len(streams))
        ],
        "calls": _slots(data, before, len(streams)),
    }


def _slots(data: bytes, before: int, streams: int) -> list[dict[str, Any]]:
    found: list[tuple[int, dict[str, Any]]] = []
    for offset in range(_SLOTS_AT, _SLOTS_AT + _SLOT * _SLOTS, _SLOT):
        order = _COUNT.unpack_from(data, offset)[0]
        body = offset + _COUNT.size
        at, number, digest, stream, state, length = _BODY.unpack_from(data, body)
        if order > before and stream < streams:
            text = data[body + _BODY.size : body + _BODY.size + length].decode(errors="replace")
            op, kind, numel, arguments = [*text.split(_BREAK), "", "", ""][:4]
            call = {"stream": stream, "number": number, "op": op, "kind": kind, "data": numel}
            call |= {"arguments": arguments, "state": _STATES[state], "at": at, "digest": digest}
            found.append((order, call))
    return [call for _, call in sorted(found, key=lambda pair: pair[0])]
