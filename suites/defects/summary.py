"""The defects that a run met, worst first: what a report ends with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from packaging.version import Version

from defects.catalogue import Defect, read
from defects.words import IN_WORDS, SEVERITIES

_BACKENDS = {"gloo": "Gloo", "nccl": "NCCL"}


def met(checks: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The known failures of a run by the id of each defect that they lead to."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for check in checks:
        if check["verdict"] == "xfail":
            for identity in check["expected"].get("defects", ()):
                found[identity].append(check)
    return dict(found)


def worst_first(data: dict[str, Any]) -> list[Defect]:
    """The defects that a run met and that break a MUST."""
    return _sorted(_found(data))[0]


def _found(data: dict[str, Any]) -> dict[Defect, list[dict[str, Any]]]:
    known = read()
    return {known[i]: checks for i, checks in met(data["checks"]).items() if i in known}


def _sorted(found: dict[Defect, list[dict[str, Any]]]) -> tuple[list[Defect], list[Defect]]:
    """(those that break a MUST, those that break a SHOULD alone), each worst first."""
    choices = {d for d, checks in found.items() if all(c["level"] == "SHOULD" for c in checks)}
    must = sorted((d for d in found if d not in choices), key=lambda d: d.rank)
    return must, sorted(choices, key=lambda d: d.rank)


def lines(data: dict[str, Any]) -> Iterator[str]:
    """The sentence and the lines; nothing where no defect was met."""
    found = _found(data)
    if not found:
        return
    must, choices = _sorted(found)
    yield sentence(data["run"], must)
    for defect in must:
        yield line(defect, len(found[defect]))
    if choices:
        yield (
            f"In {_ways(len(choices))} it breaks what is this project's choice (SHOULD); "
            "no implementation is wrong for that:"
        )
        for defect in choices:
            yield line(defect, len(found[defect]))


def sentence(run: dict[str, Any], found: list[Defect]) -> str:
    """In how many ways a subject breaks the contract, by severity."""
    counts = {word: sum(d.worst == word for d in found) for word in SEVERITIES}
    parts = [f"{n} {IN_WORDS[word][n > 1]}" for word, n in counts.items() if n]
    told = ": " + ", ".join(parts) if parts else ""
    return f"{judged(run)} breaks the contract in {_ways(len(found))}{told}"


def judged(run: dict[str, Any]) -> str:
    """What a run judged, in words: torch 2.13.0 on Gloo."""
    name = run["subject"]
    version = Version(run["torch"]).base_version
    who = f"torch {version}" if name == "torch.distributed" else f"{name} on torch {version}"
    return f"{who} on {_BACKENDS.get(run['backend'], run['backend'])}"


def line(defect: Defect, checks: int) -> str:
    """A defect in one line."""
    notes = [f"{checks} check{'s' if checks != 1 else ''}"]
    if defect.severity[1:]:
        notes.append(f"also {', '.join(defect.severity[1:])}")
    if defect.owner != "the set":
        notes.append("of torch's callers")
    return f"{defect.worst:8} {defect.id}  {defect.title} ({'; '.join(notes)})"


def _ways(count: int) -> str:
    return f"{count} way{'s' if count != 1 else ''}"
