"""Optimizers that keep factored moments, and FSDP1 around FSDP1 over tensor parallelism."""

from __future__ import annotations

import copy
from collections.abc import Callable
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
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from conformance.kit.agree import attempt
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


class Own(Optimizer):
    """An optimizer that a user wrote; what it keeps is in its `step`."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.5})


class RowSums(Own):
    """Keeps for each weight a moment of another shape, as factored optimizers do."""

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


class Averages(Own):
    """Keeps two averages, of which one's name begins with the other's and a dot."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            self.state[param] |= {"mean": param.grad * 2, "mean.slow": param.grad * 3}


@pytest.mark.exercises("checkpoint.optimizer")
class TestNamesOfStates:
    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
    def test_a_dot_in_the_name_of_a_state(self, device: Any, flat: bool) -> None:
        """A state whose name has a dot must come back under that name."""
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        model = layer(device)
        optimizers = [Averages(model.parameters()) for _ in range(2)]
        for number, optimizer in enumerate(optimizers):
            model.zero_grad()
            model(torch.full((1, 4), 2.0 + number, device=device)).sum().backward()
            optimizer.step()
        state = get_optimizer_state_dict(model, optimizers[0], options=options)
        set_optimizer_state_dict(model, optimizers[1], state, options=options)
        (saved,), (loaded,) = [list(optimizer.state.values()) for optimizer in optimizers]
        assert list(loaded) == list(saved), f"states {list(loaded)}, expected {list(saved)}"
        for name, value in saved.items():
            assert_same(loaded[name], value, name)


class Scaled(nn.Module):
    """A weight, and a factor without dimensions, both DTensors."""

    def __init__(self, line: Any, device: Any) -> None:
        super().__init__()
        for name, full, placement in (
            ("weight", torch.ones(4, 4, device=device), Shard(0)),
            ("scale", torch.tensor(2.0, device=device), Replicate()),
        ):
            self.register_parameter(name, nn.Parameter(distribute_tensor(full, line, [placement])))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self.weight
        whole: Any = DTensor.from_local(x, weight.device_mesh, [Replicate()], run_check=False)
        found: torch.Tensor = ((whole @ weight.t()).sum() * self.scale).full_tensor()
        return found


@pytest.mark.exercises("checkpoint.optimizer")
class TestUnderTpAndDdp:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_a_parameter_without_dimensions(self, device: Any, mesh: Any) -> None:
        """The optimizer of a 0-dim parameter must go on after a load of the state that it gave."""
        model, optimizer = self.trained(device, mesh)
        state: Any = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
        before = {param: copy.deepcopy(values) for param, values in optimizer.state.items()}
        for values in optimizer.state.values():
            for value in values.values():
                value.zero_()
        set_optimizer_state_dict(model, optimizer, state)
        for param, values in optimizer.state.items():
            for name, value in values.items():
                assert_same(value, before[param][name], f"{name} of {tuple(param.shape)}")
        optimizer.step()

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("placement", [Replicate(), Shard(1)], ids=str)
    def test_moments_that_lie_otherwise(self, device: Any, mesh: Any, placement: Any) -> None:
        """A rank must take its own rows of a moment, however the checkpoint has laid it out."""
        model, optimizer = self.trained(device, mesh)
        state: Any = get_optimizer_state_dict(model, optimizer)
        (key,) = [name for name in state["state"] if name.endswith("weight")]
        (rows,) = [param for param in optimizer.state if param.dim()]
        line, full = mesh(1, 2)["tp"], torch.arange(16.0, device=device).view(4, 4)
        state["state"][key]["exp_avg"] = distribute_tensor(full, line, [placement])
        set_optimizer_state_dict(model, optimizer, state)
        mine = full.chunk(2)[line.get_local_rank()]
        assert_same(optimizer.state[rows]["exp_avg"], mine, "this rank's rows")

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_nothing_stays_on_the_optimizer(self, device: Any, mesh: Any) -> None:
        """A load must leave the optimizer's own attributes, also where it is refused."""
        model, optimizer = self.trained(device, mesh)
        state: Any = get_optimizer_state_dict(model, optimizer)
        before = sorted(vars(optimizer))
        set_optimizer_state_dict(model, optimizer, state)
        assert sorted(vars(optimizer)) == before, "after a load"
        attempt(lambda: set_optimizer_state_dict(model, optimizer, {**state, "state": {}}))
        assert sorted(vars(optimizer)) == before, "after a load of no state"

    def trained(self, device: Any, mesh: Any) -> tuple[nn.Module, Optimizer]:
        grid = mesh(1, 2)
        model = DistributedDataParallel(Scaled(grid["tp"], device), device_mesh=grid["dp"])
        optimizer = torch.optim.Adam(model.parameters(), foreach=False)
        model(torch.ones(1, 4, device=device)).backward()
        optimizer.step()
        return model, optimizer


class Momentum(Own):
    """Asks for the state of each parameter before it looks whether there is a gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            if param.grad is not None:
                state["moment"] = state.get("moment", 0) + param.grad


class Window(Own):
    """Keeps the last gradients in a list, in which nothing is at first."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            window = self.state[param].setdefault("window", [])
            self.state[param]["sum"] = param.grad.clone()
            if param.grad.any():  # a step without gradients makes the state, no more
                window.append(param.grad.clone())


def _adamw_without(params: Any) -> Optimizer:
    return torch.optim.AdamW([{"params": list(params), "frozen": []}])


def _adamw_with(params: Any) -> Optimizer:
    return torch.optim.AdamW([{"params": list(params), "frozen": ["it"]}])


NOT_YET: dict[str, tuple[Callable[[Any], Optimizer], Callable[[Any], Optimizer], bool]] = {
    "no state": (Momentum, Momentum, True),
    "a list": (Window, Window, False),
    "a group's entry": (_adamw_without, _adamw_with, False),
}
"""Name -> the optimizer that is saved, the one that loads it, whether half the model is unused."""


@pytest.mark.exercises("checkpoint.optimizer")
class TestWhatIsEmptyOnOneSide:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2, collective=8, limit=25)
    @pytest.mark.parametrize("name", NOT_YET)
    @pytest.mark.parametrize("way", ["each", "broadcast"])
    @pytest.mark.parametrize("wrap", ["ddp", "bare"])
    @pytest.mark.thorough(
        but=["ddp-broadcast-no state", "ddp-each-a list", "ddp-broadcast-a group's entry"]
    )
    def test_it_goes_on_where_it_stopped(self, device: Any, wrap: str, way: str, name: str) -> None:
        """What the checkpoint or the new optimizer has nothing in yet loads, and trains on."""
        first, second, unused = NOT_YET[name]
        models: list[nn.Module] = []
        optimizers: list[Optimizer] = []
        for make in (first, second):
            module = nn.ModuleDict({"used": layer(device), "unused": layer(device)})
            model: nn.Module = _Half(module, unused)
            if wrap == "ddp":
                model = DistributedDataParallel(model, find_unused_parameters=unused)
            models.append(model)
            optimizers.append(make(model.parameters()))
        _train(models[0], optimizers[0], device)
        models[1].load_state_dict(models[0].state_dict())
        state = get_optimizer_state_dict(models[0], optimizers[0], options=FULL)
        options = FULL if way == "each" else BROADCAST
        set_optimizer_state_dict(models[1], optimizers[1], given(state, options), options=options)
        for model, optimizer in zip(models, optimizers, strict=True):
            _train(model, optimizer, device)
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            kept, loaded = optimizers[0].state[one], optimizers[1].state[other]
            for key in kept:
                assert_same(torch.stack(_listed(loaded[key])), torch.stack(_listed(kept[key])), key)


class _Half(nn.Module):
    def __init__(self, parts: nn.ModuleDict, unused: bool) -> None:
        super().__init__()
        self.parts, self.unused = parts, unused

    def forward(self, rows: torch.Tensor) -> Any:
        out = self.parts["used"](rows)
        return out if self.unused else self.parts["unused"](out)


def _train(model: nn.Module, optimizer: Optimizer, device: Any) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 4, device=device)).sum().backward()
    optimizer.step()


def _listed(value: Any) -> list[torch.Tensor]:
    return value if isinstance(value, list) else [torch.as_tensor(value)]
