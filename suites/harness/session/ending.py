"""How a run ends: its exit code, and the lines that say what was not judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import pytest

from harness.records.verdicts import UNEXPECTED, Verdict

INCOMPLETE = 3
"""The exit code of a run that did not judge all that was selected, or could not judge at all."""

_NEARLY_ALL = 0.9


def exit_code(
    session: pytest.Session, status: int, verdicts: list[str], stopped: str
) -> tuple[int, str]:
    """(0 to 3, the line that explains it where pytest has none).

    Args:
        session: what was selected, and whether pytest was asked to stop at a failure.
        status: pytest's own exit status.
        verdicts: one for each check that was judged.
        stopped: why the run ended early, empty where it did not.

    """
    usage, nothing = pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED
    if status in {usage, nothing}:
        return status, "no check was selected: nothing was judged" if status == nothing else ""
    unexpected = UNEXPECTED.intersection(verdicts)
    missing = len(session.items) - len(verdicts)
    asked_to_stop = bool(session.shouldfail) and bool(unexpected)
    if missing and not asked_to_stop:
        why = f": {stopped}" if stopped else ""
        return INCOMPLETE, f"{missing} of {len(session.items)} selected checks did not run{why}"
    if status in {pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.INTERRUPTED}:
        return 1 if asked_to_stop else INCOMPLETE, ""
    if Verdict.ERROR in verdicts:
        return INCOMPLETE, ""
    return 1 if unexpected or status else 0, ""


def unjudged(checks: Collection[dict[str, Any]]) -> list[str]:
    """A line for each precondition that was not met, and one where next to nothing was judged."""
    reasons = Counter(c["message"] for c in checks if c["verdict"] == Verdict.PRECONDITION)
    lines = [
        f"precondition, {count} not run: {reason}" for reason, count in sorted(reasons.items())
    ]
    total, unrun = len(checks), reasons.total()
    if unrun and unrun >= _NEARLY_ALL * total:
        lines.append(
            f"nearly nothing was judged: {unrun} of {total} checks are preconditions, for the "
            "reasons above"
        )
    return lines
