"""What a run is asked for, and the regimes: how many tensors of which size a model has.

Free of torch: asv imports it in every process. The environment carries the settings, because asv
hands nothing else to its benchmarks.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

PREFIX = "SHARDPROOF_BENCH_"

TORCH, REFERENCE, FLOOR = "torch.distributed", "shardproof", "floor"
ARMS = (TORCH, REFERENCE, FLOOR)
"""What is measured side by side: the two subjects, and the physical limit for the same bytes."""

WIDTH = {
    "float64": 8,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "bfloat16": 2,
    "float16": 2,
    "uint8": 1,
}

WORLD = 4.0
"""Seconds for the rounds in each world of a measurement."""
MOST_WORLDS = 20
FEWEST_WORLDS = 4
"""Where memory lies differs from world to world, and whether a neighbour on the machine has the
other half of a core changes within seconds; times differ with both, by a tenth or more, and no
number of rounds in one world shows that. Worlds go on until their ratios are known, or the time for
them is over."""


def crowded(size: int) -> bool:
    """Whether so many ranks have to share cores here."""
    return size > len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Settings:
    """The settings of a run of benchmarks."""

    quick: bool = False
    device: str = "cpu"
    backend: str = "gloo"
    share_gpus: bool = False
    """Whether ranks of NCCL share the GPUs where these are fewer."""
    room: int = 0
    """The most ranks that the devices here take, a GPU each for NCCL; 0: no bound."""
    smallest: bool = False
    """Only the smallest world of each benchmark: to see that everything runs."""
    seconds: float = 0.0
    """Most time for one measurement; 0: the default of quick or full."""
    deadline: float = 0.0
    """Seconds after which a measurement is ended, and fails; 0: the default of quick or full."""

    @classmethod
    def from_environment(cls) -> Settings:
        """Read from SHARDPROOF_BENCH_QUICK, _SMALLEST, _DEVICE, _BACKEND, and so on."""
        told: dict[str, Any] = {}
        for name, usual in vars(cls()).items():
            text = os.environ.get(f"{PREFIX}{name.upper()}")
            if text is not None:
                is_flag = isinstance(usual, bool)
                told[name] = text not in {"", "0"} if is_flag else type(usual)(text)
        return cls(**told)

    def environment(self) -> dict[str, str]:
        """The variables that `from_environment` reads back."""
        return {
            f"{PREFIX}{name.upper()}": str(int(value) if isinstance(value, bool) else value)
            for name, value in vars(self).items()
        }

    @property
    def budget(self) -> float:
        """Seconds for one measurement, which ends sooner where its ratios are known."""
        return self.seconds or (0.3 if self.quick else MOST_WORLDS * WORLD)

    @property
    def worlds(self) -> int:
        """The most worlds of one measurement: what little time there is, is for one."""
        return max(1, int(self.budget / WORLD))

    @property
    def world(self) -> float:
        """Seconds for the rounds in each of them."""
        return self.budget / self.worlds

    @property
    def rounds(self) -> tuple[int, int]:
        """Fewest and most rounds in each world."""
        if self.quick:
            return 3, 9
        return (5 if self.worlds == 1 else 1), 500

    @property
    def limit(self) -> float:
        """Seconds after which a measurement is ended, and fails.

        For all its worlds: the first one of torch's gather of 2000 tensors over 8 ranks, which is
        counted, too, takes eight minutes on two cores.
        """
        return self.deadline or (60.0 if self.quick else 1200.0)

    @property
    def collective(self) -> float:
        """Seconds after which one collective is given up."""
        return min(30.0 if self.quick else 120.0, self.limit / 2)

    def regime(self, name: str) -> str:
        """The regime's name as a parameter of asv: results of other sizes must not mix."""
        return f"quick {name}" if self.quick else name

    @property
    def over_gloo(self) -> bool:
        """Whether tensors lie on a device and travel over Gloo, so that ranks may share one."""
        return self.device != "cpu" and self.backend == "gloo"

    def beyond(self, size: int) -> str:
        """Why a world of that size cannot be here, in words; empty when it can."""
        if not self.room or size <= self.room:
            return ""
        return f"needs {size} GPUs; this machine has {self.room} (--share-gpus lets ranks share)"

    def where(self) -> str:
        """Backend and device, for the names of worlds."""
        shared = ", shared" if self.share_gpus else ""
        return f"{self.backend} on {self.device}{shared}"


@dataclass(frozen=True)
class Leaf:
    """One tensor of a model, by its whole shape."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    placement: str = "S0"
    """One of S0, S1, R over all ranks; two of them, as S0-R, over a mesh of size/2 x 2."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * WIDTH[self.dtype]

    def parts(self, size: int) -> int:
        """Into how many different parts a world of that size cuts it."""
        dims = self.placement.split("-")
        if len(dims) == 1:
            return 1 if dims[0] == "R" else size
        return math.prod(n for n, d in zip((size // 2, 2), dims, strict=True) if d != "R")


def leaves(regime: str, quick: bool) -> list[Leaf]:
    """The tensors of a regime.

    many: 2000 of 4 KiB. model: the shapes of a transformer of 1 billion parameters, its width and
    vocabulary divided by 8. large: 4 of 64 MiB. mixed: dtypes and placements over a 2-D mesh.
    one: one tensor of 64 MiB. scale: 20 matrices that 16,384 ranks can share.
    """
    match regime:
        case "many":
            return [Leaf(f"layer{n}.weight", (32, 32)) for n in range(200 if quick else 2000)]
        case "model":
            return _model(quick)
        case "large":
            return [Leaf(f"layer{n}.weight", (256 if quick else 4096, 4096)) for n in range(4)]
        case "mixed":
            return _mixed(quick)
        case "one":
            return [Leaf("weight", (256 if quick else 4096, 4096))]
        case "scale":
            return [Leaf(f"layer{n}.weight", (16384, 16)) for n in range(20)]
    raise LookupError(regime)


def _model(quick: bool) -> list[Leaf]:
    layers, width, words = (2, 64, 512) if quick else (16, 256, 4000)
    found = [Leaf("embed.weight", (words, width))]
    for n in range(layers):
        at = f"layers.{n}."
        found += [Leaf(f"{at}attention.{p}.weight", (width, width)) for p in ("q", "k", "v")]
        found += [
            Leaf(f"{at}attention.o.weight", (width, width), placement="S1"),
            Leaf(f"{at}mlp.gate.weight", (4 * width, width)),
            Leaf(f"{at}mlp.up.weight", (4 * width, width)),
            Leaf(f"{at}mlp.down.weight", (width, 4 * width), placement="S1"),
            Leaf(f"{at}norm1.weight", (width,), placement="R"),
            Leaf(f"{at}norm2.weight", (width,), placement="R"),
        ]
    return [
        *found,
        Leaf("norm.weight", (width,), placement="R"),
        Leaf("head.weight", (words, width)),
    ]


def _mixed(quick: bool) -> list[Leaf]:
    dtypes = ("float32", "bfloat16", "int64", "float16", "float64", "int32")
    placed = ("S0-R", "R-S0", "S0-S1", "S1-S0", "R-R", "R-S1", "S0-R")
    rows = 32 if quick else 128
    return [
        Leaf(f"part{n}.value", (rows, 8 * (1 + n % 16)), dtypes[n % 6], placed[n % 7])
        for n in range(42 if quick else 336)
    ]
