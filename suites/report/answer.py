"""The answer of a run in one sentence, with what a reader has to know beside it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from defects import summary
from defects.catalogue import Defect
from report.terminal import UNEXPECTED


@dataclass(frozen=True)
class Answer:
    """What a run says."""

    state: str
    """nothing, incomplete, failed, known (only failures that are expected) or holds."""
    sentence: str
    notes: tuple[str, ...]


def answer(data: dict[str, Any], catalogue: dict[str, Defect]) -> Answer:
    """The sentence of the run, and its notes."""
    run, checks = data["run"], data["checks"]
    counts = Counter(check["verdict"] for check in checks)
    missing = run["selected"] - len(checks)
    ran = len(checks) - counts["precondition"]
    bad = sum(counts[verdict] for verdict in UNEXPECTED)
    contract = _contract(data, catalogue)
    notes = []
    if missing > 0:
        state = "incomplete"
        said = f"The run is incomplete: {missing} of {_checks(run['selected'])} did not run"
        if bad:
            notes.append(f"{_of(bad, ran)} that did run {_came_out(counts)}.")
        if contract:
            notes.append(f"So far: {contract}.")
    elif bad:
        state, said = "failed", f"{_of(bad, ran)} {_came_out(counts)}"
        if contract:
            notes.append(f"Beside that, {contract}.")
    elif not ran:
        none = f": none of {_checks(len(checks))} could run" if checks else ""
        state, said = "nothing", f"Nothing was judged{none}"
    elif counts["xfail"]:
        state, said = "known", contract or _known(run, counts["xfail"], ran)
    else:
        state, said = "holds", f"{summary.judged(run)}: {_all(ran)}"
    if choices := _choices(data, catalogue):
        notes.append(
            f"In {choices} more way{'s' if choices > 1 else ''} it breaks what is this project's "
            "choice (SHOULD); no implementation is wrong for that."
        )
    for reason, count in _not_run(checks):
        notes.append(f"{_checks(count)} could not run: {reason}")
    if left := run.get("left_out", 0):
        notes.append(f"{left} checks marked thorough were left out (--thorough runs them).")
    return Answer(state, said, tuple(notes))


def _contract(data: dict[str, Any], catalogue: dict[str, Defect]) -> str:
    """How the subject breaks the contract, where its known failures lead to defects."""
    must, _ = by_level(data["checks"], catalogue)
    return summary.sentence(data["run"], must) if must else ""


def by_level(
    checks: list[dict[str, Any]], catalogue: dict[str, Defect]
) -> tuple[list[Defect], list[Defect]]:
    """The defects met, worst first: those of the contract, and those of SHOULD checks alone."""
    found = {catalogue[i]: several for i, several in summary.met(checks).items() if i in catalogue}
    ranked = sorted(found, key=lambda defect: defect.rank)
    choices = [d for d in ranked if all(c.get("level") == "SHOULD" for c in found[d])]
    return [d for d in ranked if d not in choices], choices


def _choices(data: dict[str, Any], catalogue: dict[str, Defect]) -> int:
    return len(by_level(data["checks"], catalogue)[1])


def _known(run: dict[str, Any], count: int, judged: int) -> str:
    return f"{summary.judged(run)}: {_of(count, judged)} fail as expected, the others hold"


def _all(judged: int) -> str:
    return f"all {judged} checks hold" if judged > 1 else "the one check that ran holds"


def _of(count: int, judged: int) -> str:
    return f"{count} of {_checks(judged)}"


def _checks(count: int) -> str:
    return f"{count} check{'s' if count != 1 else ''}"


_VERBS = {
    "fail": ("fails unexpectedly", "fail unexpectedly"),
    "error": (
        "breaks in the harness or the environment",
        "break in the harness or the environment",
    ),
    "timeout": ("times out unexpectedly", "time out unexpectedly"),
    "crash": ("crashes unexpectedly", "crash unexpectedly"),
    "xpass": ("passes, though a failure is expected", "pass, though failures are expected"),
}


def _came_out(counts: Counter[str]) -> str:
    met = [verdict for verdict in UNEXPECTED if counts[verdict]]
    if len(met) == 1:
        return _VERBS[met[0]][counts[met[0]] > 1]
    return "came out unexpectedly: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in met)


def _not_run(checks: list[dict[str, Any]]) -> list[tuple[str, int]]:
    found = Counter(
        check["message"].partition("\n")[0]
        for check in checks
        if check["verdict"] == "precondition"
    )
    return found.most_common()
