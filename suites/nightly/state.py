"""What is remembered from night to night, for each thing that is judged.

A folder for each (subject, torch, backend, device), since only nights of one of these compare:

    <state>/torch.distributed-2.13.0-nccl-cuda/
        last.json       verdicts of the last night that was judged
        green.json      ratios of the benchmarks of the last night without a finding
        <night>/        report.md, night.json, and the results of each step
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1


class BadStateError(Exception):
    """A file of the state that cannot be read; the text names it and says what to do."""


@dataclass(frozen=True)
class State:
    """The memory of one thing that is judged."""

    folder: Path

    @classmethod
    def of(cls, root: Path, *parts: str) -> State:
        """The memory under a folder; made where it is missing."""
        name = "-".join(re.sub(r"[^\w.+]", "_", part) for part in parts)
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder)

    def read(self, name: str) -> dict[str, Any] | None:
        """What stands under the name; None in the first night."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            return None
        try:
            data = json.loads(file.read_text())
            if data["schema"] != SCHEMA:
                raise KeyError
        except (ValueError, KeyError, TypeError):
            raise BadStateError(
                f"{file} is not what a night leaves: restore it, or remove it to begin anew"
            ) from None
        return dict(data)

    def write(self, name: str, data: dict[str, Any]) -> None:
        """Remember; in one step, so that a night that is stopped leaves the old or the new."""
        step = self.folder / f".{name}.json"
        step.write_text(json.dumps({"schema": SCHEMA, **data}, indent=1) + "\n")
        step.replace(self.folder / f"{name}.json")
