"""What the page that compares any two runs is given: a letter for each check of each run."""

from __future__ import annotations

from typing import Any

from defects.catalogue import Defect
from report.changes import kind, ways
from website.history import History, Run

_LETTERS = {"holds": "p", "fails": "f", "crashes": "c", "hangs": "h"}
ABSENT, NOT_RUN = " ", "-"


def data(found: History, known: dict[str, Defect]) -> dict[str, Any]:
    """Checks and defects once, then of each run a letter for each check and the defects it met.

    Letters: p holds; f, c, h fails, crashes, hangs as is known; F, C, H the same unexpectedly;
    - not run; a space: the run has no such check.
    """
    runs = found.runs
    ids = sorted({identity for run in runs for identity in run.checks})
    place = {identity: n for n, identity in enumerate(ids)}
    # Nights are mostly alike: what is the same is there once.
    letters: dict[str, int] = {}
    defects: dict[str, tuple[int, dict[str, list[int]]]] = {}
    listed = []
    for run in runs:
        text = "".join(_letter(run, identity) for identity in ids)
        ones = _defects(run, place)
        listed.append(
            {
                "run": run.slug,
                "title": f"{run.night}  {run.column}",
                "commit": run.commit,
                "letters": letters.setdefault(text, len(letters)),
                "defects": defects.setdefault(repr(ones), (len(defects), ones))[0],
            }
        )
    met = {identity for run in runs for identity in (*run.defects, *run.choices)}
    return {
        "checks": ids,
        # Worst first: the page lists them in this order.
        "titles": {
            i: [known[i].worst, known[i].title]
            for i in sorted(met & known.keys(), key=lambda i: known[i].rank)
        },
        # How checks of a defect may come out, any time anew.
        "ways": {i: "".join(sorted(_LETTERS[w] for w in ways(known, [i]))) for i in sorted(met)},
        "runs": listed,
        "letters": list(letters),
        "defects": [ones for _, ones in defects.values()],
    }


def _letter(run: Run, identity: str) -> str:
    check = run.checks.get(identity)
    if check is None:
        return ABSENT
    if identity not in run.ran:
        return NOT_RUN
    letter = _LETTERS[kind(check)]
    return letter if letter == "p" or check["verdict"] == "xfail" else letter.upper()


def _defects(run: Run, place: dict[str, int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for identity, check in run.checks.items():
        if check["verdict"] == "xfail":
            for defect in check["expected"].get("defects", ()):
                found.setdefault(defect, []).append(place[identity])
    return dict(sorted(found.items()))
