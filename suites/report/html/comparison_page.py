"""The comparison of two runs as one page: what got worse first."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import Any

from defects.catalogue import Defect, read
from report.changes import Changes
from report.html import check_data, defect_data
from report.html.pages import render
from report.html.run_page import environment

_SHOWN = 200
"""Ids of checks that only one run had."""


def write(
    found: Changes, runs: tuple[dict[str, Any], dict[str, Any]], names: tuple[str, str], file: Path
) -> None:
    """Write the page; `names` are those of the runs, as the command was given them."""
    file.write_text(page(found, runs, names), encoding="utf-8", errors="replace")


def page(
    found: Changes, runs: tuple[dict[str, Any], dict[str, Any]], names: tuple[str, str]
) -> str:
    """The page of a comparison."""
    catalogue = read()
    groups = {name: getattr(found, name) for name in ("appeared", "vanished", "renamed")}
    met: dict[str, list[str]] = found.appeared | found.vanished | found.renamed
    known = [catalogue[i] for i in sorted(met) if i in catalogue]
    single = [*found.new_failures, *found.mended, *found.changed]
    ids = {change.check for change in single}.union(*met.values())
    before, now = (_of(run, ids) for run in runs)
    return render(
        "comparison.html",
        scripts=("checks.js", "comparison.js"),
        styles=("report.css",),
        data={
            "before": before,
            "checks": now,
            "names": names,
            "of_defect": met,
            "defects": defect_data.for_scripts(
                catalogue, {*met, *(d for check in [*before, *now] for d in _defects(check))}
            ),
        },
        found=found,
        names=names,
        said=sentence(found),
        rows=_side_by_side(*runs),
        sections=[(name, *_split(group, catalogue), len(group)) for name, group in groups.items()],
        lists=[
            ("new", "Now failing, without a defect", found.new_failures),
            ("worse", "Known failures that are worse", [c for c in found.changed if c.worse]),
            ("mended", "Now holding, without a defect", found.mended),
            ("better", "Known failures that are better", [c for c in found.changed if not c.worse]),
        ],
        only=[
            (name, several[:_SHOWN], len(several))
            for name, several in zip(names, (found.only_before, found.only_now), strict=True)
        ],
        seen={identity: len(several) for identity, several in met.items()},
        **defect_data.values(known),
    )


def sentence(found: Changes) -> str:
    """What changed, in one sentence."""
    bad = _told(
        (found.appeared, "new defect", "new defects"),
        (found.new_failures, "new failure without a defect", "new failures without a defect"),
        (
            [change for change in found.changed if change.worse],
            "known failure that is worse",
            "known failures that are worse",
        ),
        (found.slower, "measurement that costs more", "measurements that cost more"),
    )
    good = _told(
        (found.vanished, "defect gone", "defects gone"),
        (found.mended, "failure without a defect gone", "failures without a defect gone"),
    )
    if found.worse:
        return f"Something got worse: {bad}" + (f"; {good}" if good else "")
    return "Nothing got worse" + (f": {good}" if good else "")


def _told(*groups: tuple[Sized, str, str]) -> str:
    return ", ".join(
        f"{len(group)} {one if len(group) == 1 else several}"
        for group, one, several in groups
        if group
    )


def _split(
    group: dict[str, list[str]], catalogue: dict[str, Defect]
) -> tuple[dict[str, list[Defect]], list[str]]:
    """The defects of a group by severity, and the ids that the catalogue does not have."""
    known = sorted((catalogue[i] for i in group if i in catalogue), key=lambda d: d.rank)
    return defect_data.by_severity(known), [i for i in group if i not in catalogue]


def _of(run: dict[str, Any], ids: set[str]) -> list[dict[str, Any]]:
    return check_data.checks(check for check in run["checks"] if check["id"] in ids)


def _defects(check: dict[str, Any]) -> list[str]:
    return list(check.get("expected", {}).get("defects", ()))


def _side_by_side(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The environments, row by row; a value that only one of them has stands alone."""
    one, other = dict(environment(before["run"])), dict(environment(now["run"]))
    for run, rows in ((before, one), (now, other)):
        counts = run["run"]["counts"].items()
        rows["Verdicts"] = ", ".join(f"{n} {verdict}" for verdict, n in counts if n)
    return [(t, one.get(t, ""), other.get(t, "")) for t in dict.fromkeys([*one, *other])]
