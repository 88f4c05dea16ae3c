"""The law of symmetry: ranks agree on what they are about to do, or all raise the same error.

Each rank contributes a digest of its plan and whether it has an error. Equal digests and no error
cost one small collective a domain dimension. Otherwise the details are exchanged, so that every
rank comes to the same verdict from the same facts; only then are they written down at all.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from shardproof._state_dict_utils.wire import Domain, collect

_HEADER = struct.Struct("<32sBB")
_LENGTH = struct.Struct("<q")
_AGAIN, _FLAG = 1, 2

_RAISABLE: tuple[type[Exception], ...] = (
    KeyError,
    TypeError,
    ValueError,
    NotImplementedError,
    RuntimeError,
)


@dataclass(frozen=True)
class Failure:
    """An error that can travel: the type's name and the message.

    ``shared`` once other ranks were told of it: then the message names the rank already.
    """

    kind: str
    message: str
    shared: bool = False

    @staticmethod
    def of(error: Exception) -> Failure:
        """The nearest type that every rank can raise, with the message."""
        for kind in _RAISABLE:
            if isinstance(error, kind):
                text = error.args[0] if isinstance(error, KeyError) and error.args else error
                return Failure(kind.__name__, str(text))
        return Failure("RuntimeError", f"{type(error).__name__}: {error}")

    def error(self) -> Exception:
        """The exception to raise."""
        kinds = {kind.__name__: kind for kind in _RAISABLE}
        return kinds[self.kind](self.message)


class Entry(NamedTuple):
    """What a rank knows of one distributed leaf.

    Attributes:
        members: the global ranks that must know the same.
        summary: kind, shape, dtype, sharding: equal on all members.
        tie: the first path that shares the leaf's memory; None where this rank's part is empty
            and says nothing about ties.

    """

    members: tuple[int, ...]
    summary: str
    tie: str | None


Entries = Mapping[str, Entry]
Verdict = Callable[[Domain, Sequence[Any]], "Failure | None"]


def exchange(
    domain: Domain,
    plan: Any,
    failure: Failure | None,
    digest: bytes = b"",
    flags: int = 0,
) -> tuple[list[tuple[Failure | None, Any]] | None, int]:
    """Tell all members of a domain this rank's plan and error.

    Args:
        domain: this rank is a member.
        plan: any picklable object.
        failure: this rank's own error.
        digest: what has to be equal.
        flags: a byte of flags, or-ed over the members.

    Returns:
        (per member its error and plan, or None where all agree and nobody failed; the flags).

    Collectives: one per dimension of the domain with more than one member, three where plans are
    exchanged.

    """
    stages = [domain.stage(d) for d, group in enumerate(domain.groups) if group is not None]
    header = _HEADER.pack(hashlib.sha256(digest).digest(), failure is not None, flags)
    rows = [_HEADER.unpack(row) for row in _collect_bytes(domain, stages, header, len(header))]
    for row in rows:
        flags |= row[2]
    same = len({row[0] for row in rows}) == 1 and not any(row[1] for row in rows)
    if same:
        return None, flags
    body = zlib.compress(pickle.dumps((failure, plan)), 1)
    size = _LENGTH.pack(len(body))
    lengths = [
        int(_LENGTH.unpack(row)[0]) for row in _collect_bytes(domain, stages, size, len(size))
    ]
    bodies = _collect_bytes(domain, stages, body, max(lengths))
    told = [
        # The peers of a process group run the same program: they are trusted as torch trusts them.
        pickle.loads(zlib.decompress(data[:length]))  # noqa: S301
        for length, data in zip(lengths, bodies, strict=True)
    ]
    return told, flags


def first_failure(domain: Domain, told: Sequence[tuple[Failure | None, Any]]) -> Failure | None:
    """The error of the first member that has one, with the member's name."""
    for index, (failure, _) in enumerate(told):
        if failure is not None:
            if failure.shared:
                return failure
            return Failure(failure.kind, f"{domain.name(index)}: {failure.message}", True)
    return None


def agree_on_entries(
    domains: Sequence[Domain], entries: Entries, failure: Failure | None, flag: bool
) -> tuple[Failure | None, dict[Domain, list[Entries]], list[Domain]]:
    """Agree on the distributed leaves over several domains.

    Args:
        domains: those that this rank is a member of, in the order of their keys.
        entries: this rank's leaves by path.
        failure: this rank's own error.
        flag: something that others have to know where one rank says it.

    Returns:
        (the error that all have to raise or None; the members' entries per domain where they
        are not all the same; the domains in which the flag is up). Nothing
        is raised before all domains were asked: other ranks wait in them.

    """
    details: dict[Domain, list[Entries]] = {}
    again: list[Domain] = []
    flagged: list[Domain] = []
    flags = _AGAIN * (len(domains) > 1) | _FLAG * flag
    for domain in domains:
        told, raised = exchange(domain, dict(entries), failure, _digest(domain, entries), flags)
        if raised & _AGAIN:
            again.append(domain)
        if raised & _FLAG:
            flagged.append(domain)
        if told is None:
            continue
        details[domain] = [plan for _, plan in told]
        if found := first_failure(domain, told) or _entries_verdict(domain, details[domain]):
            failure = failure if failure is not None and failure.shared else found
    # A rank may have learned of an error after it had agreed with others: once more for those.
    for domain in again:
        told, _ = exchange(domain, None, failure)
        if told is not None and (found := first_failure(domain, told)):
            failure = found
    return failure, details, flagged


def _digest(domain: Domain, entries: Entries) -> bytes:
    """What members have to agree on, column by column: most leaves share a few summaries."""
    mine = set(domain.members)
    kinds: dict[tuple[str, tuple[int, ...]], int] = {}
    numbers: list[int] = []
    ties: list[str] = []
    paths = sorted(entries)
    for path in paths:
        members, summary, tie = entries[path]
        numbers.append(kinds.setdefault((summary, members), len(kinds)))
        ties.append("" if tie is None or tie == path else tie)
    # Ranks of sibling meshes hold the same leaf over other members: no reason to differ.
    told = [(text, members if set(members) == mine else ()) for text, members in kinds]
    return json.dumps([told, paths, numbers, ties]).encode()


def _entries_verdict(domain: Domain, told: Sequence[Entries]) -> Failure | None:
    """Whether each member knows each leaf that it must know, and the same of it."""
    for path in sorted(set().union(*told)):
        for index, entries in enumerate(told):
            entry = entries.get(path)
            if entry is None:
                continue
            for other, theirs in enumerate(told):
                if domain.members[other] not in entry.members:
                    continue
                found = theirs.get(path)
                if found is None:
                    return Failure(
                        "KeyError",
                        f"{domain.name(other)} lacks {path!r}; {domain.name(index)} has "
                        f"{entry.summary} on ranks {entry.members}",
                        True,
                    )
                if (found.summary, found.members) != (entry.summary, entry.members):
                    return Failure(
                        "ValueError",
                        f"{path!r}: {domain.name(other)} has {found.summary} on ranks "
                        f"{found.members}, expected {entry.summary} on ranks {entry.members} as on "
                        f"{domain.name(index)}",
                        True,
                    )
    return None


def _collect_bytes(domain: Domain, stages: Sequence[Any], data: bytes, width: int) -> list[bytes]:
    payload = torch.frombuffer(bytearray(data.ljust(width, b"\0")), dtype=torch.uint8)
    rows = collect(stages, payload.to(domain.device)).cpu()
    return [row.numpy().tobytes() for row in rows]
