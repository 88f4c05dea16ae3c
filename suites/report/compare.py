"""Two runs side by side, as a table in Markdown: what holds with one subject, and with the other.

Checks are paired by id. A failure that stands in callers.toml is neither subject's: it is torch's
code around the set that fails, whoever serves it. It is counted apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from report.matrix import NOT_RUN

CALLERS = "callers.toml"
AREA = "integration"
"""The module of checks that run torch's public API: a row for each area, not one for all."""


class NotComparableError(Exception):
    """The two runs have no check in common; the text says what they hold."""


def compare(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """The lines of the table.

    Raises NotComparableError where no check ran in both.
    """
    pairs = list(_pairs(before["checks"], after["checks"]))
    if not pairs:
        raise NotComparableError(
            f"no check ran in both: {before['run']['subject']} has {len(before['checks'])} checks, "
            f"{after['run']['subject']} {len(after['checks'])}"
        )
    rows: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = defaultdict(list)
    for one, other in pairs:
        name = f"{AREA}: {one['function']}" if one["module"] == AREA else one["module"]
        rows[name].append((one, other))
    yield f"| checks that hold | {_title(before)} | {_title(after)} | torch's callers |"
    yield "| --- | ---: | ---: | ---: |"
    for name in sorted(rows, key=lambda n: (n.startswith(AREA), n)):
        yield _row(f"`{name}`" if not name.startswith(AREA) else name, rows[name])
    yield _row("**all**", pairs)


def _pairs(
    before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The checks of functions and areas that ran in both."""
    others = {c["id"]: c for c in after}
    for check in before:
        other = others.get(check["id"])
        if other and check["function"] and not {check["verdict"], other["verdict"]} & NOT_RUN:
            yield check, other


def _title(data: dict[str, Any]) -> str:
    return f"{data['run']['subject']} {data['run']['subject_version']}"


def _row(name: str, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    one, other = (sum(p[side]["verdict"] == "pass" for p in pairs) for side in (0, 1))
    callers = sum((p[1]["expected"] or {}).get("file") == CALLERS for p in pairs)
    return f"| {name} | {one} of {len(pairs)} | {other} of {len(pairs)} | {callers or ''} |"
