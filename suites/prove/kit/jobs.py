"""Jobs that are right: one for each way of wrapping a model, each with its step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

CPU = torch.device("cpu")


class Net(nn.Module):
    """Linear layers, a batch norm, a frozen layer, and a buffer outside of state dicts."""

    def __init__(self, *, width: int = 16, norm: bool = True, tied: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(8, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.down = nn.Linear(width, 6)
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.arange(1.0, 7.0), persistent=False)
        if tied:
            self.twin = nn.Linear(8, width)
            self.twin.weight = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.up(x)).relu()
        if hasattr(self, "twin"):
            hidden = hidden + self.twin(x)
        out: torch.Tensor = self.frozen(self.down(hidden)) * self.scale
        return out.clone()


@dataclass
class Job:
    """What prove is called with."""

    model: Any
    optimizer: Any
    step: Callable[[], None]


def started(model: nn.Module, optimizer: Any = None, *, steps: int = 2) -> Job:
    """A job that has taken some steps, with other rows on each rank."""
    if optimizer is None:
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=2**-6, foreach=False
        )
    rank = dist.get_rank() if dist.is_initialized() else 0
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))

    def step() -> None:
        model(rows).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(steps):
        step()
    return Job(model, optimizer, step)


def net(**options: Any) -> Net:
    torch.manual_seed(3)
    return Net(**options)


def tp_net(mesh: Any, **options: Any) -> Net:
    model = net(norm=False, **options)
    frozen = model.frozen
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    assert not any(param.requires_grad for param in frozen.parameters())
    return model


def plain() -> Job:
    return started(net())


def fresh() -> Job:
    """Before the first step: the optimizer has no state."""
    return started(net(), steps=0)


def ddp() -> Job:
    return started(DistributedDataParallel(net()))


def replicated() -> Job:
    model = net(norm=False)  # replicate() leaves the statistics of each rank apart
    replicate(model)
    return started(model)


def tied() -> Job:
    return started(DistributedDataParallel(net(tied=True)))


def momentum() -> Job:
    """SGD, whose state holds one moment and no step; several groups."""
    model = net()
    optimizer = torch.optim.SGD(
        [
            {"params": model.up.parameters(), "lr": 2**-5, "momentum": 0.5},
            {"params": model.down.parameters(), "lr": 2**-6, "momentum": 0.25},
        ]
    )
    return started(DistributedDataParallel(model), optimizer)


def checkpointed() -> Job:
    model = net(norm=False)
    model.up = checkpoint_wrapper(model.up)  # type: ignore[assignment]
    return started(DistributedDataParallel(model))


def sharded() -> Job:
    model = net(norm=False)
    fully_shard(model.up)
    fully_shard(model)
    return started(model)


def sharded_on(ranks: list[int]) -> Job:
    """Over a mesh of these ranks, in this order."""
    model = net(norm=False)
    fully_shard(model, mesh=DeviceMesh("cpu", ranks))
    return started(model)


def sharded_tied() -> Job:
    model = net(norm=False, tied=True)
    fully_shard(model)
    return started(model)


def uneven() -> Job:
    """No two ranks hold alike, and some hold nothing."""
    model = net(norm=False, width=5)
    fully_shard(model)
    return started(model)


def meta() -> Job:
    """Made on meta, sharded there, then given memory and values."""
    model: Any
    with torch.device("meta"):
        model = Net(norm=False)
    fully_shard(model)
    model.to_empty(device="cpu")
    torch.manual_seed(5)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model.scale.copy_(torch.arange(1.0, 7.0))
    return started(model)


def mixed_dtypes() -> Job:
    model = net(norm=False).to(torch.bfloat16)
    model.register_buffer("count", torch.tensor([3, -1], dtype=torch.int64))
    model.register_buffer("flags", torch.tensor([True, False]))
    model.register_buffer("phase", torch.tensor([1 + 2j], dtype=torch.complex64))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2**-4)
    return Job(model, optimizer, lambda: None)


def hybrid() -> Job:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("rep", "dp"))
    model = net(norm=False)
    fully_shard(model, mesh=mesh)
    return started(model)


def sharded_tp() -> Job:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    model = tp_net(mesh["tp"])
    fully_shard(model, mesh=mesh["dp"])
    return started(model)


def tensor_parallel() -> Job:
    return started(tp_net(init_device_mesh("cpu", (dist.get_world_size(),))))


def ddp_tp() -> Job:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    return started(DistributedDataParallel(tp_net(mesh["tp"]), device_mesh=mesh["dp"]))


def fsdp1(*, original: bool = True) -> Job:
    model = net(norm=False)
    model.frozen.requires_grad_(True)  # FSDP1 flattens what trains with what does not
    wrapped = FullyShardedDataParallel(model, device_id=CPU, use_orig_params=original)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=2**-6, foreach=False)
    return started(wrapped, optimizer)


def fsdp1_tp() -> Job:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    model = tp_net(mesh["tp"])
    model.frozen.requires_grad_(True)
    wrapped = FullyShardedDataParallel(
        model, device_mesh=mesh["dp"], device_id=CPU, use_orig_params=True
    )
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=2**-6, foreach=False)
    return started(wrapped, optimizer)


def fsdp1_flat() -> Job:
    return fsdp1(original=False)


def hsdp1() -> Job:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("rep", "dp"))
    model = net(norm=False)
    model.frozen.requires_grad_(True)
    wrapped = FullyShardedDataParallel(
        model,
        device_mesh=mesh,
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        device_id=CPU,
        use_orig_params=True,
    )
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=2**-6, foreach=False)
    return started(wrapped, optimizer)


class Expert(nn.Module):
    """Experts as one DTensor, cut over the ranks of their mesh."""

    def __init__(self, mesh: Any) -> None:
        super().__init__()
        weight = torch.arange(4 * 3 * 2, dtype=torch.float32).reshape(4, 3, 2)
        self.experts = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
        router = distribute_tensor(torch.ones(3), mesh, [Replicate()])
        self.router = nn.Parameter(router)


def experts() -> Job:
    model = Expert(init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",)))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.zero_grad()
    return Job(model, optimizer, lambda: None)


def pipeline() -> Job:
    """Each rank has other layers, under other names."""
    model = nn.ModuleDict({str(dist.get_rank()): nn.Linear(8, 8)})
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.zero_grad()
    return Job(model, optimizer, lambda: None)


TWO: dict[str, Callable[[], Job]] = {
    "DDP": ddp,
    "replicate()": replicated,
    "DDP, tied weights": tied,
    "DDP, SGD with groups": momentum,
    "DDP, before the first step": lambda: started(DistributedDataParallel(net()), steps=0),
    "DDP, activation checkpointing": checkpointed,
    "many dtypes": mixed_dtypes,
    "fully_shard": sharded,
    "fully_shard, tied weights": sharded_tied,
    "fully_shard, uneven": uneven,
    "fully_shard, from meta": meta,
    "TP": tensor_parallel,
    "EP": experts,
}
"""Right jobs for two ranks, by name."""
FOUR: dict[str, Callable[[], Job]] = {
    "fully_shard with replicas": hybrid,
    "fully_shard x TP": sharded_tp,
}
"""Right jobs for four ranks."""
PIPELINE: dict[str, Callable[[], Job]] = {"PP": pipeline}
"""Right where the optimizer is saved flat."""
FLAT: dict[str, Callable[[], Job]] = {"FSDP1": fsdp1, "FSDP1, flat parameters": fsdp1_flat}
"""Jobs whose sharded roads are right, and whose full ones torch breaks on a CPU."""


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()
