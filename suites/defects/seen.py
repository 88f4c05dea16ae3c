"""What whole runs saw of each defect, kept in seen.json: how many checks, and how these failed.

    python -m defects.seen FOLDER…    write it from a run of torch.distributed with --thorough,
                                      conformance and integration, of the pinned torch

The page counts checks by it, and test_defects holds each severity to it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from report.read import read

FILE = Path(__file__).parent / "seen.json"
_HANGS = re.compile(
    r"it hangs in the call|which rank \d+ never issued|wait for each other"
    r"|a collective that a peer|where ranks? [\d, and]+ issued"
)
_CRASHES = re.compile(r"killed by SIG")
_WRONG = re.compile(r"^(ranks? [\d, ]+: )?(AssertionError: |Failed: DID NOT RAISE)")
_BAD_WORDS = re.compile(
    r"is not named|says nothing|an accident, not an answer|maximum recursion|no text"
)
_RAISED = re.compile(r"(hangs in the call|fails?: .*: [A-Z]\w*(Error|Exception):)")


def outcome(check: dict[str, Any]) -> str:
    """How a check failed: hangs, crashes, raises, bad words, or wrong (a result that differs)."""
    first = check["message"].partition("\n")[0]
    if check["law"] == "cost":
        return "raises" if not _WRONG.search(first) else "costs"
    if _CRASHES.search(first):
        return "crashes"
    if _HANGS.search(first):
        return "hangs"
    if _BAD_WORDS.search(first):
        return "bad words"
    return "wrong" if _WRONG.search(first) and not _RAISED.search(first) else "raises"


def learn(runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What stands in seen.json."""
    found: dict[str, dict[str, Any]] = {}
    runs = list(runs)
    for check in (check for run in runs for check in run["checks"]):
        ids = (check["expected"] or {}).get("defects", ()) if check["verdict"] == "xfail" else ()
        for identity in ids:
            one = found.setdefault(
                identity, {"checks": 0, "should": 0, "alone": Counter(), "by": Counter()}
            )
            one["checks"] += 1
            one["should"] += check["level"] == "SHOULD"
            one["by"][check["module"], check["function"], check["law"]] += 1
            if len(ids) == 1:
                one["alone"][outcome(check)] += 1
    for one in found.values():
        by = one.pop("by")
        one["functions"] = sorted({f"{m}.{f}" for m, f, _ in by if m != "integration"})
        one["laws"] = sorted({law for _, _, law in by if law})
        one["alone"] = dict(sorted(one["alone"].items()))
    return {
        "torch": runs[0]["run"]["torch"],
        "backend": runs[0]["run"]["backend"],
        "defects": dict(sorted(found.items())),
    }


def kept() -> dict[str, Any]:
    """The content of seen.json."""
    return json.loads(FILE.read_text())


def main(arguments: list[str]) -> int:
    """Write seen.json; 0."""
    parser = argparse.ArgumentParser(prog="python -m defects.seen", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="folders with a results.json")
    data = [read(path) for path in parser.parse_args(arguments).runs]
    for run in data:
        if run["run"]["subject"] != "torch.distributed":
            parser.error(f"{run['run']['subject']}: expected runs of torch.distributed")
    FILE.write_text(json.dumps(learn(data), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
