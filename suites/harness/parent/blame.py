"""From the ranks' records to one verdict that names the rank and the cause.

The root is the first failure that no other rank can have caused; what other ranks suffered from it
(a lost peer, a collective that nobody joined, silence in a collective) is a victim's, whatever
its time stamp. In order of evidence: what a rank did itself (raised, died, left something
behind), then a rank that never answered though no collective holds it, then collectives that ran
into their clock. What the ranks issued (`hangs`) tells more of the last two: who is missed.
"""

from __future__ import annotations

from harness.parent import hangs
from harness.records.verdicts import Fate, Judgement, RankRecord, Verdict, cut

_OWN_DOING = {Fate.RAISED, Fate.BROKEN, Fate.DIED, Fate.LEAKED}
_VERDICTS = {
    Fate.RAISED: Verdict.FAIL,
    Fate.LEAKED: Verdict.FAIL,
    Fate.BROKEN: Verdict.ERROR,
    Fate.DIED: Verdict.CRASH,
    Fate.SILENT: Verdict.TIMEOUT,
    Fate.COLLECTIVE_TIMEOUT: Verdict.TIMEOUT,
    Fate.PEER_LOST: Verdict.FAIL,
}
_HUNG = {Fate.SILENT, Fate.COLLECTIVE_TIMEOUT, Fate.PEER_LOST}
_TEXT_LIMIT = 12_000


def judge(records: list[RankRecord], size: int) -> Judgement:
    """The verdict on one check from what is known of each of its ranks."""
    if len(records) != size:
        return Judgement(
            Verdict.ERROR, f"{len(records)} of {size} ranks are accounted for", ranks=records
        )
    bad = [r for r in records if r.fate is not Fate.PASSED]
    seconds = max(r.seconds for r in records)
    if not bad:
        return Judgement(Verdict.PASS, ranks=records, seconds=seconds)
    ordered = _by_blame(bad)
    verdict = _VERDICTS[ordered[0].fate]
    hung = ordered[0].fate in _HUNG
    # What raised or left something behind tells its cause itself, unless a collective raised it.
    asked = hung or ordered[0].fate is Fate.DIED or bool(ordered[0].waiting_in)
    finding = hangs.explain(records) if asked else None
    named = [r for r in records if finding is not None and r.rank in finding.ranks]
    if hung:
        ordered.sort(key=lambda r: r not in named)
    root = ordered[0]
    alike = [r for r in ordered if _same_cause(r, root) and (r in named) == (root in named)]
    victims = [r for r in ordered if r is not root and _is_victim(r, root, named)]
    text = _explain(root, alike, victims, ordered, records)
    if hung or finding is not None or root.fate is Fate.DIED:
        text += "\n--- last collectives ---\n" + "\n".join(hangs.table(records))
    else:
        for record in records:
            record.calls = None  # nothing for the results
    subject = named if hung and named else alike
    message = f"{_who(subject)}: {_said(root, finding)}"
    return Judgement(verdict, cut(message, 2000), text, records, seconds)


def not_started(records: list[RankRecord]) -> Judgement:
    """The verdict on a check whose world did not come up: the environment's, not the subject's."""
    waiting = [r for r in records if r.fate is Fate.SILENT and r.phase == "ready"]
    bad = _by_blame([r for r in records if r not in waiting])
    root = bad[0]
    alike = [r for r in bad if _same_cause(r, root)]
    victims = [r for r in bad if r is not root and _is_victim(r, root, [])]
    message = f"the world did not start: {_who(alike)}: {_cause(root)}"
    text = _explain(root, alike, victims, bad, records)
    return Judgement(Verdict.ERROR, cut(message, 2000), text, records)


def _by_blame(bad: list[RankRecord]) -> list[RankRecord]:
    def key(record: RankRecord) -> tuple[int, float, int]:
        if record.fate in _OWN_DOING:
            order = 0 if record.fate is not Fate.BROKEN else 1
        elif record.fate is Fate.SILENT and not record.waiting_in:
            order = 2
        elif record.fate is Fate.COLLECTIVE_TIMEOUT:
            order = 3
        elif record.fate is Fate.SILENT:
            order = 4
        else:
            order = 5
        return order, record.at, record.rank

    return sorted(bad, key=key)


def _same_cause(record: RankRecord, root: RankRecord) -> bool:
    """Whether two ranks failed alike; only first lines count, for reprs hold addresses."""
    first = [r.message.partition("\n")[0] for r in (record, root)]
    return record.fate == root.fate and first[0] == first[1]


def _is_victim(record: RankRecord, root: RankRecord, named: list[RankRecord]) -> bool:
    if record.fate is Fate.PEER_LOST:
        return True
    if record in named:
        return False
    if root in named and root.fate in _HUNG:
        return record.fate in _HUNG and bool(record.waiting_in)
    if root.fate in _OWN_DOING or (root.fate is Fate.SILENT and not root.waiting_in):
        return record.fate in {Fate.COLLECTIVE_TIMEOUT, Fate.SILENT} and bool(record.waiting_in)
    return False


def _who(records: list[RankRecord]) -> str:
    names = [_name(r) for r in sorted(records, key=lambda r: r.rank)]
    return ("rank " if len(names) == 1 else "ranks ") + ", ".join(names)


def _name(record: RankRecord) -> str:
    return f"{record.rank} on {record.where}" if record.where else str(record.rank)


def _said(root: RankRecord, finding: hangs.Finding | None) -> str:
    """The cause in one line, with what the ranks' records tell of it."""
    parts = [_cause(root)]
    if root.fate not in _HUNG:
        if finding is not None and finding.differ:
            parts.append(f"{hangs.in_words(finding.ranks)} {finding.said}")
        elif root.fate is Fate.DIED and (last := hangs.last_call(root.calls)) is not None:
            parts.append(f"its last collective was {last}")
    elif finding is not None:
        # That a rank did not answer because it waits for others says nothing more.
        if finding.ranks and (root.fate is not Fate.SILENT or root.waiting_in):
            parts = []
        parts.append(finding.said)
    return "; ".join(parts)


def _cause(root: RankRecord) -> str:
    """One line on the root."""
    message = root.message.partition("\n")[0]
    if root.fate is Fate.COLLECTIVE_TIMEOUT and root.waiting_in:
        return f"waited in {root.waiting_in} ({message})"
    return message


def _explain(
    root: RankRecord,
    alike: list[RankRecord],
    victims: list[RankRecord],
    ordered: list[RankRecord],
    records: list[RankRecord],
) -> str:
    """The text under the check's name: the first failure whole, a line for each other rank."""
    lines = [f"=== {_who(alike)}: {root.fate} (first failure, in phase {root.phase}) ==="]
    # The last dump shows where a silent rank stood; a traceback reads from its beginning.
    lines.append(cut(root.details.rstrip() or root.message, _TEXT_LIMIT))
    for name, body in root.extra.get("sections", []):
        lines += [f"--- {name}, rank {_name(root)} ---", cut(body.rstrip(), 4000)]
    if root.output_tail and "it wrote last:" not in root.details:
        lines += [f"--- output, rank {_name(root)} ---", root.output_tail.rstrip()]
    for record in ordered:
        if record in alike:
            continue
        role = "victim" if record in victims else "also"
        first = cut(record.message.partition("\n")[0], 300)
        waiting = f", in {record.waiting_in}" if record.waiting_in else ""
        lines.append(f"rank {_name(record)}: {role}, {record.fate}{waiting}: {first}")
        if record.fate is Fate.SILENT and record.details:
            lines.append(cut(_main_thread(record.details), 3000))
        elif role == "also" and record.details:
            lines.append(cut(record.details.rstrip(), 3000))
    passed = [r for r in records if r.fate is Fate.PASSED]
    if passed:
        lines.append(f"{_who(passed)}: passed")
    logs = [r.log for r in ordered if r.log]
    if logs:
        lines.append("logs: " + ", ".join(logs))
    return "\n".join(lines)


def _main_thread(dump: str) -> str:
    head, mark, tail = dump.rpartition("Current thread")
    return (mark + tail).rstrip() if mark else head.rstrip() or tail.rstrip()
