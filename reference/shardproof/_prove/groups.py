"""Spare connections: roads run over them, so that a road that hangs leaves the job's own unhurt.

A collective that times out breaks its Gloo connections for good. While a road runs, each process
group of the job therefore has a backend of prove's, with a short timeout; afterwards it has its own
again. One that a road has broken is not used again. Other backends end the process when a
collective times out, and cannot be had twice as cheaply: there the job's own groups serve.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

_KINDS = ("CUSTOM", "UCC", "MPI", "XCCL")
"""Backend types that a group of Gloo does not use: a group can have one backend of each."""
_CPU = torch.device("cpu")


class NoSpareError(RuntimeError):
    """All spare connections have been broken."""


class SpareGroups:
    """Backends for all groups of the job; every rank must do the same at the same time."""

    _made: ClassVar[WeakKeyDictionary[Any, dict[str, Any]]] = WeakKeyDictionary()
    """Of each group, as long as it lives: a backend cannot be taken out of it."""
    _broken: ClassVar[WeakKeyDictionary[Any, int]] = WeakKeyDictionary()
    """Of the default group: how many kinds are broken, the same on all ranks."""

    def __init__(self, limit: float) -> None:
        self.limit = timedelta(seconds=limit)
        self.active = dist.is_available() and dist.is_initialized()
        self.used = self._broken.get(dist.group.WORLD, 0) if self.active else 0

    @property
    def left(self) -> bool:
        """Whether there is one to run a road on."""
        return self.used < len(_KINDS)

    def broken(self) -> None:
        """The spare of now is not to be used again; all ranks call it, or none."""
        self.used += 1
        if self.active:
            self._broken[dist.group.WORLD] = self.used

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the spare backends in the job's groups."""
        if not self.active:
            yield
            return
        if not self.left:
            raise NoSpareError("no spare connections are left")
        kind = getattr(dist.ProcessGroup.BackendType, _KINDS[self.used])
        changed = []
        try:
            for name, group in _groups():
                own = group._get_backend(_CPU)
                spare = self._spare(name, group)
                group._register_backend(_CPU, kind, spare)
                changed.append((group, own))
            yield
        finally:
            for group, own in changed:
                group._register_backend(_CPU, dist.ProcessGroup.BackendType.GLOO, own)

    def _spare(self, name: str, group: Any) -> Any:
        kind = _KINDS[self.used]
        made = self._made.setdefault(group, {})
        if kind not in made:
            base = dist.distributed_c10d._get_default_store()
            store = dist.distributed_c10d.PrefixStore(f"shardproof/spare/{kind}/{name}", base)
            made[kind] = dist.ProcessGroupGloo(store, group.rank(), group.size(), self.limit)
        made[kind]._set_default_timeout(self.limit)
        return made[kind]


def _groups() -> list[tuple[str, Any]]:
    """The job's groups with Gloo that this rank is in, in an order that all ranks share."""
    found = []
    for group in dist.distributed_c10d._world.pg_map:
        if not isinstance(group, dist.ProcessGroup):  # a group that this rank is not in
            continue
        ranks = dist.get_process_group_ranks(group)
        try:
            backend = group._get_backend(_CPU)
        except RuntimeError:  # a group without a backend for the CPU
            continue
        if backend.name().lower() == "gloo":
            found.append((sorted(ranks), f"{group.group_name}/{'-'.join(map(str, ranks))}", group))
    return [(name, group) for _, name, group in sorted(found, key=lambda one: one[:2])]
