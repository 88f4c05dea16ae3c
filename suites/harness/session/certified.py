"""`--certified`: a run that leaves nothing out and excuses nothing, and what may be said of it.

It judges every check of suites/conformance, thorough variants included, without expectations, from
a tree without changes. What would narrow that is refused before anything starts; a check that
could not be judged, or a MUST that does not hold, is why there is no certificate at the end. A
SHOULD that does not hold is counted, and no reason.
"""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.records.verdicts import UNEXPECTED, Verdict
from harness.session.results import git

SUITES = ("suites/conformance",)
PROFILE = "all checks of suites/conformance, thorough variants included, without expectations"
_VALUES = (
    *("--subject", "--backend", "--device", "--jobs", "--order", "--seed", "--run-dir"),
    *("--session-limit", "--start-method", "--tb", "--color", "--durations", "-r"),
)
_FLAGS = (
    *("--certified", "--thorough", "--share-gpus", "--no-warm-up"),
    *("-q", "--quiet", "-v", "--verbose"),
)
_ADDED = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS")


def refuse_what_narrows(arguments: Sequence[str]) -> None:
    """Raise UsageError for the first argument or variable that a certified run cannot have."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    for name in _VALUES:
        parser.add_argument(name)
    for name in _FLAGS:
        parser.add_argument(name, action="store_true")
    parser.add_argument("-o", action="append", default=[])
    parser.add_argument("-p", action="append", default=[])
    try:
        known, others = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise pytest.UsageError(f"--certified: {error}") from None
    others += [f"-o {one}" for one in known.o if one != f"testpaths={' '.join(SUITES)}"]
    others += [f"-p {one}" for one in known.p if one != "harness.session.plugin"]
    others += [name for name in _ADDED if os.environ.get(name)]
    if others:
        raise pytest.UsageError(
            f"--certified: {others[0]}: expected nothing that leaves checks out, excuses failures "
            f"or changes limits; it goes with {', '.join([*_VALUES, *_FLAGS[1:3]])}"
        )


def refuse_other_suites(arguments: Sequence[str]) -> None:
    """Raise UsageError where the run collects anything but the suites of a certificate."""
    if tuple(arguments) != SUITES:
        raise pytest.UsageError(
            f"--certified: the run is of {' '.join(arguments)}, expected {' '.join(SUITES)}: "
            "ci/conformance --certified"
        )


def refuse_changes(root: Path, commit: str) -> None:
    """Raise UsageError where the suites are not those of a commit."""
    if found := changes(root, commit):
        raise pytest.UsageError(f"--certified: {found}")


def changes(root: Path, commit: str) -> str:
    """Why the suites are not those of the commit, in words; empty where they are."""
    if (lines := git(root, "status", "--porcelain", "--untracked-files=all")) is not None:
        if lines:
            return f"{lines.splitlines()[0][3:]} is not as in the commit: expected a clean checkout"
        # SHARDPROOF_COMMIT may name another one; an image, which needs it, has no history.
        if commit != (head := git(root, "rev-parse", "HEAD")):
            return f"the commit is said to be {commit}, and this checkout is of {head}"
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        return f"the commit of the suites is {commit or 'not known'}: expected a clean checkout"
    return ""


def certificate(
    checks: Sequence[dict[str, Any]], collected: Iterable[str], code: int, changed: str
) -> dict[str, Any]:
    """What stands in the results.

    Args:
        checks: what was judged.
        collected: the ids of all that there is to judge.
        code: the exit code that the run would have otherwise.
        changed: why the tree is no longer that of the commit, empty where it is.

    """
    refused = [changed] if changed else []
    if missing := set(collected) - {check["id"] for check in checks}:
        refused.append(f"{len(missing)} checks were not judged, as {min(missing)}")
    unmet = Counter(c["message"] for c in checks if c["verdict"] == Verdict.PRECONDITION)
    refused += [f"{count} checks were not judged: {why}" for why, count in sorted(unmet.items())]
    failed = Counter(c["level"] for c in checks if c["verdict"] in UNEXPECTED)
    if failed["MUST"]:
        refused.append(f"{failed['MUST']} checks of a MUST do not hold")
    if code not in (0, 1):
        refused.append("the environment or the harness failed")
    return {
        "granted": not refused,
        "profile": PROFILE,
        "refused": refused,
        "should": failed["SHOULD"],
    }


def in_words(found: dict[str, Any]) -> str:
    """The certificate in one line."""
    if not found["granted"]:
        return "no certificate: " + "; ".join(found["refused"])
    lesser = f"; {found['should']} of a SHOULD do not" if found["should"] else ""
    return f"certificate: every check of a MUST holds{lesser} ({found['profile']})"
