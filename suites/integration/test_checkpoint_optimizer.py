"""The optimizer's state dict through torch.distributed.checkpoint.state_dict."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from integration.kit.checkpoints import FLAT, assert_sharded, given, said
from integration.kit.models import MLP
from integration.kit.optimizers import (
    OPTIMIZERS,
    STEPS,
    Oracle,
    assert_optimizer,
    freeze,
    other,
    train_wrapped,
)
from integration.kit.recipes import GATHERS, RECIPES, Trainee, gathering

SHARDED = [
    StateDictOptions(cpu_offload=offload, flatten_optimizer_state_dict=flat)
    for offload in (False, True)
    for flat in (False, True)
]
FULL = [
    StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=flat)
    for flat in (False, True)
]
FULL_ON_CPU = [
    StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=flat)
    for flat in (False, True)
]
FULL_SETS = [
    StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=broadcast, cpu_offload=offload, strict=strict
    )
    for broadcast in (False, True)
    for offload in (False, True)
    for strict in (True, False)
]


def trained(
    recipe: str, name: str, device: torch.device, frozen: bool = False
) -> tuple[Trainee, Optimizer, Oracle]:
    """An MLP under the recipe after some steps, its optimizer, and the oracle at the same point."""
    trainee = RECIPES[recipe].make(MLP, device, change=freeze if frozen else lambda _: None)
    optimizer = OPTIMIZERS[name](trainee.wrapped)
    train_wrapped(trainee, optimizer, 0, STEPS)
    return trainee, optimizer, Oracle(name, frozen)


def get(
    recipe: str, device: torch.device, each: list[StateDictOptions], frozen: bool = False
) -> None:
    for name in OPTIMIZERS:
        trainee, optimizer, oracle = trained(recipe, name, device, frozen)
        for options in each:
            what = f"{name}: {said(options)}"
            for number in ("first", "second"):
                state = get_optimizer_state_dict(trainee.wrapped, optimizer, options=options)
                if options.full_state_dict and options.cpu_offload and torch.distributed.get_rank():
                    assert state == {}, f"{what}: expected {{}} here, got {list(state)}"
                else:
                    assert_optimizer(state, oracle, options, device, f"{what}, {number} call")


def load(
    recipe: str, device: torch.device, each: list[StateDictOptions], frozen: bool = False
) -> None:
    """Into new optimizers of a trained model; with the last, model and oracle take another step."""
    for name in OPTIMIZERS:
        trainee, optimizer, oracle = trained(recipe, name, device, frozen)
        sharded = StateDictOptions()
        for options in each:
            what = f"{name}: {said(options)}"
            flat = options.flatten_optimizer_state_dict
            if options.full_state_dict:
                source = given(oracle.flat() if flat else oracle.state(), options)
            else:
                source = get_optimizer_state_dict(trainee.wrapped, optimizer, options=options)
            fresh = other(name, trainee.wrapped)
            set_optimizer_state_dict(trainee.wrapped, fresh, source, options=options)
            state = get_optimizer_state_dict(trainee.wrapped, fresh, options=sharded)
            assert_optimizer(state, oracle, sharded, device, what)
        train_wrapped(trainee, fresh, STEPS, STEPS + 1)
        oracle.step(STEPS, STEPS + 1)
        found = get_model_state_dict(trainee.wrapped)
        assert_sharded(found, oracle.params(), device, f"{name}: a step after the loads")


@pytest.mark.exercises("checkpoint.optimizer")
class TestGetOptimizerStateDict:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", gathering(FLAT, "fsdp1"))
    @pytest.mark.thorough(but=["ddp"])
    def test_sharded(self, device: Any, recipe: str) -> None:
        """Each rank gets its part of the state as a DTensor, nested or flat, on its device."""
        get(recipe, device, SHARDED)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", gathering(FLAT, "fsdp1"))
    @pytest.mark.thorough
    def test_full(self, device: Any, recipe: str) -> None:
        """With full_state_dict every rank gets the unsharded optimizer's state."""
        get(recipe, device, FULL)

    @pytest.mark.law("values")
    @pytest.mark.world(4, collective=8, limit=25)
    @pytest.mark.parametrize("recipe", gathering(FLAT, "fsdp1"))
    @pytest.mark.thorough
    def test_full_on_the_cpu(self, device: Any, recipe: str) -> None:
        """With cpu_offload besides, rank 0 gets it in CPU memory and the others {}."""
        get(recipe, device, FULL_ON_CPU)

    @pytest.mark.law("structure")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", gathering(["fsdp1", "fully_shard"], "fsdp1"))
    @pytest.mark.thorough
    def test_a_frozen_parameter(self, device: Any, recipe: str) -> None:
        """A frozen parameter has no state, and its place in its parameter group."""
        get(recipe, device, [*SHARDED[:1], *FULL[:1]], frozen=True)

    @pytest.mark.law("values")
    @pytest.mark.world(8)
    @pytest.mark.thorough
    @GATHERS
    def test_hybrid(self, device: Any) -> None:
        """With replicas each rank must get its part of the optimizer's state, or all of it."""
        get("hsdp", device, [*SHARDED[:1], *FULL[:1]])


@pytest.mark.exercises("checkpoint.optimizer")
class TestSetOptimizerStateDict:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", gathering(FLAT, "fsdp1"))
    @pytest.mark.thorough
    def test_sharded(self, device: Any, recipe: str) -> None:
        """A sharded state, nested or flat, lands in a new optimizer, which then trains alike."""
        load(recipe, device, SHARDED)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", gathering(FLAT, "fsdp1"))
    @pytest.mark.thorough(but=["fsdp1"])
    def test_full(self, device: Any, recipe: str) -> None:
        """A full state, on every rank or broadcast from rank 0, must land in a new optimizer."""
        load(recipe, device, FULL_SETS)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", gathering(["fsdp1", "fully_shard"], "fsdp1"))
    @pytest.mark.thorough
    def test_full_and_flat(self, device: Any, recipe: str) -> None:
        """A full, flat state must land with flatten_optimizer_state_dict, which made it."""
        load(recipe, device, FULL)

    @pytest.mark.law("structure")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", gathering(["fsdp1", "fully_shard"], "fsdp1"))
    @pytest.mark.thorough
    def test_a_frozen_parameter(self, device: Any, recipe: str) -> None:
        """The state of a model with a frozen parameter lands, too, strict or not."""
        load(recipe, device, [*SHARDED[:1], *FULL_SETS], frozen=True)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", gathering(FLAT, "fsdp1"))
    @pytest.mark.thorough(but=["ddp"])
    def test_each_rank_takes_back_its_own(self, device: Any, recipe: str) -> None:
        """What a rank got without options it can load; training goes on as if nothing was."""
        for name in OPTIMIZERS:
            trainee, optimizer, oracle = trained(recipe, name, device)
            state = get_optimizer_state_dict(trainee.wrapped, optimizer)
            fresh = other(name, trainee.wrapped)
            set_optimizer_state_dict(trainee.wrapped, fresh, state)
            train_wrapped(trainee, fresh, STEPS, STEPS + 1)
            oracle.step(STEPS, STEPS + 1)
            found = get_model_state_dict(trainee.wrapped)
            assert_sharded(found, oracle.params(), device, f"{name}: a step later")

    @pytest.mark.law("values")
    @pytest.mark.world(8)
    @pytest.mark.thorough
    @GATHERS
    def test_hybrid(self, device: Any) -> None:
        """With replicas the optimizer's state must land, and training go on alike."""
        load("hsdp", device, [*SHARDED[:1], *FULL_SETS[:1]])
