"""What of a run goes into its bundle: what it left, and what can be read without our code."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bundle.archive import MOST_BYTES, BadBundleError
from defects.summary import met
from report.html import run_page
from report.matrix import matrix
from report.terminal import Screen, show

NEEDED = ("results.json", "junit.xml", "inventory.txt")
DERIVED = ("summary.json", "report.txt", "report.html")


def of_run(folder: Path, results: dict[str, Any]) -> dict[str, bytes]:
    """The files of a bundle, by name.

    Raises BadBundleError where the run has not left what a bundle needs.
    """
    found: dict[str, bytes] = {}
    for name in NEEDED:
        if not (folder / name).is_file():
            raise BadBundleError(f"{folder / name}: there is no such file; make the run anew")
        found[name] = (folder / name).read_bytes()
    for name in logs(results):
        if (folder / name).is_file():
            found[name] = (folder / name).read_bytes()
    found |= {"summary.json": summary(found["results.json"], results), **reports(results)}
    if sum(map(len, found.values())) > MOST_BYTES:
        raise BadBundleError(f"{folder}: more than {MOST_BYTES} bytes, which no bundle may hold")
    return found


def logs(results: dict[str, Any]) -> Iterator[str]:
    """The logs that the results name."""
    for check in results["checks"]:
        for rank in check["ranks"]:
            if rank["log"]:
                yield rank["log"]


def summary(text: bytes, results: dict[str, Any]) -> bytes:
    """The run, its environment, the totals of the matrix and of the defects, for programs.

    `text` is results.json, and `results` what it holds.
    """
    checks = results["checks"]
    levels = {
        level: Counter(c["verdict"] for c in checks if _level(c) == level) for level in _LEVELS
    }
    found = {
        "results": hashlib.sha256(text).hexdigest(),
        "run": results["run"],
        "levels": levels,
        "matrix": {
            module: {
                function: {law: dict(sorted(cell.verdicts.items())) for law, cell in cells.items()}
                for function, cells in rows.items()
            }
            for module, rows in matrix(checks).items()
        },
        "defects": {identity: len(ones) for identity, ones in met(checks).items()},
    }
    return (json.dumps(found, indent=1, sort_keys=True) + "\n").encode()


def reports(results: dict[str, Any]) -> dict[str, bytes]:
    """What a terminal shows of the run, and its page."""
    stream = io.StringIO()
    # Of a folder that nobody has: the report says nothing of what lies beside it.
    show(results, "<bundle>", Screen(stream, colour=False))
    page = run_page.page(results).encode(errors="replace")
    return {"report.txt": stream.getvalue().lstrip("\n").encode(), "report.html": page}


_LEVELS = ("MUST", "SHOULD")


def _level(check: dict[str, Any]) -> str:
    return str(check.get("level", "MUST"))
