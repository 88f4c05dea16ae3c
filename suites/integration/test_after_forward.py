"""What a wrapped model is after it has computed: what it was before, but for its values."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from conformance.kit.compare import assert_same
from conformance.kit.tensor_parallel import baggage, identities, piled_up
from integration.kit.models import FROZEN, MLP, TIED, Model
from integration.kit.oracle import Pair
from integration.kit.recipes import Recipe, Trainee, over

FULL = StateDictOptions(full_state_dict=True)


def model_for(recipe: Recipe) -> Model:
    """Tied and with frozen weights, as far as the recipe can do that."""
    if recipe.name == "fsdp1-flat":  # All of a flat parameter trains, or nothing.
        return MLP
    return FROZEN if recipe.unties else TIED


def structure(trainee: Trainee) -> dict[str, Any]:
    """All but the values: names, order, identities, flags, types, ties, buffers, modules."""
    module = trainee.wrapped
    named = list(module.named_parameters(remove_duplicate=False))
    return {
        "names, order and identities": identities(module),
        "flags": [(name, param.requires_grad) for name, param in named],
        "Parameters": [(name, isinstance(param, nn.Parameter)) for name, param in named],
        "shapes": [(name, tuple(param.shape)) for name, param in named],
        "modules": [(name, id(part), type(part)) for name, part in module.named_modules()],
    }


def assert_unchanged(now: dict[str, Any], before: dict[str, Any], when: str) -> None:
    for kind, was in before.items():
        lost = [entry for entry in was if entry not in now[kind]]
        new = [entry for entry in now[kind] if entry not in was]
        assert now[kind] == was, f"{when}: {kind}: lost {lost}, new {new}"


def assert_owned(trainee: Trainee, optimizer: torch.optim.Optimizer, when: str) -> None:
    """The optimizer holds the module's parameters, all of them and nothing else."""
    mine = {id(param): name for name, param in trainee.wrapped.named_parameters()}
    theirs = [id(param) for group in optimizer.param_groups for param in group["params"]]
    strange = [at for at, key in enumerate(theirs) if key not in mine]
    missing = [name for key, name in mine.items() if key not in theirs]
    assert not strange, f"{when}: the optimizer's parameters {strange} are not the module's"
    assert not missing, f"{when}: the optimizer lacks {missing}"


def live_tensors() -> tuple[int, int]:
    """Tensors that are alive, and the bytes of their elements."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return len(found), sum(t.numel() * t.element_size() for t in found)


def assert_nothing_changes(recipe: Recipe, device: Any) -> None:
    pair = Pair(recipe.make(model_for(recipe), device))
    trainee, rows = pair.trainee, pair.trainee.replicas
    before = structure(trainee)
    assert_owned(trainee, pair.ours, "at first")
    for step in range(2):
        # Sharded data parallelism keeps its root whole from a forward to the next backward.
        looks = not recipe.shards
        with torch.no_grad():
            trainee.loss(step, rows)
        if looks:
            assert_unchanged(structure(trainee), before, f"after evaluation {step}")
        loss = trainee.loss(step, rows)
        if looks:
            assert_unchanged(structure(trainee), before, f"after forward {step}")
        loss.backward()
        assert_unchanged(structure(trainee), before, f"after backward {step}")
        pair.ours.step()
        assert_unchanged(structure(trainee), before, f"after step {step}")
        assert_owned(trainee, pair.ours, f"after step {step}")


def assert_nothing_piles_up(recipe: Recipe, device: Any) -> None:
    pair = Pair(recipe.make(MLP, device))
    trainee = pair.trainee
    hooks, live = dict[str, int](), (0, 0)
    for step in range(5):
        with torch.no_grad():
            trainee.loss(step, trainee.replicas)
        pair.ours.zero_grad()
        trainee.loss(step, trainee.replicas).backward()
        pair.ours.step()
        if step == 1:  # What is made once is there: buckets, gradients, the optimizer's state.
            hooks, live = baggage(trainee.wrapped), live_tensors()
    assert piled_up(trainee.wrapped, hooks) == []
    assert live_tensors() == live, "live tensors and their bytes, now and three steps ago"


def assert_state_dict(recipe: Recipe, device: Any) -> None:
    pair = Pair(recipe.make(model_for(recipe), device))
    for step in range(2):
        state = get_model_state_dict(pair.trainee.wrapped, options=FULL)
        expected = pair.oracle.state_dict()
        assert list(state) == list(expected), f"keys {list(state)} before step {step}"
        for name, value in expected.items():
            assert_same(state[name], value, f"{name} before step {step}")
        pair.step(f"step {step}")


class TestAfterForward:
    @pytest.mark.law("structure")
    @pytest.mark.world(4)
    @pytest.mark.parametrize(
        "recipe", over("ddp", "replicate", "fsdp1", "fsdp1-flat", "fully_shard")
    )
    @pytest.mark.thorough(but=["ddp"])
    def test_what_the_module_holds(self, device: Any, recipe: Recipe) -> None:
        """Forwards, backwards and steps leave all parameters in place, the optimizer's own too."""
        assert_nothing_changes(recipe, device)

    @pytest.mark.law("structure")
    @pytest.mark.world(8)
    @pytest.mark.parametrize("recipe", over("hsdp"))
    @pytest.mark.thorough
    def test_what_the_module_holds_on_three_dimensions(self, device: Any, recipe: Recipe) -> None:
        """With replicas, too, all parameters must stay in place, and nothing pile up."""
        assert_nothing_changes(recipe, device)
        assert_nothing_piles_up(recipe, device)

    @pytest.mark.law("isolation")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", over("ddp", "replicate", "fsdp1", "fully_shard"))
    @pytest.mark.thorough(but=["ddp"])
    def test_nothing_piles_up(self, device: Any, recipe: Recipe) -> None:
        """Hooks, attributes and live tensors are as many after five steps as after two."""
        assert_nothing_piles_up(recipe, device)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize(
        "recipe", over("ddp", "replicate", "fsdp1", "fsdp1-flat", "fully_shard")
    )
    # On a GPU FSDP1 computes on streams of its own; torch says what that may cost.
    @pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
    @pytest.mark.thorough(but=["fully_shard"])
    def test_the_full_state_dict(self, device: Any, recipe: Recipe) -> None:
        """Before training and within it, the full state dict is the whole model's, in its order."""
        assert_state_dict(recipe, device)
