"""Whether a bundle is whole, unaltered, and complete for the commit of its suites."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bundle import archive, contents, crosscheck, inventory
from bundle.archive import BadBundleError
from bundle.inventory import CannotCollectError
from harness.session import certified
from report.read import BadResultsError, parse

_FEW = 10
"""Lines of one kind that are shown."""
_NAMED = 3
"""Checks that a line names."""


@dataclass
class Findings:
    """What was found, in the order in which it was asked."""

    good: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    """What cannot be told here."""
    digest: str = ""

    @property
    def code(self) -> int:
        """1: refused; 3: not refused, and not all could be judged; 0."""
        return 1 if self.bad else 3 if self.open else 0


def verify(
    bundle: bytes, root: Path, expected: str | None = None, *, own_inventory: bool = False
) -> Findings:
    """Everything that can be found out of a bundle.

    Args:
        bundle: its bytes.
        root: the checkout that the suites of its commit are collected from.
        expected: the digest that whoever made it has published.
        own_inventory: accept the list of checks in the bundle where the commit is not here.

    """
    found = Findings(digest=hashlib.sha256(bundle).hexdigest())
    if expected is not None and expected != found.digest:
        found.bad.append(f"its SHA-256 is {found.digest}, not the {expected} that was expected")
    try:
        files = archive.unpack(bundle)
        for name in (*contents.NEEDED, *contents.DERIVED):
            if name not in files:
                raise BadBundleError(f"it has no {name}")
        data = parse(files["results.json"], "results.json")
        if "inventory" not in data["run"]:
            raise BadBundleError("results.json: the run has no inventory")
    except (BadBundleError, BadResultsError) as error:
        found.bad.append(str(error))
        return found
    found.good.append(f"whole: {len(files)} files, each as its checksum says")
    contradictions = list(crosscheck.differences(files, data))
    if data["run"]["commit"] == inventory.commit_here(root):
        # Another version of this project may word a report in another way.
        contradictions += _reports(files, data)
        told = "results, JUnit, summary, inventory and both reports"
    else:
        told = "results, JUnit, summary and inventory (not the reports: of another version)"
    found.bad += contradictions[:_FEW]
    if len(contradictions) > _FEW:
        found.bad.append(f"{len(contradictions) - _FEW} more contradictions")
    if not contradictions:
        found.good.append(
            f"unaltered, as far as that shows: {told} agree on {len(data['checks'])} checks"
        )
    _completeness(found, data, root, own_inventory=own_inventory)
    if "certificate" in data["run"]:
        found.good.append(certified.in_words(data["run"]["certificate"]))
    return found


def _completeness(
    found: Findings, data: dict[str, Any], root: Path, *, own_inventory: bool
) -> None:
    run = data["run"]
    commit = run["commit"]
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        found.bad.append(
            f"complete for no commit: the suites were {commit or 'of an unknown commit'}, "
            "expected those of a clean checkout"
        )
        return
    ids = {check["id"] for check in data["checks"]}
    suites = sorted({*certified.SUITES, *map(_suite, ids)})
    left = run.get("left_out", 0)
    try:
        there = inventory.of_commit(root, commit, suites, run["backend"], thorough=not left)
    except CannotCollectError as error:
        if own_inventory:
            found.good.append(f"complete by its own list of checks alone, for {error}")
        else:
            found.open.append(
                f"complete: that cannot be told here, for {error}; --own-inventory takes the list "
                "in the bundle, which whoever made it could have shortened"
            )
        return
    missing, more = sorted(there - ids), sorted(ids - there)
    if (missing or more) and (why := _another_torch(run)):
        found.open.append(f"complete: that cannot be told here, {why}")
        return
    if missing:
        found.bad.append(
            f"incomplete: of the {len(there)} checks of commit {commit[:12]} the bundle lacks "
            f"{len(missing)}, as {', '.join(missing[:_NAMED])}"
        )
    if more:
        found.bad.append(
            f"{len(more)} checks of the bundle are none of commit {commit[:12]}, as "
            f"{', '.join(more[:_NAMED])}"
        )
    if not missing and not more:
        without = f", {left} thorough ones left out" if left else ""
        found.good.append(
            f"complete: the suites of commit {commit[:12]}, collected here, have these "
            f"{len(ids)} checks{without} ({', '.join(suites)})"
        )


def _reports(files: dict[str, bytes], data: dict[str, Any]) -> Iterator[str]:
    for name, text in contents.reports(data).items():
        if files[name] != text:
            yield f"{name}: not what results.json leads to"


def _another_torch(run: dict[str, Any]) -> str:
    """Why another list of checks proves nothing; empty where it does."""
    import torch

    here, there = (str(v).partition("+")[0] for v in (torch.__version__, run["torch"]))
    if here == there:
        return ""
    return f"for the checks differ from those under torch {here}, and the run had torch {there}"


def _suite(identity: str) -> str:
    return "/".join(identity.split("/")[:2])
