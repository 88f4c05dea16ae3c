"""Ranks agree on what they are about to do, or all raise the same error.

Each rank contributes a digest of its plan, and how long its error and its plan are. Equal digests
and no error cost one small collective a domain dimension. Otherwise one more exchanges the errors
or, where there are none, the plans, so that every rank comes to the same verdict from the same
facts.
"""

from __future__ import annotations

import hashlib
import pickle
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist

from shardproof._core.comms.collectives import collect
from shardproof._core.sharding.domain import Domain

_HEADER = struct.Struct("<32sBqq")

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

    ``shared`` once other ranks know of it: then the message names the rank already.
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


def raise_failure(failure: Failure | None) -> None:
    """Raise the error that all ranks have agreed on, if there is one."""
    if failure is not None:
        raise failure.error()


Replies = list[tuple[Failure | None, Any]]


def exchange(
    domain: Domain,
    plan: Any,
    failure: Failure | None,
    digest: bytes = b"",
    flags: int = 0,
) -> tuple[Replies | None, int]:
    """Send this rank's plan and error to all members of a domain.

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


def first_failure(domain: Domain, replies: Replies | None) -> Failure | None:
    """The error of the first member that has one, with the member's name."""
    for index, (failure, _) in enumerate(replies or ()):
        if failure is not None:
            return _with_rank_name(domain, index, failure)
    return None


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
    if not domains:
        # A process without a process group has no rank.
        return failure
    known_ranks = 1 << dist.get_rank()
    expected_ranks = sum(1 << rank for rank in set().union(*(domain.members for domain in domains)))
    todo = list(domains)
    while todo:
        for domain in tuple(todo):
            found = _exchange_failures(domain, known_ranks, expected_ranks, failure)
            known_ranks, expected_ranks, failure = found
            # All members come to the same answer, for all have received the same.
            if expected_ranks & ~known_ranks == 0:
                todo.remove(domain)
    return failure


def _exchange_failures(
    domain: Domain, known_ranks: int, expected_ranks: int, failure: Failure | None
) -> tuple[int, int, Failure | None]:
    """Join what the members of a domain know: the same on all of them.

    Args:
        domain: a domain of this rank.
        known_ranks: a bit for each global rank of which this rank knows whether it failed.
        expected_ranks: a bit for each rank that shares a domain with one of those.
        failure: the first error of the known ranks.

    """
    stages = domain.stages()
    width = -(-dist.get_world_size() // 8)
    error = b"" if failure is None else pickle.dumps(failure)
    facts = struct.pack("<q", len(error))
    facts += known_ranks.to_bytes(width, "little") + expected_ranks.to_bytes(width, "little")
    rows = _collect_bytes(domain, stages, facts, len(facts))
    lengths = [int(struct.unpack_from("<q", row)[0]) for row in rows]
    for row in rows:
        known_ranks |= int.from_bytes(row[8 : 8 + width], "little")
        expected_ranks |= int.from_bytes(row[8 + width :], "little")
    if any(lengths):
        texts = _collect_bytes(domain, stages, error, max(lengths))
        # The peers of a process group run the same program: they are trusted as torch trusts them.
        failures = [
            _with_rank_name(domain, index, pickle.loads(text[:length]))  # noqa: S301
            for index, (text, length) in enumerate(zip(texts, lengths, strict=True))
            if length
        ]
        # Of several all raise the same one.
        failure = min(failures, key=attrgetter("message"))
    return known_ranks, expected_ranks, failure


def _with_rank_name(domain: Domain, index: int, failure: Failure) -> Failure:
    """A member's error, with the member's name."""
    if failure.shared:
        return failure
    return Failure(failure.kind, f"{domain.name(index)}: {failure.message}", True)


def _collect_bytes(domain: Domain, stages: Sequence[Any], data: bytes, width: int) -> list[bytes]:
    payload = torch.frombuffer(bytearray(data.ljust(width, b"\0")), dtype=torch.uint8)
    rows = collect(stages, payload.to(domain.device), short=True).cpu().numpy().tobytes()
    return [rows[at : at + width] for at in range(0, len(rows), width)]
