"""State dicts of wrapped models: what each option of torch's public API has to give.

The oracle is the whole model, `model.build()` after the same `dress`: what a rank must hold is cut
out of its tensors, and no function of the set has a part in that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from conformance.kit.compare import assert_same
from conformance.kit.layouts import part
from integration.kit.models import Model
from integration.kit.recipes import RECIPES, Trainee

State = dict[str, Any]

FLAT = ["ddp", "replicate", "fsdp1", "fully_shard"]
"""Recipes over a 2x2 grid, in a world of 4."""
HYBRID = ["hsdp", "fully_shard-hybrid"]
"""Recipes over a 2x2x2 grid, in a world of 8."""


@dataclass(frozen=True)
class Got:
    """Options of a get, and what they mean."""

    full: bool
    offload: bool
    trainable: bool
    """Without the frozen parameters."""

    @property
    def options(self) -> StateDictOptions:
        return StateDictOptions(
            full_state_dict=self.full,
            cpu_offload=self.offload,
            ignore_frozen_params=self.trainable,
        )

    @property
    def empty(self) -> bool:
        """Whether this rank has to get `{}`."""
        return self.full and self.offload and torch.distributed.get_rank() != 0

    def device(self, device: torch.device) -> torch.device:
        return torch.device("cpu") if self.offload else device


GETS = [Got(f, o, t) for f in (False, True) for o in (False, True) for t in (False, True)]
"""All that torch allows; broadcast_from_rank0 and strict say nothing to a get."""

SETS = [
    StateDictOptions(
        full_state_dict=full, broadcast_from_rank0=broadcast, cpu_offload=offload, strict=strict
    )
    for full, broadcast in ((False, False), (True, False), (True, True))
    for offload in (False, True)
    for strict in (True, False)
]
"""All that torch allows: to broadcast, the state dict must be full."""


def said(options: StateDictOptions) -> str:
    """The options that are not the default, for messages."""
    changed = [
        name if value is True else f"{name}={value}"
        for name, value in vars(options).items()
        if value != getattr(StateDictOptions(), name)
    ]
    return ", ".join(changed) or "no option"


def dress(module: nn.Module) -> None:
    """Give a model what a real one has besides parameters: buffers, one of them not saved."""
    device = next(module.parameters()).device
    module.register_buffer("count", torch.tensor(5, device=device))
    module.register_buffer("mask", torch.tensor([True, False, True], device=device))
    module.register_buffer("passing", torch.ones(2, device=device), persistent=False)


def spoil(module: nn.Module) -> None:
    """Other values in all parameters and buffers, in place."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.zero_()


def dress_and_spoil(module: nn.Module) -> None:
    dress(module)
    spoil(module)


def whole(model: Model, *, trainable: bool = False) -> State:
    """The oracle's state dict; only what is no frozen parameter, where asked."""
    module = model.build()
    dress(module)
    frozen = {
        name
        for name, param in module.named_parameters(remove_duplicate=False)
        if trainable and not param.requires_grad
    }
    return {name: t.detach() for name, t in module.state_dict().items() if name not in frozen}


def given(state: Mapping[str, Any], options: StateDictOptions) -> State:
    """What this rank passes to a set: rank 0 alone has the full state dict when it broadcasts."""
    if options.broadcast_from_rank0 and torch.distributed.get_rank() != 0:
        return {}
    return dict(state)


def assert_keys(state: Mapping[str, Any], expected: Iterable[str], what: str) -> None:
    keys, wanted = list(state), list(expected)
    missing = [k for k in wanted if k not in state]
    extra = [k for k in keys if k not in set(wanted)]
    assert not missing, f"{what}: lacks {missing}"
    assert not extra, f"{what}: has {extra} besides"
    assert keys == wanted, f"{what}: in the order {keys}, expected {wanted}"


def assert_full(state: State, expected: State, device: torch.device, what: str) -> None:
    """Plain tensors of the global shape, with the oracle's bits, under its keys in its order."""
    assert_keys(state, expected, what)
    for name, full in expected.items():
        assert_same(state[name], full, f"{what}: {name}")
        assert state[name].device.type == device.type, f"{what}: {name} on {state[name].device}"


def assert_sharded(state: State, expected: State, device: torch.device, what: str) -> None:
    """The oracle's keys; DTensors whose local tensor is the part that their placements say."""
    assert_keys(state, expected, what)
    for name, full in expected.items():
        value, where = state[name], f"{what}: {name}"
        assert value.device.type == device.type, f"{where} on {value.device}"
        if isinstance(value, DTensor):
            assert value.shape == full.shape, f"{where}: shape {tuple(value.shape)}"
            mine = part(full, value.device_mesh, value.placements)
            assert_same(value._local_tensor.detach(), mine, f"{where} {value.placements}")
        else:
            assert_same(value, full, where)


def assert_got(state: State, got: Got, model: Model, device: torch.device, what: str) -> None:
    """What a get with these options has to give for a model that holds the oracle's values."""
    if got.empty:
        assert state == {}, f"{what}: expected {{}} on this rank, got keys {list(state)}"
        return
    check = assert_full if got.full else assert_sharded
    check(state, whole(model, trainable=got.trainable), got.device(device), what)


def assert_loaded(trainee: Trainee, expected: State, what: str) -> None:
    """The wrapped model holds these values, each rank its part."""
    assert_sharded(get_model_state_dict(trainee.wrapped), expected, trainee.device, what)


def trainee(recipe: str, model: Model, device: torch.device, *, spoilt: bool = False) -> Trainee:
    """A dressed model that went through a recipe; its values are the oracle's, or none of them."""
    return RECIPES[recipe].make(model, device, change=dress_and_spoil if spoilt else dress)
