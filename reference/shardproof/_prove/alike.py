"""Whether ranks have the same state dict to gather: torch's gathers go key by key, and do not ask.

Where the keys differ, ranks wait for ever, or Gloo ends the process because sizes do not fit. Such
a road is not tried; what would have happened is said instead.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from shardproof._prove import saved
from shardproof._prove.findings import ranks_text
from shardproof._prove.roads import Job

Line = tuple[str, str]
_SUBCLASS = "is a tensor of the subclass "


def lines_of(job: Job, *, everybody: bool) -> dict[str, list[Line]]:
    """What this rank would gather, by the ranks that it gathers it with.

    `everybody`: also what is not gathered, for a load from rank 0.
    """
    mine: dict[str, list[Line]] = {}
    for key, _, value in saved.entries(job.get(), job.side):
        line = (key, f"{list(value.shape)} of {value.dtype}")
        if isinstance(value, DTensor) and not all(p.is_replicate() for p in value.placements):
            ranks = value.device_mesh.mesh.flatten().tolist()
            mine.setdefault(str(ranks), []).append(line)
        if everybody:
            if is_traceable_wrapper_subclass(value) and not isinstance(value, DTensor):
                line = (key, f"{_SUBCLASS}{type(value).__name__}")
            mine.setdefault(str(list(range(job.size))), []).append(line)
    return mine


def disagreement(every: list[dict[str, Any]]) -> tuple[str, str, list[int]]:
    """(key, what, ranks) of the first difference between ranks; empty where there is none."""
    for ranks_told in sorted({ranks for one in every for ranks in one}):
        ranks = [int(rank) for rank in ranks_told.strip("[]").split(",")]
        lines = {rank: [tuple(one) for one in every[rank].get(ranks_told, [])] for rank in ranks}
        first = lines[ranks[0]]
        for rank in ranks[1:]:
            if lines[rank] != first:
                return _difference(lines, ranks)
        for key, what in first:
            if what.startswith(_SUBCLASS):
                return key, f"{what}: rank 0 broadcasts its parts, the others expect a whole", ranks
    return "", "", []


def _difference(lines: dict[int, list[Any]], ranks: list[int]) -> tuple[str, str, list[int]]:
    keys = {rank: [key for key, _ in lines[rank]] for rank in ranks}
    for key in dict.fromkeys(key for rank in ranks for key in keys[rank]):
        lacking = [rank for rank in ranks if key not in keys[rank]]
        if lacking:
            return (
                key,
                f"the state dict lacks it, and that of {_others(ranks, lacking)} has it",
                lacking,
            )
        shapes = {rank: dict(lines[rank])[key] for rank in ranks}
        other = [rank for rank in ranks if shapes[rank] != shapes[ranks[0]]]
        if other:
            what = f"is {shapes[other[0]]} in the state dict, and is not on rank {ranks[0]}"
            return key, what, other
    other = [rank for rank in ranks if keys[rank] != keys[ranks[0]]]
    at = next(
        i for i, (a, b) in enumerate(zip(keys[ranks[0]], keys[other[0]], strict=True)) if a != b
    )
    what = f"the state dict has its keys in another order than on rank {ranks[0]}"
    return keys[other[0]][at], what, other


def _others(ranks: list[int], lacking: list[int]) -> str:
    return ranks_text([rank for rank in ranks if rank not in lacking])
