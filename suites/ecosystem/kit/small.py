"""A small model whose weights are large enough for 8-bit optimizers, and its batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from ecosystem.kit.resume import Step

WIDTH = 64
ROWS = 8


def mlp(salt: int = 0) -> nn.Sequential:
    """Two linear layers with the same numbers on every rank."""
    generator = torch.Generator().manual_seed(salt)
    model = nn.Sequential(
        nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH, bias=False)
    )
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) / 8)
    return model


def batch(number: int) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(100 + number))


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Under fully_shard over `dp`, and under tensor parallelism over `tp` where there is one."""
    names = mesh.mesh_dim_names or ()
    if "tp" in names:
        tensor_parallel(model, mesh["tp"])
    fully_shard(model, mesh=mesh["dp"] if "tp" in names else mesh)
    return model


def stepper(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: DeviceMesh,
    backward: Callable[[torch.Tensor], object] = torch.Tensor.backward,
) -> Step:
    """Trains on this rank's rows of a batch; the loss is the mean over these."""

    def step(number: int) -> torch.Tensor:
        rows = batch(number).chunk(data.size())[data.get_local_rank()]
        loss = model(rows).square().mean()
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
