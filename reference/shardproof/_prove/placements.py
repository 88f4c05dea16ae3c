"""Which elements of a whole tensor a rank holds, from placements and mesh coordinates alone.

This repeats the arithmetic of DTensor, and asks none of its functions: a claim is judged by what
it says, not by what torch makes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardproof._prove.digests import Places


@dataclass(frozen=True)
class Part:
    """What a rank says that it holds: these elements of a tensor of this shape."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    runs: tuple[tuple[tuple[int, int], ...], ...]
    """For each dimension the runs of indices that are here."""
    flat: tuple[int, int] | None = None
    """A run of these elements, when they are flattened: FSDP1 cuts without regard to dimensions."""
    own: str = ""
    """Not comparable with others: a pending sum, or what no placement describes, and why."""

    @classmethod
    def of(cls, told: dict[str, Any]) -> Part:
        """From JSON."""
        return cls(
            tuple(told["shape"]),
            tuple(tuple((start, stop) for start, stop in dim) for dim in told["runs"]),
            None if told["flat"] is None else (told["flat"][0], told["flat"][1]),
            told["own"],
        )

    @property
    def numel(self) -> int:
        """How many elements are here."""
        return self.flat[1] - self.flat[0] if self.flat else product(self.box)

    @property
    def box(self) -> tuple[int, ...]:
        """The shape of what the runs cut out."""
        return tuple(sum(stop - start for start, stop in dim) for dim in self.runs)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of the local tensor that holds them."""
        return (self.numel,) if self.flat else self.box

    @property
    def size(self) -> int:
        """How many elements the whole tensor has."""
        return product(self.shape)

    def places(self) -> Places:
        """Where the elements of the local tensor lie in the whole one."""
        indices = [
            range(*dim[0]) if len(dim) == 1 else torch.cat([torch.arange(*run) for run in dim])
            for dim in (dim or ((0, 0),) for dim in self.runs)
        ]
        return Places(self.shape, indices, self.box, self.flat[0] if self.flat else 0)

    def index(self, at: int) -> tuple[int, ...]:
        """The index in the whole tensor of the local tensor's element `at`, counted flat."""
        place = int(self.places()(torch.tensor([at]))[0])
        found = []
        for size in reversed(self.shape):
            place, index = divmod(place, size)
            found.append(index)
        return tuple(reversed(found))

    def __str__(self) -> str:
        if self.box == self.shape:
            text = f"all of {list(self.shape)}"
        else:
            cuts = [
                ":" if dim == ((0, size),) else ",".join(f"{a}:{b}" for a, b in dim) or "none"
                for dim, size in zip(self.runs, self.shape, strict=True)
            ]
            text = f"[{'; '.join(cuts)}] of {list(self.shape)}"
        return f"elements {self.flat[0]} to {self.flat[1]} of {text}" if self.flat else text


def whole(shape: Sequence[int]) -> Part:
    """All of a tensor of this shape."""
    return Part(tuple(shape), tuple(((0, size),) for size in shape))


def part_of(
    shape: Sequence[int], placements: Sequence[Any], sizes: Sequence[int], at: Sequence[int]
) -> Part:
    """What the rank at these coordinates of a mesh of these sizes holds."""
    runs = [[(0, size)] for size in shape]
    own = ""
    for placement, size, coordinate in zip(placements, sizes, at, strict=True):
        if placement.is_replicate():
            continue
        if placement.is_partial():
            own = "a pending reduction"
            continue
        dim = getattr(placement, "dim", None)
        if dim is None:
            own = f"the placement {placement}"
            continue
        pieces = [runs[dim]]
        if factor := int(getattr(placement, "split_factor", 0) or 0):
            pieces = _chunks(runs[dim], factor)
        runs[dim] = [run for piece in pieces for run in _chunks(piece, size)[coordinate]]
    merged = tuple(_merge(dim) for dim in runs)
    return Part(tuple(shape), merged, own=own)


def _chunks(runs: list[tuple[int, int]], parts: int) -> list[list[tuple[int, int]]]:
    """As torch.chunk() cuts: equal parts of the size rounded up; the last may be short or empty."""
    total = sum(stop - start for start, stop in runs)
    each = -(-total // parts)
    return [_slice(runs, i * each, min((i + 1) * each, total)) for i in range(parts)]


def _slice(runs: list[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    found = []
    passed = 0
    for start, stop in runs:
        low, high = max(first - passed, 0), min(last - passed, stop - start)
        if low < high:
            found.append((start + low, start + high))
        passed += stop - start
    return found


def _merge(runs: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for start, stop in runs:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        elif start < stop:
            merged.append((start, stop))
    return tuple(merged)


def product(sizes: Iterable[int]) -> int:
    """Of all sizes; 1 of none."""
    found = 1
    for size in sizes:
        found *= size
    return found
