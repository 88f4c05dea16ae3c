"""What ranks that hang did: their last collectives compared, and said in one sentence.

What is said is what the records hold, and no more. A rank is named for a collective that it did
not issue only when that had been waiting for it for a second when the rank's record was read, and
when the rank does not wait for others itself; where calls are missing from a record, nothing is
said that rests on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.records.call_ring import ANY_SOURCE, NEW_GROUPS, Call, Calls, Stream
from harness.records.verdicts import Fate, RankRecord
from harness.system import stacks

_WAITED = 1.0
_SHOWN = 6
_HELD = {Fate.COLLECTIVE_TIMEOUT, Fate.SILENT, Fate.PEER_LOST}


@dataclass(frozen=True)
class Finding:
    """One sentence on some ranks."""

    ranks: tuple[int, ...]
    """The subject of the sentence; empty where no rank can be named."""
    said: str
    differ: bool = False
    """The ranks issued different collectives as the same one of their group."""


@dataclass(frozen=True)
class _Wait:
    """A collective that some of its ranks have issued and others have not."""

    call: Call
    """As the first of them noted it."""
    issued: tuple[int, ...]
    waiting: tuple[int, ...]
    """Those that are seen to wait in it."""
    absent: tuple[int, ...]

    def for_whom(self, verb: str, other: str) -> str:
        """`which ranks 0 and 2 wait in`, where they are seen to."""
        if self.waiting:
            return f"{in_words(self.waiting)} {_verb(self.waiting)} {verb}"
        return f"{in_words(self.issued)} {'has' if len(self.issued) == 1 else 'have'} {other}"


class _Records:
    """The ranks of a world, with what each is known to have issued."""

    def __init__(self, records: Iterable[RankRecord]) -> None:
        self.ranks = {r.rank: r for r in records}
        self.calls = {rank: r.calls for rank, r in self.ranks.items() if r.calls is not None}
        whole = {rank for rank, calls in self.calls.items() if not calls.missing}
        found = dict.fromkeys(s for calls in self.calls.values() for s in calls.counts)
        self.streams = [s for s in found if s.members and whole.issuperset(s.ranks)]
        """Those of which the records of all ranks are whole."""

    def count(self, rank: int, stream: Stream) -> int:
        return self.calls[rank].counts.get(stream, 0)

    def last(self, rank: int) -> Call | None:
        return last_call(self.calls.get(rank))

    def held(self, rank: int) -> bool:
        return self.ranks[rank].fate in _HELD

    def waits(self, rank: int) -> bool:
        """Whether the rank was seen in a collective, by its stack or by the exception from it."""
        record = self.ranks[rank]
        return self.held(rank) and (record.fate is not Fate.SILENT or bool(record.waiting_in))

    def passed(self, ranks: Iterable[int]) -> tuple[int, ...]:
        return tuple(rank for rank in ranks if self.ranks[rank].fate is Fate.PASSED)


def explain(records: Sequence[RankRecord]) -> Finding | None:
    """Why collectives of a check did not end, as far as its ranks' records tell."""
    known = _Records(records)
    found = _explain(known)
    if found is None or found.differ:
        return found
    # That not all made the same groups may have done no harm, so it is no cause by itself.
    for stream in known.streams:
        if stream.name == NEW_GROUPS and (other := _difference(stream, known)) is not None:
            said = f"{in_words(other.ranks)} {other.said}" if other.ranks else other.said
            return Finding(found.ranks, f"{found.said}; not all had made the same groups: {said}")
    return found


def _explain(known: _Records) -> Finding | None:
    stuck = {call.stream.name for r in known.ranks if known.waits(r) and (call := known.last(r))}
    for stream in known.streams:
        asked = stream.name != NEW_GROUPS or NEW_GROUPS in stuck
        if asked and (found := _difference(stream, known)) is not None:
            return found
    waits = [w for s in known.streams if (w := _wait(s, known)) is not None]
    waits = [w for w in waits if w.waiting or w.call.stream.name != NEW_GROUPS]
    if not waits:
        return _late(known) or _missing(known)
    waiting = {rank for w in waits for rank in w.issued if known.waits(rank)}
    ends = [w for w in waits if not waiting.issuperset(w.absent)]
    if not ends:
        told = "; ".join(
            f"{w.for_whom('in', 'issued')} {w.call}, which {in_words(w.absent)} never issued"
            for w in waits
        )
        return Finding(tuple(sorted(waiting)), f"wait for each other: {told}")
    first = min(ends, key=lambda w: (not w.waiting, w.call.at))
    return _absence(first, tuple(r for r in first.absent if r not in waiting), known)


def last_call(calls: Calls | None) -> Call | None:
    """The last collective that a rank issued."""
    return calls.calls[-1] if calls is not None and calls.calls else None


def table(records: Iterable[RankRecord]) -> list[str]:
    """The last calls of each rank, a line each."""
    lines = []
    for record in records:
        if record.calls is None:
            continue
        lines.append(f"rank {record.rank}:" + ("" if record.calls.calls else " none"))
        if record.calls.missing:
            lines.append(f"  calls are missing: {record.calls.missing}")
        for call in record.calls.calls[-_SHOWN:]:
            before = record.calls.read_at - call.at
            state = "" if call.state == "issued" else f", {call.state}"
            lines.append(f"  {before:.3f} s before the end: {call}{state}")
    return lines


def in_words(ranks: Iterable[int]) -> str:
    """`rank 1`, `ranks 0, 2 and 3`, `ranks 0 to 6 and 8`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    names: list[str] = []
    for run in runs:
        names += [f"{run[0]} to {run[-1]}"] if len(run) > 4 else map(str, run)
    if len(runs) == len(names) == 1 == len(runs[0]):
        return f"rank {names[0]}"
    return "ranks " + " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _difference(stream: Stream, known: _Records) -> Finding | None:
    """The first collective of a group that its ranks did not issue alike."""
    held = {rank: known.calls[rank].of(stream) for rank in stream.ranks}
    for number in sorted(set().union(*held.values())):
        calls = {rank: c[number] for rank, c in held.items() if number in c}
        if len({c.kind for c in calls.values()}) > 1:
            return _told(stream, calls)
        if len({c.digest for c in calls.values()}) > 1:
            said = f"the ranks of {stream} differed before the last calls, which are all that the"
            return Finding((), f"{said} record holds")
        # Sizes that differ do no harm where all went on.
        stuck = any(
            call == known.last(rank) and (known.waits(rank) or known.ranks[rank].fate is Fate.DIED)
            for rank, call in calls.items()
        )
        if stuck and len({c.data for c in calls.values()}) > 1:
            return _told(stream, calls)
    return None


def _told(stream: Stream, calls: dict[int, Call]) -> Finding:
    """Who issued what; a single rank that differs from several others is the subject."""
    alike: dict[tuple[str, str], list[int]] = {}
    for rank, call in calls.items():
        alike.setdefault(
            (call.kind, call.data) if stream.way is None else (call.op, ""), []
        ).append(rank)
    parts = sorted(alike.values(), key=lambda ranks: (len(ranks), ranks))
    this_call = f"#{calls[parts[0][0]].number} of {stream}"
    if len(parts) == 2 and len(parts[0]) == 1 < len(parts[1]):
        (odd,), others = parts
        said = f"issued {_what(calls[odd])}, as {this_call}, where {in_words(others)} issued "
        return Finding((odd,), said + _what(calls[others[0]]), differ=True)
    told = "; ".join(f"{in_words(p)} issued {_what(calls[p[0]])}" for p in sorted(parts))
    return Finding(tuple(sorted(calls)), f"disagree on {this_call}: {told}", differ=True)


def _what(call: Call) -> str:
    return f"{call.op}, {call.arguments}" if call.arguments else call.op


def _wait(stream: Stream, known: _Records) -> _Wait | None:
    """The first collective of a group that some of its ranks have issued and others have not."""
    counts = {rank: known.count(rank, stream) for rank in stream.ranks}
    least = min(counts.values())
    absent = tuple(rank for rank, count in counts.items() if count == least)
    issued = tuple(rank for rank, count in counts.items() if count > least)
    if not any(known.held(rank) for rank in issued):
        return None
    calls = [known.calls[rank].of(stream).get(least + 1) for rank in issued]
    found = [call for call in calls if call is not None]
    if len(found) < len(issued):
        return None
    if stream.way is not None and _takes_any(known.calls[stream.way[1]], stream):
        return None  # it may have taken the message in a call that names no source
    first = min(found, key=lambda c: c.at)
    if min(known.calls[rank].read_at for rank in absent) - first.at < _WAITED:
        return None  # it may have been on its way to it
    waiting = tuple(
        rank
        for rank, call in zip(issued, found, strict=True)
        if known.waits(rank) and known.last(rank) == call
    )
    return _Wait(first, issued, waiting, absent)


def _takes_any(calls: Calls, stream: Stream) -> bool:
    return any(
        other.name == stream.name and other.way is not None and other.way[0] == ANY_SOURCE
        for other in calls.counts
    )


def _absence(wait: _Wait, absent: tuple[int, ...], known: _Records) -> Finding:
    call = wait.call
    passed = known.passed(absent)
    who = "it" if len(absent) == 1 else "they"
    if len(passed) < len(absent):
        who = in_words(passed) if passed else ""
    gone = f"{who} {'has' if len(passed) == 1 else 'have'} passed" if who else ""
    if call.stream.way is not None:
        source, target, _ = call.stream.way
        missing = f"send to rank {target}" if absent == (source,) else f"recv from rank {source}"
        said = (
            f"never issued {missing} #{call.number}, while {wait.for_whom('in', 'issued')} {call}"
        )
        return Finding(absent, "; ".join(filter(None, (said, gone))))
    if len(passed) == len(absent) >= len(wait.issued) and wait.waiting:
        said = f"{_verb(wait.waiting)} in {call}, which {in_words(passed)} never issued: {gone}"
        return Finding(wait.waiting, said)
    said = f"never issued {call}, which {wait.for_whom('in', 'issued')}"
    where = ""
    if len(absent) == 1:
        record, last = known.ranks[absent[0]], known.last(absent[0])
        if known.waits(record.rank) and last is not None:
            where = f"it was in a collective itself, and had issued {last} last"
        elif record.fate is Fate.SILENT and (frame := stacks.frame_of_dump(record.details)):
            where = f"it is in {frame}"
    return Finding(absent, "; ".join(filter(None, (said, gone, where))))


def _late(known: _Records) -> Finding | None:
    """Ranks that issued a collective after others had given up on it, or all in time."""
    for rank, record in known.ranks.items():
        call = known.last(rank)
        if call is None or not known.waits(rank) or call.stream.way is not None:
            continue
        if call.stream not in known.streams:
            continue
        calls = {r: known.calls[r].of(call.stream).get(call.number) for r in call.stream.ranks}
        found = {r: c for r, c in calls.items() if c is not None}
        if len(found) < len(calls):
            continue
        late = [r for r, c in found.items() if record.fate is not Fate.SILENT and c.at > record.at]
        if late:
            after = min(found[r].at for r in late) - min(c.at for c in found.values())
            others = in_words(r for r in found if r not in late)
            said = f"issued {call} only {after:.1f} s after {others}, when {in_words([rank])} had"
            return Finding(tuple(late), f"{said} given up on it")
        said = f"the records show no cause: all ranks issued {call}, the last of {in_words([rank])}"
        return Finding((), said)
    return None


def _missing(known: _Records) -> Finding | None:
    """Where nothing can be told, and the cause may be in what is not recorded."""
    for rank in known.ranks:
        calls = known.calls.get(rank)
        if calls is None or calls.missing:
            why = "it has no record" if calls is None else calls.missing
            return Finding((), f"which collectives rank {rank} issued is not known: {why}")
    return None


def _verb(ranks: Sequence[int]) -> str:
    return "waits" if len(ranks) == 1 else "wait"
