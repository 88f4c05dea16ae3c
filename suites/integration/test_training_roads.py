"""What trainers do besides plain steps, each beside the same on the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from conformance.kit.agree import attempt
from conformance.kit.compare import assert_same
from integration.kit.models import MLP, TIED, TRANSFORMER, Batch
from integration.kit.oracle import Pair, Regime, plain_name
from integration.kit.recipes import DDP, FSDP1, FULLY_SHARD, GATHERS, Recipe, over


def _single(salt: int, rows: int) -> Batch:
    inputs, targets = MLP.batch(salt, rows)
    return inputs.to(torch.float32), targets.to(torch.float32)


def to_single(module: nn.Module) -> None:
    module.to(torch.float32)


SINGLE = replace(MLP, batch=_single)
"""The MLP in float32, once `to_single` has moved it; two steps stay exact."""


class TestAccumulation:
    @pytest.mark.law("autograd")
    @pytest.mark.world(4)
    @pytest.mark.parametrize(
        "recipe", over("ddp", "replicate", "fsdp1", "fsdp1-flat", "fully_shard")
    )
    @pytest.mark.thorough
    def test_without_synchronisation(self, device: Any, recipe: Recipe) -> None:
        """Backwards that do not synchronise, then one that does, give the mean of all replicas."""
        pair = Pair(recipe.make(MLP, device))
        # Where it fails, FSDP1 leaves tensors behind that a traceback could not print: SIGSEGV.
        error = attempt(lambda: pair.train(Regime(steps=3, accumulate=4, no_sync=True), "no_sync"))
        assert error is None, f"{type(error).__name__}: {error}"


class TestClipping:
    @pytest.mark.exercises("training.fully_shard")
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @GATHERS
    @pytest.mark.thorough
    def test_the_norm_of_dtensors(self, device: Any) -> None:
        """Under fully_shard torch's own clip_grad_norm_ takes the norm over all shards."""
        pair, most = Pair(FULLY_SHARD.make(TRANSFORMER, device)), 2**-4
        pair.backward("clipped")
        norm: Any = nn.utils.clip_grad_norm_(pair.trainee.wrapped.parameters(), most)
        expected = nn.utils.clip_grad_norm_(pair.oracle.parameters(), most)
        assert expected > most, "nothing to clip"
        pair.agree(norm.full_tensor(), expected, "norm")
        pair.update("clipped")

    @pytest.mark.exercises("training.fsdp1")
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_the_norm_that_fsdp1_takes(self, device: Any) -> None:
        """FSDP1's clip_grad_norm_ takes the norm over all shards, those of TP included."""
        pair = Pair(FSDP1.make(SINGLE, device, change=to_single), change=to_single)
        pair.backward("clipped")
        model: Any = pair.trainee.wrapped
        norm = model.clip_grad_norm_(1.0)
        expected = nn.utils.clip_grad_norm_(pair.oracle.parameters(), 1.0)
        assert expected > 1, "nothing to clip"
        # A root of a sum in float32, which is all that FSDP1 offers.
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)


class TestTies:
    @pytest.mark.law("structure")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", over("ddp", "replicate", "fsdp1", "fully_shard"))
    @pytest.mark.thorough(but=["fsdp1"])
    def test_tied_weights_stay_tied(self, device: Any, recipe: Recipe) -> None:
        """Two layers that share their Parameters share them still, and these train as one."""
        pair = Pair(recipe.make(TIED, device))
        names = [plain_name(name) for name, _ in pair.trainee.plain.named_parameters()]
        assert "twin.weight" not in names, f"the twin has a weight of its own: {names}"
        pair.train(Regime(steps=2, evaluate=True), "tied")


class TestRoads:
    @pytest.mark.law("autograd")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", over("ddp", "fully_shard"))
    @GATHERS
    @pytest.mark.thorough(but=["ddp"])
    def test_activation_checkpointing(self, device: Any, recipe: Recipe) -> None:
        """Blocks whose forward is computed again in the backward train like others."""

        def recompute(module: nn.Module) -> None:
            vars(module)["recompute"] = True

        pair = Pair(recipe.make(TRANSFORMER, device, change=recompute))
        pair.train(Regime(steps=2, evaluate=True), "recomputed")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", over("ddp", "replicate", "fsdp1", "fully_shard"))
    @pytest.mark.thorough
    def test_another_dtype(self, device: Any, recipe: Recipe) -> None:
        """A model that is moved to another dtype before it is wrapped trains in that dtype."""
        trainee = recipe.make(SINGLE, device, change=to_single)
        Pair(trainee, change=to_single).train(Regime(steps=2), "float32")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", over("ddp", "replicate", "fsdp1", "fully_shard"))
    @pytest.mark.thorough(but=["ddp"])
    def test_a_failed_forward(self, device: Any, recipe: Recipe) -> None:
        """After a forward that failed halfway, training goes on as if it had not been."""
        pair = Pair(recipe.make(MLP, device))
        for step in range(3):
            halfway = pair.trainee.plain.get_submodule("down")
            handle = halfway.register_forward_pre_hook(lambda *_: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                pair.trainee.loss(0, 2 * pair.trainee.replicas)
            handle.remove()
            pair.step(f"step {step}, after a failure")

    @pytest.mark.law("structure")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", over("replicate", "ddp", "fsdp1", "fully_shard"))
    @pytest.mark.thorough(but=["replicate"])
    def test_an_early_optimizer(self, device: Any, recipe: Recipe) -> None:
        """An optimizer that is made right after wrapping, before any forward, trains the model."""
        pair = Pair(recipe.make(MLP, device, early=True))
        pair.train(Regime(steps=2), "an early optimizer")


@pytest.mark.exercises("training.ddp")
class TestDdp:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_a_second_wrap(self, device: Any) -> None:
        """A module that is taken out of DDP and wrapped again trains on with its optimizer."""
        pair = Pair(DDP.make(MLP, device))
        pair.step("wrapped once")
        trainee = pair.trainee
        first = trainee.wrapped
        trainee.wrapped = DDP.wrap(MLP, trainee.plain, trainee.grid, device)
        pair.step("wrapped twice")
        del first
        pair.step("the first wrapper gone")
        assert trainee.wrapped(trainee.mine(MLP.batch(0, 2)[0])).requires_grad

    # Dynamo asks each tensor for its .grad, and makes fake DTensors from what it has not detached.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    @pytest.mark.filterwarnings("ignore:To construct DTensor from torch.Tensor")
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_compiled(self, device: Any) -> None:
        """Compiled without a backend that changes numbers, the wrapped model trains the same."""
        pair = Pair(DDP.make(MLP, device))
        compiled: Any = torch.compile(pair.trainee.wrapped, backend="eager")
        pair.trainee.wrapped = compiled
        pair.train(Regime(steps=2), "compiled")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.thorough
    def test_an_average_from_before_wrapping(self, device: Any) -> None:
        """A copy from before wrapping follows through state dicts, and computes the average."""
        copies: list[nn.Module] = []
        pair = Pair(
            DDP.make(MLP, device, change=lambda module: copies.append(copy.deepcopy(module)))
        )
        (average,), whole = copies, copy.deepcopy(pair.oracle)

        def follow(mean: nn.Module, model: nn.Module) -> None:
            with torch.no_grad():
                now = model.state_dict()
                for name, value in mean.state_dict().items():
                    value.mul_(0.5).add_(now[name], alpha=0.5)

        self.average(pair, average, whole, follow)

    @pytest.mark.law("isolation")
    @pytest.mark.world(4)
    @pytest.mark.thorough
    def test_an_average_from_after_wrapping(self, device: Any) -> None:
        """A copy of the wrapped module, before or after its first step, computes the average."""

        def follow(mean: nn.Module, model: nn.Module) -> None:
            with torch.no_grad():
                for value, now in zip(mean.parameters(), model.parameters(), strict=True):
                    value.mul_(0.5).add_(now, alpha=0.5)

        grid = DDP.grid(device)
        for trained in (0, 1):
            pair = Pair(DDP.make(MLP, device, grid=grid))
            for step in range(trained):
                pair.step(f"step {step}")
            average, whole = copy.deepcopy(pair.trainee.plain), copy.deepcopy(pair.oracle)
            self.average(pair, average, whole, follow)

    def average(
        self, pair: Pair, average: nn.Module, whole: nn.Module, follow: Callable[..., None]
    ) -> None:
        inputs, _ = MLP.batch(900, 4)
        inputs = inputs.to(pair.trainee.device)
        for step in range(3):
            pair.step(f"beside the average, step {step}")
            follow(average, pair.trainee.plain)
            follow(whole, pair.oracle)
            with torch.no_grad():
                assert_same(average(inputs), whole(inputs), f"average after step {step}")
