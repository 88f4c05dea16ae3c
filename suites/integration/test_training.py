"""Training under tensor and data parallelism, beside the same training of the whole model.

Each check trains a model that went through a recipe, and the whole one in the same process, and
compares after every backward and every step: loss, all gradients, all parameters, all of the
optimizer's state.
"""

from __future__ import annotations

from typing import Any

import pytest

from integration.kit.models import MLP, TRANSFORMER, UNTIED
from integration.kit.oracle import Pair, Regime
from integration.kit.recipes import GATHERS, Recipe, over

REGIMES = {
    "plain": ("sgd", Regime()),
    "evaluated, clipped": ("sgd", Regime(evaluate=True, clip=0.5)),
    "accumulated": ("sgd", Regime(accumulate=2)),
    "AdamW": ("adamw", Regime(evaluate=True, clip=0.5, accumulate=2)),
}


def train_mlp(recipe: Recipe, device: Any, grid: Any, *regimes: str) -> None:
    for what in regimes:
        optimizer, regime = REGIMES[what]
        Pair(recipe.make(MLP, device, grid=grid), optimizer).train(regime, what)


def train_transformer(recipe: Recipe, device: Any, grid: Any, *optimizers: str) -> None:
    model = UNTIED if recipe.unties else TRANSFORMER
    for optimizer in optimizers:
        pair = Pair(recipe.make(model, device, grid=grid), optimizer)
        pair.train(Regime(evaluate=optimizer == "adamw", clip=2**-6), optimizer)


class TestParity:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize(
        "recipe", over("ddp", "replicate", "fsdp1", "fsdp1-flat", "fully_shard")
    )
    @pytest.mark.thorough(but=["ddp"])
    def test_mlp(self, device: Any, recipe: Recipe) -> None:
        """An MLP of whole numbers trains to the bit like the whole one with SGD, however it is fed.

        With AdamW it does within rounding.
        """
        train_mlp(recipe, device, recipe.grid(device), *REGIMES)

    @pytest.mark.law("values")
    @pytest.mark.world(4, limit=60)
    @pytest.mark.parametrize(
        "recipe", over("ddp", "replicate", "fsdp1", "fsdp1-flat", "fully_shard")
    )
    @GATHERS
    @pytest.mark.thorough
    def test_transformer(self, device: Any, recipe: Recipe) -> None:
        """A transformer with a frozen block, tied where the recipe allows, trains like the whole.

        Its first forward is an evaluation; so is the one after each step.
        """
        train_transformer(recipe, device, recipe.grid(device), "adamw", "sgd")

    @pytest.mark.law("values")
    @pytest.mark.world(8, collective=20, limit=100)
    @pytest.mark.parametrize("recipe", over("hsdp", "fully_shard-hybrid"))
    @GATHERS
    def test_three_dimensions(self, device: Any, recipe: Recipe) -> None:
        """With replicas, on a 3-D mesh, MLP and transformer must train like the whole ones."""
        grid = recipe.grid(device)
        train_mlp(recipe, device, grid, "evaluated, clipped", "AdamW")
        train_transformer(recipe, device, grid, "adamw")
