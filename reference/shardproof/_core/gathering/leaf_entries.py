"""What ranks tell each other of their sharded leaves, and whether it fits together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

from shardproof._core.comms.agreement import Failure, agree_on_failure, exchange, first_failure
from shardproof._core.sharding.domain import Domain

_AGAIN, _IN_BUCKETS, _BY_CLASS = 1, 2, 4


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


class Agreement(NamedTuple):
    """What all ranks know of each other before tensors move.

    Attributes:
        failure: the error that all have to raise.
        details: the members' entries, in the domains where they are not all the same.
        in_buckets: the domains of which a member cannot take a large tensor but by the bucket.
        by_class: the domains of which a member holds tensors that only their class can gather.

    """

    failure: Failure | None
    details: Mapping[Domain, Sequence[Entries]]
    in_buckets: Sequence[Domain]
    by_class: Sequence[Domain]

    def allows_whole(self, domain: Domain) -> bool:
        """Whether large tensors of the domain can travel whole, each by itself."""
        members = set(domain.members)
        return not any(members <= set(other.members) for other in self.in_buckets)


def agree_on_entries(
    domains: Sequence[Domain],
    plan: Columns,
    failure: Failure | None,
    in_buckets: bool,
    by_class: bool,
) -> Agreement:
    """Agree on the distributed leaves over several domains.

    Args:
        domains: those that this rank is a member of, in the order of their keys.
        plan: this rank's leaves.
        failure: this rank's own error.
        in_buckets: whether this rank cannot take a large tensor but by the bucket.
        by_class: whether it holds tensors that only their class can gather.

    Nothing is raised before all domains were asked: other ranks wait in them.

    """
    details: dict[Domain, list[Entries]] = {}
    again: list[Domain] = []
    flagged: dict[int, list[Domain]] = {_IN_BUCKETS: [], _BY_CLASS: []}
    flags = _AGAIN * (len(domains) > 1) | _IN_BUCKETS * in_buckets | _BY_CLASS * by_class
    for domain in domains:
        replies, raised = exchange(domain, plan, failure, _digest(domain, plan), flags)
        if raised & _AGAIN:
            again.append(domain)
        for flag, where in flagged.items():
            if raised & flag:
                where.append(domain)
        if replies is None:
            continue
        found = first_failure(domain, replies)
        if found is None:
            details[domain] = [entries_of(columns) for _, columns in replies]
            others = [frozenset(columns.others) for _, columns in replies]
            found = _entries_verdict(domain, details[domain], others)
        if found is not None:
            failure = failure if failure is not None and failure.shared else found
    # A rank may have learned of an error after it had agreed with others.
    failure = agree_on_failure(again, failure)
    return Agreement(failure, details, flagged[_IN_BUCKETS], flagged[_BY_CLASS])


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
    described = [
        (text, members if set(members) == mine else (), bool(peers))
        for text, members, peers in columns.kinds
    ]
    pairs = zip(columns.ties, columns.paths, strict=True)
    ties = [None if tie == path else tie for tie, path in pairs]  # "" is the name of a leaf
    return json.dumps([described, columns.paths, columns.numbers, ties]).encode()


def _entries_verdict(
    domain: Domain, replies: Sequence[Entries], others: Sequence[Set[str]]
) -> Failure | None:
    """Whether the peers of each member know each leaf that it wants, and the same of it."""
    for path in sorted(set().union(*replies)):
        for index, entries in enumerate(replies):
            entry = entries.get(path)
            if entry is None:
                continue
            for other, theirs in enumerate(replies):
                if domain.members[other] not in entry.peers:
                    continue
                found = theirs.get(path)
                has = f"{domain.name(index)} has {entry.summary} on ranks {entry.members}"
                if found is None and path in others[other]:
                    message = f"{path!r}: {domain.name(other)} has it whole, or as no tensor; {has}"
                    return Failure("ValueError", message, True)
                if found is None:
                    message = f"{domain.name(other)} lacks {path!r}; {has}"
                    return Failure("KeyError", message, True)
                if (found.summary, found.members) != (entry.summary, entry.members):
                    return Failure(
                        "ValueError",
                        f"{path!r}: {domain.name(other)} has {found.summary} on ranks "
                        f"{found.members}, expected {entry.summary} on ranks {entry.members} as on "
                        f"{domain.name(index)}",
                        True,
                    )
    return None
