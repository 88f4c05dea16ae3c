"""How a model comes under tensor and data parallelism: one recipe per road through torch's API.

    trainee = RECIPES["ddp"].make(MODELS["mlp"], device)
    out = trainee.wrapped(trainee.mine(x))

`make` is collective. The last dimension of the grid is tensor parallelism's, the others are data
parallelism's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.nn.parallel import DistributedDataParallel

from integration.kit.models import Block, Model

Wrap = Callable[[Model, nn.Module, DeviceMesh, torch.device], nn.Module]


@dataclass
class Trainee:
    """A model that went through a recipe."""

    model: Model
    recipe: Recipe
    wrapped: nn.Module
    """What is called, and what the optimizer takes its parameters from."""
    plain: nn.Module
    """The model's own module: the wrapped one, or within it."""
    grid: DeviceMesh
    device: torch.device
    layout: dict[str, list[Placement]]
    """How tensor parallelism holds each parameter over `tp`; replicated where it does not."""

    @cached_property
    def tp(self) -> DeviceMesh:
        """The mesh of tensor parallelism; to slice the grid takes milliseconds each time."""
        return self.grid["tp"]

    @property
    def replicas(self) -> int:
        """Over how many parts data parallelism splits a batch."""
        return self.grid.size() // self.grid.size(self.grid.ndim - 1)

    @property
    def replica(self) -> int:
        """Which part this rank takes."""
        coordinate = self.grid.get_coordinate()
        assert coordinate is not None, "a rank outside of the grid"
        number = 0
        for dim, at in enumerate(coordinate[:-1]):
            number = number * self.grid.size(dim) + at
        return number

    def mine(self, rows: torch.Tensor) -> torch.Tensor:
        """This rank's part of a batch."""
        assert len(rows) % self.replicas == 0, f"{len(rows)} rows for {self.replicas} replicas"
        return rows.chunk(self.replicas)[self.replica].to(self.device)

    def loss(self, salt: int, rows: int) -> torch.Tensor:
        """The loss over this rank's part of the batch of that salt."""
        inputs, targets = self.model.batch(salt, rows)
        return self.model.loss(self.wrapped(self.mine(inputs)), self.mine(targets))

    def no_sync(self) -> AbstractContextManager[Any]:
        """Within it a backward leaves gradients unreduced."""
        enter = getattr(self.wrapped, "no_sync", None)
        found: AbstractContextManager[Any] = enter() if enter else self._told_not_to_sync()
        return found

    @contextmanager
    def _told_not_to_sync(self) -> Iterator[None]:
        tell: Any = self.wrapped
        tell.set_requires_gradient_sync(False)
        yield
        tell.set_requires_gradient_sync(True)


@dataclass(frozen=True)
class Recipe:
    """One way to wrap a model that is under tensor parallelism already."""

    name: str
    shape: tuple[int, ...]
    """Of the grid; the world has as many ranks."""
    wrap: Wrap
    """(model, module, grid, device) -> the wrapped module."""
    shards: bool = False
    """Whether data parallelism shards the parameters too."""
    unties: bool = False
    """Whether tied weights come apart: FSDP1 flattens the same DTensor once for each name."""
    late: bool = False
    """Whether parameters take their places in the first forward; an optimizer comes after it."""

    @property
    def area(self) -> str:
        """The area that checks over this recipe exercise."""
        return "training." + self.name.partition("-")[0]

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the grid's dimensions."""
        return ("rep", "dp", "tp")[-len(self.shape) :]

    def grid(self, device: torch.device) -> DeviceMesh:
        """The mesh; all ranks of the world must call."""
        return init_device_mesh(device.type, self.shape, mesh_dim_names=self.dims)

    def make(
        self,
        model: Model,
        device: torch.device,
        *,
        grid: DeviceMesh | None = None,
        change: Callable[[nn.Module], Any] = lambda _: None,
        early: bool = False,
    ) -> Trainee:
        """Build, shard and wrap a model; `change` sees it sharded, before it is wrapped.

        `early`: come back before the first forward, whatever the recipe.
        """
        grid = self.grid(device) if grid is None else grid
        plain = model.shard(model.build().to(device), grid["tp"])
        change(plain)
        layout: dict[str, list[Placement]] = {
            name: list(param.placements) if isinstance(param, DTensor) else [Replicate()]
            for name, param in plain.named_parameters(remove_duplicate=False)
        }
        wrapped = self.wrap(model, plain, grid, device)
        trainee = Trainee(model, self, wrapped, plain, grid, device, layout)
        if self.late and not early:
            with torch.no_grad():
                trainee.loss(0, trainee.replicas)
        return trainee


def _ddp(model: Model, module: nn.Module, grid: DeviceMesh, device: torch.device) -> nn.Module:
    return DistributedDataParallel(module, device_mesh=grid["dp"])


def _replicate(
    model: Model, module: nn.Module, grid: DeviceMesh, device: torch.device
) -> nn.Module:
    wrapped: nn.Module = replicate(module, device_mesh=grid["dp"])
    return wrapped


def _fsdp1(
    model: Model,
    module: nn.Module,
    grid: DeviceMesh,
    device: torch.device,
    *,
    original: bool = True,
) -> nn.Module:
    hybrid = grid.ndim == 3
    return FullyShardedDataParallel(
        module,
        device_mesh=grid["rep", "dp"] if hybrid else grid["dp"],
        sharding_strategy=(
            ShardingStrategy.HYBRID_SHARD if hybrid else ShardingStrategy.FULL_SHARD
        ),
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        device_id=device,
        use_orig_params=original,
    )


def _fully_shard(
    model: Model, module: nn.Module, grid: DeviceMesh, device: torch.device
) -> nn.Module:
    mesh = grid["rep", "dp"] if grid.ndim == 3 else grid["dp"]
    for unit in model.units(module):
        fully_shard(unit, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


DDP = Recipe("ddp", (2, 2), _ddp)
REPLICATE = Recipe("replicate", (2, 2), _replicate, late=True)
FSDP1 = Recipe("fsdp1", (2, 2), _fsdp1, shards=True, unties=True)
FSDP1_FLAT = Recipe("fsdp1-flat", (2, 2), partial(_fsdp1, original=False), shards=True, unties=True)
HSDP = Recipe("hsdp", (2, 2, 2), _fsdp1, shards=True, unties=True)
FULLY_SHARD = Recipe("fully_shard", (2, 2), _fully_shard, shards=True)
FULLY_SHARD_HYBRID = Recipe("fully_shard-hybrid", (2, 2, 2), _fully_shard, shards=True)
RECIPES = {
    recipe.name: recipe
    for recipe in (DDP, REPLICATE, FSDP1, FSDP1_FLAT, HSDP, FULLY_SHARD, FULLY_SHARD_HYBRID)
}


GATHERS = pytest.mark.needs("functional gathers")
"""For checks in which torch gathers DTensors by itself: in the transformer's forward under tensor
parallelism, and where FSDP1 gives or takes the state of an optimizer."""


def gathering(names: Sequence[str], *some: str) -> list[Any]:
    """Names of recipes as parameters of a check; over `some` of them it is one that GATHERS."""
    return [
        pytest.param(name, marks=[*([GATHERS] if name in some else []), *_thorough(name, names)])
        for name in names
    ]


def over(*names: str) -> list[Any]:
    """These recipes as parameters of a check, each with the area that it exercises."""
    return [
        pytest.param(
            RECIPES[name],
            id=name,
            marks=[pytest.mark.exercises(RECIPES[name].area), *_thorough(name, names)],
        )
        for name in names
    ]


def _thorough(name: str, names: Sequence[str]) -> list[Any]:
    """`replicate` takes DDP's road: of the two, the one that is named second is thorough."""
    twins = [name for name in names if name in ("ddp", "replicate")]
    return [pytest.mark.thorough] if name in twins[1:] else []
