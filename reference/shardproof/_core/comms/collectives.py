"""Collectives on bytes, over one process group or one mesh dimension after another.

All data travels as uint8, since a backend may refuse a dtype but not its bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from shardproof._core.sharding.domain import Stage
from shardproof._core.tensors.properties import CPU


def backend_of(group: dist.ProcessGroup, device: torch.device) -> str:
    """The name of the backend that serves a device; empty where the group is one itself.

    torch's ranks as threads have such a group, written in Python.
    """
    try:
        return str(group._get_backend(device).name())
    except RuntimeError:
        return ""


def all_gather(
    group: dist.ProcessGroup, payload: torch.Tensor, into: torch.Tensor | None = None
) -> torch.Tensor:
    """The 1-D byte tensors of all ranks, one row per group rank. One collective.

    ``into`` is contiguous memory for them, made where it is not given.
    """
    size = dist.get_world_size(group)
    rows = into
    if rows is None:
        rows = torch.empty(size * payload.numel(), dtype=torch.uint8, device=payload.device)
    if payload.numel():
        # Renamed upstream; the old name warns where the new one exists.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(rows, payload, group=group)
    return rows.view(size, -1)


# Backends that hand an all-gather on from rank to rank, a step for each of them: where it is short
# nearly all of its time is waiting for the next thread to wake. An all-to-all of the same bytes is
# one step: over Gloo 1.0 ms in place of 2.0 for 4 ranks on 2 cores, 3.0 in place of 7.7 for 8.
_STEPWISE = {"gloo"}

# Up to how many bytes in all: what is sent has to lie there once for each rank.
_SHORT = 1 << 16


def all_gather_short(group: dist.ProcessGroup, payload: torch.Tensor) -> torch.Tensor:
    """As :func:`all_gather`, for a few bytes on the CPU, or wherever they are. One collective."""
    size, device = dist.get_world_size(group), payload.device
    short = 0 < size * payload.numel() <= _SHORT and device == CPU
    if not short or backend_of(group, device) not in _STEPWISE:
        return all_gather(group, payload)
    rows = torch.empty(size * payload.numel(), dtype=torch.uint8, device=CPU)
    dist.all_to_all_single(rows, payload.repeat(size), group=group)
    return rows.view(size, -1)


# Backends that receive an all-gather into memory of their own, and copy from there.
_COPYING = {"gloo"}

# Backends that describe what a scatter sends by an empty tensor of that size: c10d's
# AsyncScatterWork::getInputTensors in ProcessGroupGloo.cpp.
_DESCRIBING = {"gloo"}

# Where memory that nobody writes to costs nothing: it is never resident.
_LAZY = {"cpu"}


def all_gather_into(
    group: dist.ProcessGroup, payload: torch.Tensor, into: torch.Tensor, most: int
) -> None:
    """As :func:`all_gather`, where the bytes may be many. One collective.

    Where the backend needs room of its own for all of them, one for each ``most`` bytes that
    arrive, so that this room stays small.
    """
    size = dist.get_world_size(group)
    step = max(most // size, 1)
    copying = backend_of(group, payload.device) in _COPYING
    if payload.numel() <= step or not copying:
        all_gather(group, payload, into)
        return
    pieces = zip(payload.split(step), into.view(size, -1).split(step, dim=1), strict=True)
    for piece, rows in pieces:
        dist.all_gather(list(rows), piece, group=group)


def collect(stages: Sequence[Stage], payload: torch.Tensor, short: bool = False) -> torch.Tensor:
    """All-gather over one group after another: rows in row-major order of coordinates.

    One collective a stage; the innermost dimension is the last of ``stages``. ``short`` where the
    bytes are so few that waiting is what they cost.
    """
    rows = payload
    gather = all_gather_short if short else all_gather
    for stage in reversed(stages):
        rows = _in_coordinate_order(gather(stage.group, rows.reshape(-1)), stage)
    return rows.reshape(-1, payload.numel())


def collect_to(
    stages: Sequence[Stage], payload: torch.Tensor, mine: Sequence[int], dest: Sequence[int]
) -> torch.Tensor | None:
    """As :func:`collect`, towards the rank at coordinates ``dest`` only; None on the others.

    A rank drops out after the first stage in which it is not on the destination's line.
    """
    rows = payload
    for stage, here, target in reversed(list(zip(stages, mine, dest, strict=True))):
        size, flat = len(stage.coordinates), rows.reshape(-1)
        first = stage.coordinates.index(target)
        if here != target:
            dist.gather(flat, None, group=stage.group, group_dst=first)
            return None
        into = torch.empty((size, flat.numel()), dtype=torch.uint8, device=flat.device)
        dist.gather(flat, list(into), group=stage.group, group_dst=first)
        rows = _in_coordinate_order(into, stage)
    return rows.reshape(-1, payload.numel())


def _in_coordinate_order(rows: torch.Tensor, stage: Stage) -> torch.Tensor:
    """Rows in group order -> rows in the order of coordinates."""
    if stage.in_order:
        return rows
    order = sorted(range(len(stage.coordinates)), key=stage.coordinates.__getitem__)
    return rows[order]


def broadcast(group: dist.ProcessGroup, data: torch.Tensor) -> dist.Work | None:
    """Start to broadcast bytes from the group's first rank. One collective.

    Returns what :func:`finish` waits for; until then the bytes must stay as they are.
    """
    if not data.numel() or dist.get_world_size(group) == 1:
        return None
    return dist.broadcast(data, group=group, group_src=0, async_op=True)


def scatter(
    group: dist.ProcessGroup, into: torch.Tensor, rows: torch.Tensor | None
) -> dist.Work | None:
    """Start to scatter one row of bytes to each rank from the group's first rank. One collective.

    Returns what :func:`finish` waits for; until then the bytes must stay as they are.
    """
    parts = None if rows is None else list(rows)
    return dist.scatter(into, parts, group=group, group_src=0, async_op=True)


def scatter_takes_room(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether to start a scatter takes room for all that is sent once more on the first rank.

    The allocator of a device hands that room out for a moment, though nothing is written there.
    The answer is the same on every rank.
    """
    return device.type not in _LAZY and backend_of(group, device) in _DESCRIBING


def scatter_into(
    group: dist.ProcessGroup, into: torch.Tensor, rows: torch.Tensor | None, most: int
) -> None:
    """As :func:`scatter`, where the bytes may be many; all is done when it returns.

    One collective; where a scatter takes room, one for each ``most`` bytes that are sent, so that
    this room stays small.
    """
    step = into.numel()
    if scatter_takes_room(group, into.device):
        # Not reached on a CPU: its memory is given when it is written.
        step = max(most // dist.get_world_size(group), 1)
    work = None
    for start in range(0, into.numel(), step):
        part = slice(start, start + step)
        started = scatter(group, into[part], None if rows is None else rows[:, part])
        finish(work)
        work = started
    finish(work)


def finish(work: dist.Work | None) -> None:
    """Wait until what was started is done."""
    if work is not None:
        work.wait()
