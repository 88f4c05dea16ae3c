"""A check before the forward: the ranks of DDP or ``replicate`` must hold the same shards."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed._composable.contract import STATE_KEY
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.nn.parallel import DistributedDataParallel

from shardproof.tensor.parallel import _local_parameters

_SEEN: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()


def prepare(submodules: Iterable[nn.Module]) -> None:
    """Let ``replicate`` take the local Parameters while they are there; refuse a wrong group.

    ``replicate`` looks for them in the first forward, after the hooks that stood there before.

    Raises:
        RuntimeError: data parallelism runs over ranks that hold other parts of a DTensor, and
            would take the mean of different parts.

    """
    active = DistributedDataParallel._active_ddp_module
    wrappers = [] if active is None or active in _SEEN else [active]
    for submodule in submodules:
        if STATE_KEY in submodule.__dict__:
            wrappers += _replicated(submodule)
    for wrapper in wrappers:
        _check(wrapper, submodules)
        _SEEN.add(wrapper)


def _replicated(module: nn.Module) -> list[DistributedDataParallel]:
    from torch.distributed._composable.replicate import replicate

    state: Any = replicate.state(module)
    if state is None:
        return []
    if not state.has_initialized and state._init_args:
        state.lazy_init()
    wrapper = getattr(state, "_ddp", None)
    return [] if wrapper is None or wrapper in _SEEN else [wrapper]


def _check(wrapper: DistributedDataParallel, submodules: Iterable[nn.Module]) -> None:
    ranks = dist.get_process_group_ranks(wrapper.process_group)
    managed = {id(param) for param in wrapper._module_parameters}
    for owner in submodules:
        for name, entry in _local_parameters.records_of(owner).items():
            if id(entry.local) in managed and (others := _other_parts(entry.spec, ranks)):
                raise RuntimeError(
                    f"parameter {name!r} of {type(owner).__name__}: data parallelism over the "
                    f"ranks {ranks} takes the mean of different parts, for the ranks {others} hold "
                    f"others than this one of the DTensor with placements {entry.spec.placements}; "
                    "pass device_mesh= or process_group= of the ranks that hold the same part"
                )


def _other_parts(spec: DTensorSpec, ranks: list[int]) -> list[int]:
    mine = spec.mesh.get_coordinate()
    if mine is None:
        return []
    mesh = spec.mesh.mesh
    different = []
    for rank in ranks:
        for at in (mesh == rank).nonzero().tolist():
            if any(
                here != there and not placement.is_replicate()
                for here, there, placement in zip(mine, at, spec.placements, strict=True)
            ):
                different.append(rank)
    return different
