"""The law of symmetry: ranks agree on what they are about to do, or all raise the same error.

Each rank contributes a digest of its plan and its own error, if it has one. Equal digests and no
error cost one small collective a domain dimension. Otherwise the details are exchanged, so that
every rank comes to the same verdict from the same facts.
"""

from __future__ import annotations

import hashlib
import pickle
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardproof._state_dict_utils.wire import Domain, collect

_HEADER = struct.Struct("<32sqBB")

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


@dataclass(frozen=True)
class Entry:
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
    digest: Any = None,
    more: bool = False,
    always: bool = False,
) -> tuple[list[tuple[Failure | None, Any]] | None, bool]:
    """Tell all members of a domain this rank's plan and error.

    Args:
        domain: this rank is a member.
        plan: any picklable object.
        failure: this rank's own error.
        digest: what has to be equal; ``plan`` where None.
        more: a flag that is or-ed over the members.
        always: exchange the plans even where the digests agree.

    Returns:
        (per member its error and plan, or None where all agree and nobody failed; the flag).

    Collectives: one per dimension of the domain with more than one member, twice that where
    plans are exchanged.

    """
    stages = [domain.stage(d) for d, group in enumerate(domain.groups) if group is not None]
    body = zlib.compress(pickle.dumps((failure, plan)), 1)
    mark = hashlib.sha256(repr(plan if digest is None else digest).encode()).digest()
    header = _HEADER.pack(mark, len(body), failure is not None, more)
    rows = [_HEADER.unpack(row) for row in _collect_bytes(domain, stages, header, len(header))]
    flag = any(row[3] for row in rows)
    same = len({row[0] for row in rows}) == 1 and not any(row[2] for row in rows)
    if same and not always:
        return None, flag
    width = max(row[1] for row in rows)
    bodies = _collect_bytes(domain, stages, body, width)
    told = [
        # The peers of a process group run the same program: they are trusted as torch trusts them.
        pickle.loads(zlib.decompress(data[: row[1]]))  # noqa: S301
        for row, data in zip(rows, bodies, strict=True)
    ]
    return told, flag


def first_failure(domain: Domain, told: Sequence[tuple[Failure | None, Any]]) -> Failure | None:
    """The error of the first member that has one, with the member's name."""
    for index, (failure, _) in enumerate(told):
        if failure is not None:
            if failure.shared:
                return failure
            return Failure(failure.kind, f"{domain.name(index)}: {failure.message}", True)
    return None


def agree_on_entries(
    domains: Sequence[Domain], entries: Entries, failure: Failure | None
) -> tuple[Failure | None, dict[Domain, list[Entries]]]:
    """Agree on the distributed leaves over several domains.

    Args:
        domains: those that this rank is a member of, in the order of their keys.
        entries: this rank's leaves by path.
        failure: this rank's own error.

    Returns:
        (the error that all have to raise or None; the members' entries per domain where they
        are not all the same). Nothing is raised before all domains were asked: other ranks wait
        in them.

    """
    details: dict[Domain, list[Entries]] = {}
    again: list[Domain] = []
    for domain in domains:
        told, more = exchange(
            domain, dict(entries), failure, _digest(domain, entries), more=len(domains) > 1
        )
        if more:
            again.append(domain)
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
    return failure, details


def _digest(domain: Domain, entries: Entries) -> list[tuple[Any, ...]]:
    mine = set(domain.members)
    facts: list[tuple[Any, ...]] = []
    for path in sorted(entries):
        entry = entries[path]
        # Ranks of sibling meshes hold the same leaf over other members: no reason to differ.
        members = entry.members if set(entry.members) == mine else ()
        tie = entry.tie if entry.tie not in (None, path) else ""
        facts.append((path, entry.summary, members, tie))
    return facts


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
    return [bytes(row.tolist()) for row in rows]
