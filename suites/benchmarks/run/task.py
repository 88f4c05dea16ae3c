"""One measurement, as ranks get it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.base import Measured
from benchmarks.settings import Settings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Task:
    """One measurement, as ranks get it."""

    benchmark: Measured
    regime: str
    size: int
    settings: Settings
    data: dict[str, torch.Tensor]
    """The whole tensors of the regime on the CPU, in pages that all ranks share."""
    arms: tuple[str, ...]
    timed: bool = True
    counted: bool = True
    profiled: bool = False

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max((t.nbytes for t in self.data.values()), default=0)
