"""One planted loss, and what a proof does not say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prove.kit.jobs import Job

Plant = Callable[[int], Job]
"""Makes the faulty job of this rank."""


@dataclass(frozen=True)
class Loss:
    """One planted loss."""

    what: str
    plant: Plant
    names: str
    """The tensor that a finding has to name."""
    ranks: tuple[int, ...] | None
    """The ranks that it has to name; None: any."""
    roads: tuple[str, ...]
    where: tuple[str, ...]
    """Where it has to be found: roads, inventory or coverage."""
    severity: str = "loss"
    first: str = ""
    """The first differing element."""
    defect: str = ""
    world: int = 2
    before: tuple[int, int] | None = None
    """The version of torch that has it no more."""
    limit: float = 45.0
    """Of prove; a road that hangs takes a third of it."""


def missing(loss: Loss, proof: Any) -> str:
    """What the proof does not say of the loss; empty where it says all."""
    for where in loss.where:
        found = [
            finding
            for finding in proof.findings
            if finding.where == where and finding.severity == loss.severity
        ]
        named = [
            finding
            for finding in found
            if finding.name == loss.names
            or (loss.names and loss.names in finding.what)
            or (not loss.names and finding.defect == loss.defect)
        ]
        if not named:
            return f"{where} does not name {loss.names}: {[str(f) for f in proof.findings]}"
        if loss.ranks is not None and not any(
            set(loss.ranks) <= set(finding.ranks) for finding in named
        ):
            return f"{where} names ranks {[f.ranks for f in named]}, expected {loss.ranks}"
        place = f"element {loss.first}" if where == "inventory" and loss.first else ""
        if not any(place in finding.first for finding in named):
            return f"{where} names {[f.first for f in named]}, expected {loss.first}"
        if loss.defect and not any(finding.defect == loss.defect for finding in named):
            return f"{where}: {[(f.defect, str(f)) for f in named]}, expected {loss.defect}"
    return ""
