"""Chooses defects, and tells one in full: what ci/defects prints."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from defects.catalogue import Defect
from defects.words import MENDERS, ROADS

_WIDTH = 96


def chosen(
    defects: Iterable[Defect],
    *,
    severity: str | None = None,
    road: str | None = None,
    function: str | None = None,
    torch: str | None = None,
) -> list[Defect]:
    """Those that have the severity, meet the road, break the function, and are in the torch."""
    return sorted(
        (
            defect
            for defect in defects
            if (severity is None or severity in defect.severity)
            and (road is None or road in defect.roads)
            and (function is None or any(_is(function, f) for f in defect.functions))
            and (torch is None or defect.is_in(torch))
        ),
        key=lambda defect: defect.rank,
    )


def _is(wanted: str, function: str) -> bool:
    return wanted == function or function.endswith(f".{wanted}")


def mender(word: str) -> str:
    """Who mends it, in words."""
    return MENDERS.get(word, word)


def in_full(defect: Defect, checks: int) -> Iterator[str]:
    """A defect as a text of lines."""
    yield from textwrap.wrap(f"{defect.id}  {defect.title}", _WIDTH)
    yield ""
    yield from _field("severity", f"{', '.join(defect.severity)}: {defect.severity_note}")
    yield from _field("sees", defect.sees)
    yield from _field("cause", defect.cause)
    for road in defect.roads:
        yield from _field("road", f"{road}: {ROADS[road]}")
    yield from _field("breaks", ", ".join(defect.functions))
    yield from _field("laws", ", ".join(defect.laws))
    yield from _field("workaround", defect.workaround or "none is known")
    yield from _field("mended by", " or ".join(map(mender, defect.mended_by)))
    yield from _field("versions", defect.versions)
    yield from _field("owner", defect.owner)
    yield from _field("checks", f"{checks} in a whole run")
    for url in defect.upstream or ("no thread is known",):
        yield from _field("upstream", url)


def _field(name: str, text: str) -> Iterator[str]:
    yield from textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"{name:11}",
        subsequent_indent=" " * 11,
        break_long_words=False,
        break_on_hyphens=False,
    )
