"""What records of ranks tell of a hang, and what they do not: nobody is blamed wrongly."""

from __future__ import annotations

from typing import Any

import pytest

from harness.parent.hangs import explain, in_words
from harness.records.call_ring import ANY_SOURCE, NEW_GROUPS, Call, Calls, Stream
from harness.records.verdicts import Fate, RankRecord

ALL = Stream("0", (0, 1, 2))
PAIR = Stream("1", (1, 2))
NOW = 100.0
ASLEEP = 'Current thread 0x1 (most recent call first):\n  File "/a/check.py", line 3 in nap\n'


def calls(*made: tuple[Any, ...], missing: str = "", read_at: float = NOW) -> Calls:
    """Calls as (stream, kind) or (stream, kind, data), five seconds before `NOW` and later."""
    found = Calls(read_at, missing)
    for step, (stream, kind, *rest) in enumerate(made):
        data = rest[0] if rest else ""
        number = found.counts[stream] = found.counts.get(stream, 0) + 1
        kinds = [c.kind for c in found.calls if c.stream == stream]
        digest = hash((*kinds, kind))
        at = NOW - 5 + step / 1000
        found.calls.append(Call(stream, number, kind, kind, data, data, "issued", at, digest))
    return found


def waits(rank: int, made: Calls | None) -> RankRecord:
    return RankRecord(
        rank, fate=Fate.COLLECTIVE_TIMEOUT, at=NOW - 1, waiting_in="all_reduce", calls=made
    )


def sleeps(rank: int, made: Calls | None) -> RankRecord:
    return RankRecord(rank, fate=Fate.SILENT, details=ASLEEP, calls=made)


def passed(rank: int, made: Calls | None) -> RankRecord:
    return RankRecord(rank, fate=Fate.PASSED, calls=made)


A, B = (ALL, "all_reduce"), (ALL, "all_gather")


def said(*records: RankRecord) -> str:
    """`ranks 0 and 2: what they did`."""
    found = explain(records)
    if found is None:
        return ""
    return f"{in_words(found.ranks)}: {found.said}" if found.ranks else found.said


def test_who_sleeps_is_told_with_the_place() -> None:
    assert said(waits(0, calls(A, B)), sleeps(1, calls(A)), waits(2, calls(A, B))) == (
        "rank 1: never issued all_gather #2 of group (0, 1, 2), which ranks 0 and 2 wait in; "
        "it is in nap (check.py, line 3)"
    )


def test_who_is_not_seen_to_wait_is_not_said_to() -> None:
    """It has issued the call, and may be anywhere."""
    assert said(sleeps(0, calls(A)), sleeps(1, calls()), passed(2, calls(A))).startswith(
        "rank 1: never issued all_reduce #1 of group (0, 1, 2), which ranks 0 and 2 have issued"
    )


def test_nobody_is_missed_who_may_have_been_on_the_way() -> None:
    early = NOW - 4.5
    records = [waits(0, calls(A)), sleeps(1, calls(read_at=early)), waits(2, calls(A))]
    assert said(*records) == ""


def test_calls_that_are_missing_are_no_calls_that_were_not_made() -> None:
    records = [waits(0, calls(A)), sleeps(1, calls(missing="it hid")), waits(2, calls(A))]
    assert said(*records) == "which collectives rank 1 issued is not known: it hid"


def test_a_rank_without_a_record_is_not_blamed() -> None:
    records = [waits(0, calls(A)), sleeps(1, None), waits(2, calls(A))]
    assert said(*records) == "which collectives rank 1 issued is not known: it has no record"


def test_who_waits_for_another_is_not_named() -> None:
    """Rank 0 waits for 1, which waits for 2."""
    records = [
        waits(0, calls(A)),
        waits(1, calls((PAIR, "barrier"))),
        sleeps(2, calls()),
    ]
    found = explain(records)
    assert found is not None
    assert found.ranks == (2,)


def test_a_send_that_nobody_took_makes_no_circle() -> None:
    """Rank 1 sleeps; that nobody receives what it sent keeps it from nothing."""
    way = Stream("0", ALL.members, (1, 0, 0))
    found = explain([waits(0, calls(A)), sleeps(1, calls((way, ""))), waits(2, calls(A))])
    assert found is not None
    assert found.ranks == (1,)
    assert found.said.startswith("never issued all_reduce #1 of group (0, 1, 2), which ranks 0 and")


def test_a_circle_is_told_as_one() -> None:
    other = Stream("2", (1, 2))
    records = [
        passed(0, calls()),
        waits(1, calls((PAIR, "barrier"))),
        waits(2, calls((other, "barrier"))),
    ]
    assert said(*records) == (
        "ranks 1 and 2: wait for each other: rank 1 waits in barrier #1 of group (1, 2), which "
        "rank 2 never issued; rank 2 waits in barrier #1 of group (1, 2), which rank 1 never issued"
    )


def test_a_source_that_went_on_waits_for_nobody() -> None:
    assert said(passed(0, calls(A)), sleeps(1, calls()), sleeps(2, calls())) == ""


def test_a_message_that_was_taken_from_any_source_is_not_missed() -> None:
    way, taken = Stream("0", ALL.members, (0, 1, 0)), Stream("0", ALL.members, (ANY_SOURCE, 1, 0))
    assert said(waits(0, calls((way, ""))), passed(1, calls((taken, ""))), passed(2, calls())) == ""
    assert said(waits(0, calls((way, ""))), passed(1, calls()), passed(2, calls())) == (
        "rank 1: never issued recv from rank 0 #1, while rank 0 waits in  #1 of group (0, 1, 2); "
        "it has passed"
    )


def test_sizes_that_did_no_harm_are_no_cause() -> None:
    a, b = (ALL, "broadcast", "int8 4"), (ALL, "broadcast", "uint8 4")
    found = explain([waits(0, calls(a, A)), sleeps(1, calls(b)), waits(2, calls(a, A))])
    assert found is not None
    assert found.said.startswith("never issued all_reduce #2"), found
    found = explain([waits(0, calls(a)), waits(1, calls(b)), waits(2, calls(a))])
    assert found is not None
    assert found.ranks == (1,)
    assert found.differ


@pytest.mark.parametrize("early", [A, B])
def test_what_is_forgotten_is_not_compared(early: tuple[Any, ...]) -> None:
    """Records hold the last calls alone; a digest tells whether those before were alike."""
    short = calls(A, A, A)
    long = calls(early, A, A, A)
    del short.calls[0], long.calls[:2]
    found = explain([waits(0, long), sleeps(1, short), waits(2, long)])
    assert found is not None
    if early == A:
        assert found.said.startswith("never issued all_reduce #4")
    else:
        expected = "the ranks of group (0, 1, 2) differed before the last calls, which are all that"
        assert found.said == f"{expected} the record holds"
        assert found.ranks == ()


def test_where_all_issued_alike_nobody_is_blamed() -> None:
    assert said(waits(0, calls(A)), waits(1, calls(A)), waits(2, calls(A))) == (
        "the records show no cause: all ranks issued all_reduce #1 of group (0, 1, 2), the last of "
        "rank 0"
    )


def test_who_waits_for_no_reason_that_is_known_is_told_to_wait() -> None:
    """Rank 1 never came to the gather, for it waits where all have come."""
    records = [waits(0, calls(A, B)), waits(1, calls(A)), waits(2, calls(A, B))]
    assert said(*records) == (
        "rank 1: never issued all_gather #2 of group (0, 1, 2), which ranks 0 and 2 wait in; it "
        "was in a collective itself, and had issued all_reduce #1 of group (0, 1, 2) last"
    )


def test_other_groups_are_told_beside_the_cause() -> None:
    """That a rank made other groups may have done no harm, and is no cause by itself."""
    new = Stream(NEW_GROUPS, ALL.members)
    one, other = (new, "new_group (0, 1)"), (new, "new_group (0, 2)")
    records = [waits(0, calls(one, A)), sleeps(1, calls(other)), waits(2, calls(one, A))]
    assert said(*records).endswith(
        "; it is in nap (check.py, line 3); not all had made the same groups: rank 1 issued "
        "new_group (0, 2), as #1 of group (0, 1, 2), where ranks 0 and 2 issued new_group (0, 1)"
    )
    records = [waits(0, calls(one, A)), waits(1, calls(other, A)), waits(2, calls(one, A))]
    assert said(*records).startswith("the records show no cause: all ranks issued all_reduce #1")


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([1], "rank 1"),
        ([2, 0], "ranks 0 and 2"),
        ([0, 2, 3], "ranks 0, 2 and 3"),
        (range(7), "ranks 0 to 6"),
        ([*range(7), 9, 11], "ranks 0 to 6, 9 and 11"),
    ],
)
def test_ranks_in_words(ranks: Any, words: str) -> None:
    assert in_words(ranks) == words
