"""The law of symmetry: ranks agree on what they are about to do, or all raise the same error.

Each rank contributes a digest of its plan, and how long its error and its plan are. Equal digests
and no error cost one small collective a domain dimension. Otherwise one more exchanges the errors
or, where there are none, the plans, so that every rank comes to the same verdict from the same
facts.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from shardproof._core.comms.collectives import Domain, collect

_HEADER = struct.Struct("<32sBqq")
_AGAIN, _IN_BUCKETS, _OWN_WAY = 1, 2, 4

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
        members: the global ranks of its mesh or group.
        summary: kind, shape, dtype, sharding.
        peers: the global ranks whose parts make up what this rank wants, this one included: they
            must know the same of it. The other members, all of them where nothing travels, may
            hold something else or nothing: experts and pipeline stages share no names.
        tie: the first path that shares the leaf's memory; None where this rank's part is empty
            and says nothing about ties.

    """

    members: tuple[int, ...]
    summary: str
    peers: tuple[int, ...]
    tie: str | None


Entries = Mapping[str, Entry]
Verdict = Callable[[Domain, Sequence[Any]], "Failure | None"]


Told = list[tuple[Failure | None, Any]]


def exchange(
    domain: Domain,
    plan: Any,
    failure: Failure | None,
    digest: bytes = b"",
    flags: int = 0,
) -> tuple[Told | None, int]:
    """Tell all members of a domain this rank's plan and error.

    Args:
        domain: this rank is a member.
        plan: any picklable object.
        failure: this rank's own error.
        digest: what has to be equal.
        flags: a byte of flags, or-ed over the members.

    Returns:
        (per member its error and its plan, or None where all agree and nobody failed; the flags).
        Plans are None where a member failed: nobody needs them.

    Collectives: one per dimension of the domain with more than one member, two where the members
    differ or one failed.

    """
    stages = domain.stages()
    error = b"" if failure is None else pickle.dumps(failure)
    body = zlib.compress(pickle.dumps(plan), 1)
    sha = hashlib.sha256(digest).digest()
    header = _HEADER.pack(sha, flags, len(error), len(body))
    rows = [_HEADER.unpack(row) for row in _collect_bytes(domain, stages, header, len(header))]
    for row in rows:
        flags |= row[1]
    failed = any(row[2] for row in rows)
    same = len({row[0] for row in rows}) == 1 and not failed
    if same:
        return None, flags
    lengths = [row[2] if failed else row[3] for row in rows]
    found = _collect_bytes(domain, stages, error if failed else body, max(lengths))
    texts = [data[:length] for data, length in zip(found, lengths, strict=True)]
    # The peers of a process group run the same program: they are trusted as torch trusts them.
    if failed:
        return [(pickle.loads(text) if text else None, None) for text in texts], flags  # noqa: S301
    return [(None, pickle.loads(zlib.decompress(text))) for text in texts], flags  # noqa: S301


def first_failure(domain: Domain, told: Told) -> Failure | None:
    """The error of the first member that has one, with the member's name."""
    for index, (failure, _) in enumerate(told):
        if failure is not None:
            return _named(domain, index, failure)
    return None


class Agreed(NamedTuple):
    """What all ranks know of each other before tensors move.

    Attributes:
        failure: the error that all have to raise.
        details: the members' entries, in the domains where they are not all the same.
        in_buckets: the domains of which a member cannot take a large tensor but by the bucket.
        own_way: the domains of which a member holds tensors that only their class can gather.

    """

    failure: Failure | None
    details: Mapping[Domain, Sequence[Entries]]
    in_buckets: Sequence[Domain]
    own_way: Sequence[Domain]

    def whole(self, domain: Domain) -> bool:
        """Whether large tensors of the domain can travel whole, each by itself."""
        members = set(domain.members)
        return not any(members <= set(other.members) for other in self.in_buckets)


def agree_on_entries(
    domains: Sequence[Domain],
    plan: Columns,
    failure: Failure | None,
    in_buckets: bool,
    own_way: bool,
) -> Agreed:
    """Agree on the distributed leaves over several domains.

    Args:
        domains: those that this rank is a member of, in the order of their keys.
        plan: this rank's leaves.
        failure: this rank's own error.
        in_buckets: whether this rank cannot take a large tensor but by the bucket.
        own_way: whether it holds tensors that only their class can gather.

    Nothing is raised before all domains were asked: other ranks wait in them.

    """
    details: dict[Domain, list[Entries]] = {}
    again: list[Domain] = []
    flagged: dict[int, list[Domain]] = {_IN_BUCKETS: [], _OWN_WAY: []}
    flags = _AGAIN * (len(domains) > 1) | _IN_BUCKETS * in_buckets | _OWN_WAY * own_way
    for domain in domains:
        told, raised = exchange(domain, plan, failure, _digest(domain, plan), flags)
        if raised & _AGAIN:
            again.append(domain)
        for flag, where in flagged.items():
            if raised & flag:
                where.append(domain)
        if told is None:
            continue
        found = first_failure(domain, told)
        if found is None:
            details[domain] = [entries_of(columns) for _, columns in told]
            others = [frozenset(columns.others) for _, columns in told]
            found = _entries_verdict(domain, details[domain], others)
        if found is not None:
            failure = failure if failure is not None and failure.shared else found
    # A rank may have learned of an error after it had agreed with others.
    failure = agree_on_failure(again, failure)
    return Agreed(failure, details, flagged[_IN_BUCKETS], flagged[_OWN_WAY])


def agree_on_failure(domains: Sequence[Domain], failure: Failure | None) -> Failure | None:
    """Exchange errors over each domain, and return the error that this rank has to raise.

    A rank that raises leaves the other members of its domains waiting, and these leave the members
    of their other domains waiting. So ranks repeat the exchange until each has heard from every
    rank that it is connected to through domains.

    Args:
        domains: the domains of this rank that take part, in the order of their keys. Either all
            members of a domain take part in it, or none.
        failure: this rank's own error.

    Collectives: one per dimension and round, two where there is an error; one round where no rank
    is in several domains.

    """
    heard = 1 << dist.get_rank()
    awaited = sum(1 << rank for rank in set().union(*(domain.members for domain in domains)))
    todo = list(domains)
    while todo:
        for domain in tuple(todo):
            found = _tell_what_was_heard(domain, heard, awaited, failure)
            heard, awaited, failure = found
            # All members come to the same answer, for all were told the same.
            if awaited & ~heard == 0:
                todo.remove(domain)
    return failure


def _tell_what_was_heard(
    domain: Domain, heard: int, awaited: int, failure: Failure | None
) -> tuple[int, int, Failure | None]:
    """Join what the members of a domain know: (heard, awaited, failure), the same on all members.

    Args:
        domain: a domain of this rank.
        heard: a bit for each global rank of which this rank knows whether it failed.
        awaited: a bit for each rank that shares a domain with one of those.
        failure: the first error of the ranks heard.

    """
    stages = domain.stages()
    width = -(-dist.get_world_size() // 8)
    error = b"" if failure is None else pickle.dumps(failure)
    told = struct.pack("<q", len(error))
    told += heard.to_bytes(width, "little") + awaited.to_bytes(width, "little")
    rows = _collect_bytes(domain, stages, told, len(told))
    lengths = [int(struct.unpack_from("<q", row)[0]) for row in rows]
    for row in rows:
        heard |= int.from_bytes(row[8 : 8 + width], "little")
        awaited |= int.from_bytes(row[8 + width :], "little")
    if any(lengths):
        texts = _collect_bytes(domain, stages, error, max(lengths))
        # The peers of a process group run the same program: they are trusted as torch trusts them.
        failures = [
            _named(domain, index, pickle.loads(text[:length]))  # noqa: S301
            for index, (text, length) in enumerate(zip(texts, lengths, strict=True))
            if length
        ]
        # Of several all raise the same one.
        failure = min(failures, key=attrgetter("message"))
    return heard, awaited, failure


def _named(domain: Domain, index: int, failure: Failure) -> Failure:
    """A member's error, with the member's name."""
    if failure.shared:
        return failure
    return Failure(failure.kind, f"{domain.name(index)}: {failure.message}", True)


class Columns(NamedTuple):
    """Entries by column: most leaves share a few summaries.

    Attributes:
        paths: sorted.
        kinds: the distinct (summary, members, peers).
        numbers: of each path its kind.
        ties: of each path its tie.
        others: the names of leaves that are not distributed; for messages.

    """

    paths: list[str]
    kinds: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    numbers: list[int]
    ties: list[str | None]
    others: list[str]


def entries_of(columns: Columns) -> dict[str, Entry]:
    """Path -> what is known of it."""
    found: dict[str, Entry] = {}
    for path, number, tie in zip(columns.paths, columns.numbers, columns.ties, strict=True):
        summary, members, peers = columns.kinds[number]
        found[path] = Entry(members, summary, peers, tie)
    return found


def _digest(domain: Domain, columns: Columns) -> bytes:
    """What members have to agree on."""
    mine = set(domain.members)
    # Ranks of sibling meshes hold the same leaf over other members: no reason to differ.
    told = [
        (text, members if set(members) == mine else (), bool(peers))
        for text, members, peers in columns.kinds
    ]
    pairs = zip(columns.ties, columns.paths, strict=True)
    ties = [None if tie == path else tie for tie, path in pairs]  # "" is the name of a leaf
    return json.dumps([told, columns.paths, columns.numbers, ties]).encode()


def _entries_verdict(
    domain: Domain, told: Sequence[Entries], others: Sequence[Set[str]]
) -> Failure | None:
    """Whether the peers of each member know each leaf that it wants, and the same of it."""
    for path in sorted(set().union(*told)):
        for index, entries in enumerate(told):
            entry = entries.get(path)
            if entry is None:
                continue
            for other, theirs in enumerate(told):
                if domain.members[other] not in entry.peers:
                    continue
                found = theirs.get(path)
                has = f"{domain.name(index)} has {entry.summary} on ranks {entry.members}"
                if found is None and path in others[other]:
                    said = f"{path!r}: {domain.name(other)} has it whole, or as no tensor; {has}"
                    return Failure("ValueError", said, True)
                if found is None:
                    said = f"{domain.name(other)} lacks {path!r}; {has}"
                    return Failure("KeyError", said, True)
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
    rows = collect(stages, payload.to(domain.device), short=True).cpu().numpy().tobytes()
    return [rows[at : at + width] for at in range(0, len(rows), width)]
