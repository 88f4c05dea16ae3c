"""One more step of training, to compare with and without a round trip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from shardproof._prove.inventory import take
from shardproof._prove.modules import Modules
from shardproof._prove.optimizers import Optimizers


def digests_after(
    models: Sequence[torch.nn.Module],
    optimizers: Optimizers,
    step: Callable[[], Any] | None,
    rank: int,
) -> dict[str, int]:
    """Take a step, and the digests of all tensors after it; the caller puts everything back.

    The user's step where there is one. Else the optimizers step on gradients that prove sets,
    the same for every replica: this shows all that an optimizer's arithmetic depends on.
    """
    if step is not None:
        step()
    else:
        synthetic_step(optimizers)
    modules = Modules(models)
    modules.reshard()
    inventory = take(modules, optimizers, rank)
    inventory.measure()
    return {key: item.digest for key, item in inventory.items.items()}


def synthetic_step(optimizers: list[torch.optim.Optimizer]) -> None:
    """Have the optimizers step on gradients that are the same for every replica."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.requires_grad:
                    param.grad = _gradient(param)
        optimizer.step()


def _gradient(param: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        made = torch.zeros_like(param)
        local = made._local_tensor if isinstance(made, DTensor) else made
        count = local.numel()
        numbers = torch.arange(count, device=local.device) * 37 % 101 - 50
        local.copy_((numbers.reshape(local.shape) / 64).to(local.dtype))
        return made
