"""Every way to call DDP and `replicate` on a tensor-parallel model, each beside the whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ddp
from torch.nn.parallel import DistributedDataParallel

from conformance.kit.agree import assert_raises_everywhere
from integration.kit.models import MLP, Model
from integration.kit.oracle import OPTIMIZERS, Pair, Regime
from integration.kit.recipes import DDP, REPLICATE, Recipe, over

Wrap = Callable[[nn.Module, DeviceMesh], nn.Module]


def transformed(wrap: Wrap) -> Wrap:
    def both(module: nn.Module, dp: DeviceMesh) -> nn.Module:
        # By its module: the name here is bound before the subject is installed.
        ddp._pre_dp_module_transform(module)
        return wrap(module, dp)

    return both


def ddp_by_mesh(module: nn.Module, dp: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(module, device_mesh=dp)


def ddp_by_group(module: nn.Module, dp: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(module, process_group=dp.get_group())


def ddp_by_neither(module: nn.Module, dp: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(module)


def replicate_by_mesh(module: nn.Module, dp: DeviceMesh) -> nn.Module:
    wrapped: nn.Module = replicate(module, device_mesh=dp)
    return wrapped


def replicate_by_group(module: nn.Module, dp: DeviceMesh) -> nn.Module:
    wrapped: nn.Module = replicate(module, process_group=dp.get_group())
    return wrapped


def replicate_by_neither(module: nn.Module, dp: DeviceMesh) -> nn.Module:
    wrapped: nn.Module = replicate(module)
    return wrapped


def static(module: nn.Module, dp: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(
        module, device_mesh=dp, static_graph=True, gradient_as_bucket_view=True
    )


WAYS: dict[str, tuple[Recipe, Wrap]] = {
    "ddp-mesh": (DDP, ddp_by_mesh),
    "ddp-static": (DDP, static),
    "ddp-group": (DDP, transformed(ddp_by_group)),
    "replicate-mesh": (REPLICATE, replicate_by_mesh),
    "replicate-mesh-transformed": (REPLICATE, transformed(replicate_by_mesh)),
    "replicate-group": (REPLICATE, replicate_by_group),
    "replicate-group-transformed": (REPLICATE, transformed(replicate_by_group)),
}
WRONG: dict[str, tuple[Recipe, Wrap]] = {
    "ddp": (DDP, transformed(ddp_by_neither)),
    "replicate": (REPLICATE, replicate_by_neither),
    "replicate-transformed": (REPLICATE, transformed(replicate_by_neither)),
}
OPTIMIZER = ("before the wrap", "after the wrap", "after a forward")
MOMENTS = [
    OPTIMIZER[0],
    pytest.param(OPTIMIZER[1], marks=pytest.mark.thorough),
    OPTIMIZER[2],
]


def recipe_of(recipe: Recipe, wrap: Wrap) -> Recipe:
    def made(model: Model, module: nn.Module, grid: DeviceMesh, _: torch.device) -> nn.Module:
        return wrap(module, grid["dp"])

    return replace(recipe, wrap=made)


def ways(some: dict[str, tuple[Recipe, Wrap]]) -> list[Any]:
    """These ways as parameters of a check, each with the area that it exercises."""
    return [
        pytest.param(recipe_of(recipe, wrap), id=name, marks=pytest.mark.exercises(recipe.area))
        for name, (recipe, wrap) in some.items()
    ]


class TestWrapping:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("moment", MOMENTS)
    @pytest.mark.parametrize("recipe", ways(WAYS))
    @pytest.mark.thorough(
        but=[
            "ddp-group-before the wrap",
            "replicate-mesh-transformed-after a forward",
        ]
    )
    def test_steps(self, device: Any, recipe: Recipe, moment: str) -> None:
        """However it is wrapped, and whenever its optimizer was made, the model must train."""
        early: list[torch.optim.Optimizer] = []

        def make_early(module: nn.Module) -> None:
            if moment == OPTIMIZER[0]:
                early.append(OPTIMIZERS["sgd"](module))

        trainee = recipe.make(MLP, device, change=make_early, early=moment != OPTIMIZER[2])
        if moment == OPTIMIZER[2]:
            with torch.no_grad():
                trainee.loss(0, trainee.replicas)
        pair = Pair(trainee)
        if early:
            (pair.ours,) = early
        pair.train(Regime(steps=3, evaluate=True), moment)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", ways(WRONG))
    @pytest.mark.thorough(but=["replicate-transformed"])
    def test_a_group_that_would_mix_shards(self, device: Any, world: Any, recipe: Recipe) -> None:
        """Data parallelism over ranks of other shards must be refused by name, on every rank."""
        trainee = recipe.make(MLP, device, early=True)
        assert_raises_everywhere(
            world, lambda: trainee.loss(0, trainee.replicas), "parameter 'weight' of Linear"
        )

    @pytest.mark.exercises("training.replicate")
    @pytest.mark.law("symmetry")
    @pytest.mark.world(4)
    def test_a_root_with_a_weight_of_its_own(self, device: Any, world: Any) -> None:
        """Where replicate comes too late for the root's own DTensor it must say what to do."""

        def give_a_weight(module: nn.Module) -> None:
            up: Any = module.get_parameter("up.weight")
            assert isinstance(up, DTensor)
            full = torch.ones(4, dtype=torch.float64)
            module.gain = nn.Parameter(distribute_tensor(full, up.device_mesh, [Shard(0)]))

        for wrap in (replicate_by_group, transformed(replicate_by_group)):
            recipe = recipe_of(REPLICATE, wrap)
            trainee = recipe.make(MLP, device, change=give_a_weight, early=True)
            if wrap is replicate_by_group:
                assert_raises_everywhere(
                    world,
                    lambda t=trainee: t.loss(0, t.replicas),  # type: ignore[misc]
                    "'gain'",
                    "_pre_dp_module_transform",
                )
            else:
                assert trainee.loss(0, trainee.replicas).requires_grad, "the advice does not help"

    @pytest.mark.exercises("training.ddp")
    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    @pytest.mark.thorough
    def test_shards_that_ddp_ignores(self, device: Any) -> None:
        """Over all ranks, DDP that is told to ignore the shards must be let alone."""

        def ignoring(module: nn.Module, dp: DeviceMesh) -> nn.Module:
            shards = [n for n, p in module.named_parameters() if isinstance(p, DTensor)]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, shards)
            return transformed(ddp_by_neither)(module, dp)

        trainee = recipe_of(DDP, ignoring).make(MLP, device)
        trainee.loss(0, trainee.replicas).backward()
        assert not [n for n, p in trainee.plain.named_parameters() if p.grad is None]

    # Dynamo asks each tensor for its .grad, and makes fake DTensors from what it has not detached.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    @pytest.mark.filterwarnings("ignore:To construct DTensor from torch.Tensor")
    @pytest.mark.law("compatibility")
    @pytest.mark.world(4, limit=100)  # four ranks compile
    @pytest.mark.parametrize("recipe", over("ddp", "replicate"))
    @pytest.mark.thorough
    def test_compiled_blocks(self, device: Any, recipe: Recipe) -> None:
        """Blocks compiled with fullgraph=True before they are wrapped must train."""

        def compile_blocks(module: nn.Module) -> None:
            for name in ("up", "down"):
                module.get_submodule(name).compile(fullgraph=True, backend="eager")

        pair = Pair(recipe.make(MLP, device, change=compile_blocks))
        pair.train(Regime(steps=1), "compiled")
