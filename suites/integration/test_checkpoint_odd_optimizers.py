"""Optimizers that keep factored moments, and FSDP1 around FSDP1 over tensor parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from conformance.kit.compare import assert_same, local
from integration.kit.checkpoints import given
from integration.kit.recipes import GATHERS

pytestmark = [
    pytest.mark.filterwarnings("ignore:`_get_pg_default_device` will be deprecated"),
    pytest.mark.filterwarnings("ignore:Multiple backends are registered"),
    pytest.mark.filterwarnings("ignore:Please use DTensor instead"),
]

FULL = StateDictOptions(full_state_dict=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def layer(device: Any, value: float = 1.0) -> nn.Module:
    """A layer without a bias whose weight is `value` everywhere."""
    linear = nn.Linear(4, 4, bias=False, device=device)
    nn.init.constant_(linear.weight, value)
    return nn.Sequential(linear)


class RowSums(Optimizer):
    """Keeps for each weight a moment of another shape, as factored optimizers do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.5})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            state["rows"] = state.get("rows", 0) + param.grad.sum(-1, keepdim=True)


@pytest.mark.exercises("checkpoint.optimizer")
class TestFactoredState:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_under_tensor_parallelism(self, device: Any, mesh: Any) -> None:
        """A moment of another shape than the rank's part must come out and go in as it is."""
        grid = mesh(1, 2)
        model = parallelize_module(layer(device), grid["tp"], {"0": ColwiseParallel()})
        wrapped = DistributedDataParallel(model, device_mesh=grid["dp"])
        optimizer = RowSums(wrapped.parameters())
        wrapped(torch.ones(1, 4, device=device)).sum().backward()
        optimizer.step()
        (held,) = [value["rows"] for value in optimizer.state.values()]
        state: Any = get_optimizer_state_dict(wrapped, optimizer, options=FULL)
        (saved,) = [entry["rows"] for entry in state["state"].values()]
        assert_same(saved, held, "saved")
        for value in optimizer.state.values():
            value["rows"] = torch.zeros_like(held)
        set_optimizer_state_dict(wrapped, optimizer, state, options=FULL)
        (loaded,) = [value["rows"] for value in optimizer.state.values()]
        assert_same(loaded, held, "loaded")


@pytest.mark.exercises("checkpoint.optimizer")
class TestFsdp1InFsdp1:
    @pytest.mark.law("values")
    @pytest.mark.world(4, collective=8, limit=30)
    @GATHERS
    def test_tensor_parallelism_inside_alone(self, device: Any, mesh: Any) -> None:
        """Rank 0's state must reach all ranks where only a module inside is tensor-parallel."""
        grid = mesh(2, 2)
        column: Any = {"0": ColwiseParallel(output_layouts=Replicate())}
        options: Any = {"device_mesh": grid["dp"], "device_id": device, "use_orig_params": True}
        inner = parallelize_module(layer(device, 2.0), grid["tp"], column)
        outer = nn.Sequential(layer(device), FullyShardedDataParallel(inner, **options))
        model = FullyShardedDataParallel(outer, **options)
        optimizers = [SGD(model.parameters(), 0.5, momentum=0.5, foreach=False) for _ in range(2)]
        model(torch.ones(1, 4, device=device)).sum().backward()
        optimizers[0].step()
        state = get_optimizer_state_dict(model, optimizers[0], options=FULL)
        set_optimizer_state_dict(model, optimizers[1], given(state, BROADCAST), options=BROADCAST)
        for name, param in model.named_parameters():
            if param.numel():
                saved, loaded = (o.state[param]["momentum_buffer"] for o in optimizers)
                assert_same(local(loaded), local(saved), f"moment of {name}")
