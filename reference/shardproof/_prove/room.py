"""Whether there is room for the snapshot and the files: decided alike on all ranks, said first."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardproof._prove.exchange import Exchange
from shardproof._prove.inventory import Item
from shardproof._prove.roads import Road

Needs = dict[str, dict[str, int]]
"""Of each road: bytes of CPU memory and of the accelerator's."""

_SHARE = 0.8
"""Of the free memory, at most: the job goes on beside it."""


class NoRoomError(RuntimeError):
    """There is no room for the snapshot or for the files. Nothing was touched."""


@dataclass(frozen=True)
class Room:
    """Where things go."""

    snapshot: Path | None
    """A folder; None: CPU memory."""
    folder: Path
    """For the files of roads; all ranks see it."""
    made: bool
    """Whether prove made it, and removes it."""
    total: int
    """Bytes of all ranks' snapshots."""
    largest: int
    shared: bool
    """Whether all ranks see the folder."""
    lacking: dict[str, str]
    """Roads whose state does not fit beside the snapshot, and what they need."""

    def announcement(self) -> str:
        """What is said before anything is copied."""
        where = "CPU memory" if self.snapshot is None else f"files in {self.snapshot}"
        return (
            f"snapshot of {size_text(self.total)} on all ranks, at most "
            f"{size_text(self.largest)} on one, in {where}; checkpoints go to {self.folder}"
        )


def size_text(nbytes: float) -> str:
    """1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} TiB"


def available_memory() -> int:
    """Bytes of CPU memory that this process can still have, by the machine and by its cgroup."""
    found = 1 << 62
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    found = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            found = min(found, int(limit) - used)
    except (OSError, ValueError):
        pass
    return found


def available_device_memory() -> int:
    """Free bytes of this rank's accelerator, where it tells; else no limit."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    told = getattr(getattr(torch, device.type, None), "mem_get_info", None) if device else None
    return int(told()[0]) if told is not None else 1 << 62


def needs_of(roads: Sequence[Road], items: Iterable[Item], rank: int, *, on_device: bool) -> Needs:
    """What each road holds at a time: a copy of this rank's shards, or the whole of all tensors."""
    local = {"model": 0, "optimizer": 0}
    total = dict(local)
    for item in items:
        if item.kind in ("parameter", "buffer", "optimizer"):
            each = item.tensor.element_size()
            local[item.side] += item.tensor.numel() * each
            total[item.side] += item.part.size * each
    found = {}
    for road in roads:
        full = road.full == "all" or (road.full == "first" and rank == 0)
        size = max(total.values()) + max(local.values()) if full else max(local.values())
        there = on_device and not road.offloads
        found[road.name] = {"memory": 0 if there else size, "device memory": size if there else 0}
    return found


def find(
    exchange: Exchange,
    nbytes: int,
    files: int,
    needs: Needs,
    snapshot: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None,
) -> Room:
    """Choose places; NoRoomError on every rank where one of them has too little."""
    own = str(folder) if folder is not None else ""
    if exchange.rank == 0 and not own:
        own = tempfile.mkdtemp(prefix="shardproof-prove-")
    chosen = str(exchange.all("the folder", own)[0])
    made = folder is None
    try:
        return _find(exchange, nbytes, files, needs, snapshot, Path(chosen), made)
    except BaseException:
        if made and exchange.rank == 0:
            shutil.rmtree(chosen, ignore_errors=True)
        raise


def _find(
    exchange: Exchange,
    nbytes: int,
    files: int,
    needs: Needs,
    snapshot: str | os.PathLike[str],
    folder: Path,
    made: bool,
) -> Room:
    disk = Path(tempfile.gettempdir()) if snapshot in ("cpu", "disk", "auto") else Path(snapshot)
    told = exchange.all(
        "room",
        {
            "host": exchange.host,
            "bytes": nbytes,
            "files": files,
            "needs": needs,
            "memory": available_memory(),
            "device memory": available_device_memory(),
            "disk": _free(disk),
            "shared": folder.is_dir(),
            "free": _free(folder),
        },
    )
    shared = all(one["shared"] for one in told)
    needed = sum(one["files"] for one in told)
    free = min((one["free"] for one in told if one["shared"]), default=0)
    if not told[0]["shared"]:
        raise NoRoomError(f"folder={str(folder)!r} is no folder that rank 0 can see")
    if needed > free:
        raise NoRoomError(
            f"checkpoints need {size_text(needed)} in {folder}, which has {size_text(free)} left: "
            "name another one with folder="
        )
    memory = _shortage(told, "memory", _SHARE, lambda one: one["bytes"])
    room = _shortage(told, "disk", 1.0, lambda one: one["bytes"])
    if snapshot == "cpu" and memory:
        raise NoRoomError(f"the snapshot does not fit into CPU memory: {memory}")
    if snapshot not in ("cpu", "auto") and room:
        raise NoRoomError(f"the snapshot does not fit into {disk}: {room}")
    if snapshot == "auto" and memory and room:
        raise NoRoomError(
            f"the snapshot fits neither into CPU memory ({memory}) nor {disk} ({room})"
        )
    on_disk = snapshot not in ("cpu", "auto") or bool(memory)
    return Room(
        disk if on_disk else None,
        folder,
        made,
        sum(one["bytes"] for one in told),
        max(one["bytes"] for one in told),
        shared,
        _lacking(told, on_disk=on_disk),
    )


def give_up(room: Room, exchange: Exchange) -> None:
    """Raise NoRoomError for the first road that has no room, and leave no folder."""
    if room.made and exchange.rank == 0:
        shutil.rmtree(room.folder, ignore_errors=True)
    road, why = next(iter(room.lacking.items()))
    raise NoRoomError(f"the road {road} has no room: {why}")


def _lacking(told: Sequence[dict[str, Any]], *, on_disk: bool) -> dict[str, str]:
    found = {}
    for road in told[0]["needs"]:
        for kind in ("memory", "device memory"):
            beside = "bytes" if kind == "memory" and not on_disk else ""
            why = _shortage(
                told,
                kind,
                _SHARE,
                lambda one, road=road, kind=kind, beside=beside: (  # type: ignore[misc]
                    one["needs"][road][kind] + (one[beside] if beside else 0)
                ),
            )
            if why:
                found[road] = f"its state does not fit into {kind}: {why}"
    return found


def _shortage(
    told: Sequence[dict[str, Any]], kind: str, share: float, need_of: Callable[[Any], int]
) -> str:
    """Which machine has too little for its ranks; empty where all have enough."""
    hosts: dict[str, list[dict[str, Any]]] = {}
    for rank, one in enumerate(told):
        place = one["host"] if kind != "device memory" else f"{one['host']} (rank {rank})"
        hosts.setdefault(place, []).append(one)
    for host, ranks in hosts.items():
        need = sum(map(need_of, ranks))
        has = min(one[kind] for one in ranks)
        if need > has * share:
            return (
                f"the ranks on {host} ({len(ranks)}) need {size_text(need)}, and "
                f"{size_text(has * share)} of {size_text(has)} may be taken"
            )
    return ""


def _free(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0
