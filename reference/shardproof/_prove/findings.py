"""What prove finds: one sentence about one tensor, with ranks, place and advice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

LOSS, UNSAFE, NOTE = "loss", "unsafe", "note"


@dataclass
class Finding:
    """One loss, one danger, or one note."""

    severity: str
    """loss, unsafe, or note: a note makes no verdict worse."""
    where: str
    """A road, or inventory, or coverage."""
    side: str
    """model or optimizer."""
    kind: str
    """What is wrong, in a word or two, the same for all alike."""
    name: str
    """Of the tensor; empty where it is about all."""
    what: str
    """A sentence."""
    ranks: list[int] = field(default_factory=list)
    first: str = ""
    """The first differing element."""
    defect: str = ""
    """Id in the catalogue of defects, where it is a known one."""
    advice: str = ""

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"{self.name}: {self.what}" if self.name else self.what]
        if self.ranks:
            parts.append(f"on {ranks_text(self.ranks)}")
        if self.first:
            parts.append(f"first at {self.first}")
        text = ", ".join(parts)
        if self.defect:
            text += f" [{self.defect}]"
        return text


def ranks_text(ranks: Sequence[int]) -> str:
    """Rank 3; ranks 0-2, 5."""
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank{'s' if len(set(ranks)) > 1 else ''} {text}"
