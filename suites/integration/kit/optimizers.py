"""Optimizers whose state is exact, and what their state dicts have to hold.

SGD with momentum trains the MLP with dyadic rates. AdamW takes its steps at a learning rate of
zero, since its quotients are exact nowhere: the moments follow from the gradients alone. foreach
would want all DTensors of a model on one mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer

from conformance.kit.compare import assert_same
from conformance.kit.layouts import part
from integration.kit.models import MLP
from integration.kit.recipes import Trainee

ROWS = 8
FROZEN = "down.weight"
"""A parameter of the MLP that tensor parallelism shards."""
STEPS = 2


def sgd(model: nn.Module, scale: float = 1) -> Optimizer:
    return SGD(_groups(model, scale / 8), momentum=0.5 * scale, foreach=False)


def adamw(model: nn.Module, scale: float = 1) -> Optimizer:
    betas = 0.5 * scale, 0.75 * scale
    return AdamW(_groups(model, scale / 8), betas=betas, amsgrad=True, foreach=False)


def _groups(model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Weights and biases apart, at different rates."""
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if not n.endswith("bias")], "lr": rate},
        {"params": [p for n, p in named if n.endswith("bias")], "lr": rate / 2},
    ]


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {"sgd": sgd, "adamw": adamw}


def other(name: str, model: nn.Module) -> Optimizer:
    """An optimizer of the same kind with other settings."""
    make: Callable[..., Optimizer] = OPTIMIZERS[name]
    return make(model, scale=0.5)


def freeze(module: nn.Module) -> None:
    module.get_parameter(FROZEN).requires_grad_(False)


def train(optimizer: Optimizer, loss: Callable[[int], torch.Tensor], first: int, last: int) -> None:
    """Steps with the batches of these salts."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for salt in range(first, last):
        loss(salt).backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if isinstance(optimizer, AdamW) else group["lr"]
        optimizer.step()
        optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def train_wrapped(trainee: Trainee, optimizer: Optimizer, first: int, last: int) -> None:
    train(optimizer, lambda salt: trainee.loss(salt, ROWS), first, last)


@dataclass
class Oracle:
    """The whole MLP, trained on whole batches, and its optimizer."""

    name: str
    frozen: bool = False
    model: nn.Module = field(init=False)
    optimizer: Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.model = MLP.build()
        if self.frozen:
            freeze(self.model)
        self.optimizer = OPTIMIZERS[self.name](self.model)
        self.step(0, STEPS)

    def step(self, first: int, last: int) -> None:
        def loss(salt: int) -> torch.Tensor:
            inputs, targets = MLP.batch(salt, ROWS)
            return MLP.loss(self.model(inputs), targets)

        train(self.optimizer, loss, first, last)

    def params(self) -> dict[str, torch.Tensor]:
        return {name: param.detach() for name, param in self.model.named_parameters()}

    def state(self) -> dict[str, Any]:
        """The optimizer's state dict with the parameters' names for their numbers."""
        names = {id(p): n for n, p in self.model.named_parameters()}
        state = {
            names[id(param)]: {key: _detached(value) for key, value in entry.items()}
            for param, entry in self.optimizer.state.items()
        }
        groups = [
            {**group, "params": [names[id(p)] for p in group["params"]]}
            for group in self.optimizer.param_groups
        ]
        return {"state": state, "param_groups": groups}

    def flat(self) -> dict[str, Any]:
        """The same as flatten_optimizer_state_dict has it."""
        nested = self.state()
        flat = {
            f"state.{name}.{key}": value
            for name, entry in nested["state"].items()
            for key, value in entry.items()
        }
        for group in nested["param_groups"]:
            settings = {k: v for k, v in group.items() if k != "params"}
            flat |= {
                f"param_groups.{n}.{k}": v for n in group["params"] for k, v in settings.items()
            }
        return flat


def _detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def assert_optimizer(
    got: Mapping[str, Any], oracle: Oracle, options: StateDictOptions, device: Any, what: str
) -> None:
    """An optimizer's state dict is the oracle's: whole, or this rank's parts of it."""
    found = dict(got)
    if not options.flatten_optimizer_state_dict:
        assert set(found) == {"state", "param_groups"}, f"{what}: keys {list(found)}"
        found = _flattened(found, what)
    expected = oracle.flat()
    missing, extra = set(expected) - set(found), set(found) - set(expected)
    assert not missing, f"{what}: lacks {sorted(missing)}"
    assert not extra, f"{what}: has {sorted(extra)} besides"
    kind = "cpu" if options.cpu_offload else torch.device(device).type
    for key, full in expected.items():
        value, where = found[key], f"{what}: {key}"
        if not isinstance(full, torch.Tensor):
            assert value == full, f"{where} is {value!r}, expected {full!r}"
            continue
        assert isinstance(value, torch.Tensor), f"{where}: a {type(value).__name__}"
        if full.dim():
            assert value.device.type == kind, f"{where} on {value.device}"
        if isinstance(value, DTensor) and not options.full_state_dict:
            assert value.shape == full.shape, f"{where}: shape {tuple(value.shape)}"
            mine = part(full, value.device_mesh, value.placements)
            assert_same(value._local_tensor, mine, f"{where} {value.placements}")
        else:
            assert_same(value, full, where)


def _flattened(nested: Mapping[str, Any], what: str) -> dict[str, Any]:
    flat = {f"state.{n}.{k}": v for n, entry in nested["state"].items() for k, v in entry.items()}
    for group in nested["param_groups"]:
        assert len(set(group["params"])) == len(group["params"]), f"{what}: {group['params']}"
        settings = {k: v for k, v in group.items() if k != "params"}
        flat |= {f"param_groups.{n}.{k}": v for n in group["params"] for k, v in settings.items()}
    return flat
