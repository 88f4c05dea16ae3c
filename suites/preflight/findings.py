"""The words of a preflight: what a run needs of the machine, and what was found of one part."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Grade(enum.StrEnum):
    """What a finding means for the run."""

    OK = "ok"
    WARNING = "warning"  # the run's verdicts hold; speed or coverage may be less
    FAILED = "FAILED"  # the run's verdicts could not be trusted


@dataclass(frozen=True)
class Finding:
    """One part of the machine: what was seen, and what to change where that is not enough."""

    part: str
    grade: Grade
    seen: str
    change: str = ""

    def __post_init__(self) -> None:
        if (self.grade is not Grade.OK) and not self.change:
            raise ValueError(f"{self.part}: a finding that is not ok says what to change")


@dataclass(frozen=True)
class Need:
    """The run that the machine is asked about."""

    device: str
    backend: str
    ranks: int
    """Ranks of the trial world, and for NCCL the GPUs that must be there."""
    folder: Path
    """Where the run leaves its results."""
    torch: dict[str, Any]
    """What `preflight.probe` printed; `{"error": text}` where it could not."""
    share_gpus: bool = False
    """Whether ranks of NCCL share the GPUs where these are fewer."""

    @property
    def gpus(self) -> bool:
        return self.device == "cuda"


def ok(part: str, seen: str) -> Finding:
    return Finding(part, Grade.OK, seen)


def warning(part: str, seen: str, change: str) -> Finding:
    return Finding(part, Grade.WARNING, seen, change)


def failed(part: str, seen: str, change: str) -> Finding:
    return Finding(part, Grade.FAILED, seen, change)


def mebibytes(count: float) -> str:
    """A number of bytes as people read it."""
    return f"{count / 2**20:,.0f} MiB"
