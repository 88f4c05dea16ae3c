"""Two runs in terms of defects: what appeared, what went, what got worse.

Only checks that ran in both count; what only one of them ran is named apart. `ci/compare` shows it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import asdict, dataclass
from typing import Any

from defects.catalogue import Defect, read
from report.compare import NotComparableError
from report.matrix import NOT_RUN
from report.slower import Slower
from report.terminal import UNEXPECTED

KINDS = ("holds", "fails", "crashes", "hangs")
"""How a check came out, better before worse."""


@dataclass(frozen=True)
class Changed:
    """A check that came out in another way."""

    check: str
    before: str
    now: str
    message: str

    @property
    def worse(self) -> bool:
        return KINDS.index(self.now) > KINDS.index(self.before)


@dataclass(frozen=True)
class Changes:
    """What one run shows that the other does not."""

    appeared: dict[str, list[str]]
    """Id of a defect that was not met before, to its checks."""
    vanished: dict[str, list[str]]
    renamed: dict[str, list[str]]
    """Id of a defect that was not met before, to its checks that failed then as well."""
    new_failures: list[Changed]
    """Checks that fail now, did not, and lead to no defect."""
    mended: list[Changed]
    """The reverse: they failed, led to no defect, and hold."""
    changed: list[Changed]
    """Known failures on both sides that come out in another way."""
    varied: list[Changed]
    """Those of which the defect names both ways: they may differ between any two runs."""
    slower: list[Slower]
    """What costs more, where both runs measured."""
    only_before: list[str]
    only_now: list[str]
    common: int

    @property
    def worse(self) -> bool:
        """Whether anything got worse."""
        worse = any(c.worse for c in self.changed)
        return bool(self.appeared or self.new_failures or worse or self.slower)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {"worse": self.worse, **asdict(self)}


def changes(
    before: Mapping[str, Any], now: Mapping[str, Any], slower: Iterable[Slower] = ()
) -> Changes:
    """Hold the results of a run against those of another; `slower` is what benchmarks say.

    Raises NotComparableError where no check ran in both.
    """
    old, new = _ran(before), _ran(now)
    common = sorted(old.keys() & new.keys())
    if not common:
        raise NotComparableError(
            f"no check ran in both: the first has {len(old)} that ran, the second {len(new)}"
        )
    met_before, met_now = _met(old, common), _met(new, common)
    pairs = [Changed(i, kind(old[i]), kind(new[i]), _said(new[i])) for i in common]
    nameless = [p for p in pairs if not _defects(old[p.check]) and not _defects(new[p.check])]
    known = [p for p in pairs if _defects(old[p.check]) and _defects(new[p.check])]
    differ = [p for p in known if p.before != p.now]
    catalogue = read()
    varied = [p for p in differ if {p.before, p.now} <= ways(catalogue, _defects(new[p.check]))]
    return Changes(
        appeared=_only(met_now, met_before, old),
        vanished=_only(met_before, met_now, new),
        renamed=_renamed(met_now, met_before, old),
        new_failures=[p for p in nameless if p.before == "holds" != p.now]
        + [p for p in pairs if _defects(old[p.check]) and _unnamed(new[p.check])],
        mended=[p for p in nameless if p.before != "holds" == p.now],
        changed=[p for p in differ if p not in varied],
        varied=varied,
        slower=list(slower),
        only_before=sorted(old.keys() - new.keys()),
        only_now=sorted(new.keys() - old.keys()),
        common=len(common),
    )


def _count(several: Sized, what: str = "check") -> str:
    return f"{len(several)} {what}{'' if len(several) == 1 else 's'}"


def lines(found: Changes, first: str, second: str) -> Iterator[str]:
    """The comparison for a person; `first` and `second` name the runs."""
    known = read()
    yield f"{first} -> {second}: {found.common} checks ran in both"
    for title, group in (("new", found.appeared), ("gone", found.vanished)):
        yield f"{title}: {_count(group, 'defect')}"
        for identity in sorted(group, key=lambda i: _rank(known, i)):
            yield f"  {_told(known, identity)} ({_count(group[identity])})"
    for identity, ids in found.renamed.items():
        yield f"met now by {_count(ids)} that failed before, too: {_told(known, identity)}"
    for title, several in (
        ("now failing, without a defect", found.new_failures),
        ("now holding, without a defect", found.mended),
        ("worse", [c for c in found.changed if c.worse]),
        ("better, and still failing", [c for c in found.changed if not c.worse]),
    ):
        if several:
            yield f"{title}: {_count(several)}"
            for change in several:
                yield f"  {change.before} -> {change.now}  {change.check}"
                if change.message:
                    yield f"      {change.message}"
    if found.varied:
        yield f"{_count(found.varied)} failed in another of the ways that their defect names"
    if found.slower:
        yield f"costing more: {_count(found.slower, 'measurement')}"
        for one in found.slower:
            yield f"  {one.before:.4g} -> {one.now:.4g}  {one.what}"
    for name, ids in ((first, found.only_before), (second, found.only_now)):
        if ids:
            yield f"in {name} only, and not counted: {_count(ids)}, {ids[0]}" + (
                " …" if ids[1:] else ""
            )
    yield "something got worse" if found.worse else "nothing got worse"


def _ran(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {c["id"]: c for c in data["checks"] if c["verdict"] not in NOT_RUN}


def _met(checks: Mapping[str, dict[str, Any]], ids: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for identity in ids:
        for defect in _defects(checks[identity]):
            found[defect].append(identity)
    return dict(found)


def _only(
    met: Mapping[str, list[str]], others: Mapping[str, object], other: Mapping[str, dict[str, Any]]
) -> dict[str, list[str]]:
    """The defects that one run alone met, with the checks that hold in the other."""
    found = {
        defect: [i for i in ids if kind(other[i]) == "holds"]
        for defect, ids in met.items()
        if defect not in others
    }
    return {defect: ids for defect, ids in found.items() if ids}


def _renamed(
    met: Mapping[str, list[str]], others: Mapping[str, object], other: Mapping[str, dict[str, Any]]
) -> dict[str, list[str]]:
    """New defects whose checks all failed before: for another reason, or without a name."""
    new = {defect: ids for defect, ids in met.items() if defect not in others}
    return {d: ids for d, ids in new.items() if all(kind(other[i]) != "holds" for i in ids)}


def _defects(check: Mapping[str, Any]) -> tuple[str, ...]:
    known = check["verdict"] == "xfail"
    return tuple(check["expected"].get("defects", ())) if known else ()


def ways(catalogue: Mapping[str, Defect], defects: Iterable[str]) -> set[str]:
    """How checks of these defects may come out, by the severities of the catalogue."""
    words = {word for i in defects if i in catalogue for word in catalogue[i].severity}
    return {"fails", *(words & set(KINDS))}


def _unnamed(check: Mapping[str, Any]) -> bool:
    return check["verdict"] in UNEXPECTED and kind(check) != "holds"


def kind(check: Mapping[str, Any]) -> str:
    """How it came out, whatever was expected; an expected failure that holds, holds."""
    if check["verdict"] in ("pass", "xpass"):
        return "holds"
    fates = {rank["fate"] for rank in check["ranks"]}
    if "died" in fates:  # whoever waits, waits for the dead
        return "crashes"
    return "hangs" if fates & {"collective timeout", "silent"} else "fails"


def _said(check: Mapping[str, Any]) -> str:
    return str(check["message"]).partition("\n")[0][:160]


def _rank(known: Mapping[str, Defect], identity: str) -> tuple[int, str]:
    return known[identity].rank if identity in known else (len(known), identity)


def _told(known: Mapping[str, Defect], identity: str) -> str:
    if identity not in known:
        return f"{identity}, which this catalogue does not have"
    defect = known[identity]
    return f"{defect.worst:8} {defect.id}  {defect.title}"
