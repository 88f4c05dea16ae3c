"""Calls one after another, and what may have changed in between.

A function that remembers what it was given must notice each of these changes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from conformance.kit.functions import FUNCTIONS, Function, Leaves, Place

_SHAPES = [(6, 4), (5, 3), (6, 4), (4, 6)]
_DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.int64]


def rounds(kinds: list[str]) -> list[Leaves]:
    """The state dicts of calls in turn: the same keys over other kinds, shapes, dtypes, values."""
    found: list[Leaves] = []
    for turn, (shape, dtype) in enumerate(zip(_SHAPES, _DTYPES, strict=True)):
        whole = torch.arange(shape[0] * shape[1]).view(shape)
        found.append(
            {
                f"w{n}": (kinds[(n + turn) % len(kinds)], ((whole + n * 5 + turn) % 13).to(dtype))
                for n in range(len(kinds))
            }
        )
    return found


def others(function: Function) -> list[Function]:
    """Functions to call between two calls of this one."""
    return [other for other in FUNCTIONS if other.name != function.name]


def another_world(place: Place, folder: Path, mesh: Callable[..., Any]) -> Place:
    """The world in which the ranks are numbered the other way round, by the same processes.

    The default group is ended, and another made: what was found out for a mesh of the first does
    not hold for the equal mesh of the second.
    """
    size, rank = place.world.size, place.world.size - 1 - place.world.rank
    dist.destroy_process_group()
    store = dist.FileStore(str(folder / "another"), size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    world = _Renumbered(size, rank)
    return Place(world, mesh(), place.subject, place.device)


class _Renumbered:
    """What calls ask of a world."""

    def __init__(self, size: int, rank: int) -> None:
        self.size, self.rank = size, rank
