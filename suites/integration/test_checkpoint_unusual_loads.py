"""Loading what does not fit, models on meta, frozen bases with adapters, meshes without rank 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from conformance.kit.agree import attempt, exchange
from conformance.kit.compare import local, shares_memory
from conformance.kit.refusals import MISFIT, MISSING, flaw
from integration.kit.checkpoints import (
    FLAT,
    assert_full,
    assert_loaded,
    assert_sharded,
    dress,
    dress_and_spoil,
    given,
    said,
    spoil,
    trainee,
    whole,
)
from integration.kit.models import MLP, TRANSFORMER, Mlp, Model, Transformer, small
from integration.kit.optimizers import STEPS, Oracle, assert_optimizer, other, sgd, train_wrapped
from integration.kit.recipes import RECIPES, gathering

SHARDED = StateDictOptions()
FULL = StateDictOptions(full_state_dict=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
WAYS = {"sharded": SHARDED, "full": FULL, "broadcast": BROADCAST}
KEY = "up.weight"


def lacking(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != KEY}


def misshapen(state: dict[str, Any]) -> dict[str, Any]:
    """With a tensor of a row too many."""
    wrong = torch.zeros(9, 4, dtype=torch.float64, device=local(state[KEY]).device)
    held = state[KEY]
    if isinstance(held, DTensor):
        wrong = DTensor.from_local(wrong[:3], held.device_mesh, held.placements, run_check=False)
    return {name: wrong if name == KEY else value for name, value in state.items()}


def surplus(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "stray.weight": torch.ones(3, device=local(state[KEY]).device)}


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "missing": (lacking, KEY),
    "extra": (surplus, "stray.weight"),
    "another shape": (misshapen, KEY),
}
"""Name to what it makes of a good state dict, and the key that an error has to name."""


def source(recipe: str, device: torch.device, options: StateDictOptions) -> dict[str, Any]:
    """A good state dict for a set with these options, the same on every rank that has one."""
    if options.full_state_dict:
        return whole(MLP)
    return get_model_state_dict(trainee(recipe, MLP, device).wrapped)


def load(model: nn.Module, state: dict[str, Any], options: StateDictOptions) -> Any:
    return set_model_state_dict(model, given(state, options), options=options)


def assert_named(
    world: Any, error: BaseException | None, kind: str, ranks: range, name: str = "outcome"
) -> None:
    """These ranks refused what is broken in this way, naming the key, and all came back."""
    kinds = MISFIT if kind == "another shape" else MISSING
    told = exchange(world, flaw(error, (BROKEN[kind][1],), kinds), name)
    for rank in ranks:
        assert not told[rank], f"rank {rank}: {told[rank]}"


@pytest.mark.exercises("checkpoint.unusual_loads")
class TestWhatDoesNotFit:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(4, collective=8, limit=25)
    @pytest.mark.parametrize("recipe", ["ddp", "fully_shard"])
    @pytest.mark.parametrize("way", list(WAYS))
    @pytest.mark.parametrize("kind", list(BROKEN))
    @pytest.mark.thorough(
        but=[
            "missing-sharded-fully_shard",
            "another shape-broadcast-fully_shard",
        ]
    )
    def test_strict(self, device: Any, world: Any, recipe: str, way: str, kind: str) -> None:
        """Every rank raises and names the key; then a good state dict can still be loaded."""
        options, (broken, _) = WAYS[way], BROKEN[kind]
        mine = trainee(recipe, MLP, device, spoilt=True)
        good = source(recipe, device, options)
        error = attempt(lambda: load(mine.wrapped, broken(good), options))
        assert_named(world, error, kind, range(world.size))
        load(mine.wrapped, good, options)
        assert_loaded(mine, whole(MLP), "a good one after the error")

    @pytest.mark.law("all-or-nothing")
    @pytest.mark.world(4, collective=8, limit=25)
    @pytest.mark.parametrize("recipe", ["ddp", "fully_shard"])
    @pytest.mark.parametrize("way", ["full", "broadcast"])
    @pytest.mark.thorough
    def test_another_shape_changes_nothing(
        self, device: Any, world: Any, recipe: str, way: str
    ) -> None:
        """A full tensor of another shape is refused, strict or not, and the model stays."""
        for strict in (True, False):
            options = replace(WAYS[way], strict=strict)
            mine = trainee(recipe, MLP, device)
            changed = {n: t + 1 if t.is_floating_point() else t for n, t in whole(MLP).items()}
            error = attempt(partial(load, mine.wrapped, misshapen(changed), options))
            assert_named(world, error, "another shape", range(world.size), f"strict {strict}")
            assert_loaded(mine, whole(MLP), f"{strict=}: after the error")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(4, collective=8, limit=25)
    @pytest.mark.parametrize("recipe", ["ddp", "fully_shard"])
    @pytest.mark.parametrize("kind", list(BROKEN))
    @pytest.mark.thorough(but=["another shape-fully_shard"])
    def test_on_one_rank(self, device: Any, world: Any, recipe: str, kind: str) -> None:
        """A full state dict that is broken on one rank: that rank raises, and nobody waits."""
        broken, _ = BROKEN[kind]
        mine = trainee(recipe, MLP, device, spoilt=True)
        state = whole(MLP) if world.rank != 1 else broken(whole(MLP))
        error = attempt(lambda: load(mine.wrapped, state, FULL))
        assert_named(world, error, kind, range(1, 2))
        load(mine.wrapped, whole(MLP), FULL)
        assert_loaded(mine, whole(MLP), "a good one after the error")

    @pytest.mark.law("structure")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", gathering(["ddp", "replicate", "fully_shard"]))
    @pytest.mark.thorough
    def test_lenient(self, device: Any, world: Any, recipe: str) -> None:
        """Without strict what is missing keeps its value, what is too much is left out."""
        for way, options in WAYS.items():
            lenient, what = replace(options, strict=False), f"{way}, strict=False"
            mine = trainee(recipe, MLP, device, spoilt=True)
            good = source(recipe, device, options)
            load(mine.wrapped, lacking(surplus(good)), lenient)
            expected = whole(MLP)
            expected[KEY] = torch.zeros_like(expected[KEY])
            assert_loaded(mine, expected, what)
            load(mine.wrapped, good, options)
            assert_loaded(mine, whole(MLP), f"{what}, then a good one")


@pytest.mark.exercises("checkpoint.unusual_loads")
class TestModelsOnMeta:
    @pytest.mark.law("structure")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("prepared", [False, True], ids=["straight", "to_empty"])
    @pytest.mark.parametrize("wrapped", [False, True], ids=["tp", "fully_shard"])
    # torch's own set_model_state_dict asks for it where all is on meta, and warns of that.
    @pytest.mark.filterwarnings("ignore:`_get_pg_default_device` will be deprecated")
    @pytest.mark.filterwarnings("ignore:Multiple backends are registered")
    @pytest.mark.thorough
    def test_they_materialise(self, device: Any, world: Any, prepared: bool, wrapped: bool) -> None:
        """A bf16 model on meta takes a float64 state dict: dtype, ties and frozenness stay."""
        # Where all is on meta torch asks the group for a device; Gloo's is the CPU.
        chosen = torch.device("cpu") if world.backend == "gloo" else device
        landing = device if prepared else chosen
        recipe, meta = RECIPES["fully_shard"], torch.device("meta")
        grid = recipe.grid(device)
        full = {name: value.detach() for name, value in TRANSFORMER.build().state_dict().items()}
        expected = {name: value.to(torch.bfloat16) for name, value in full.items()}
        for what in ("full", "broadcast"):
            model: Any = TRANSFORMER.shard(TRANSFORMER.build().to(meta), grid["tp"])
            model.to(torch.bfloat16).tie()
            if wrapped:
                recipe.wrap(TRANSFORMER, model, grid, device)
            trains = {name: p.requires_grad for name, p in model.named_parameters()}
            if prepared:
                model.to_empty(device=device)
                model.tie()  # to_empty takes tied parameters apart
            load(model, full, WAYS[what])
            assert_sharded(get_model_state_dict(model), expected, landing, what)
            assert isinstance(model, Transformer)
            tied = model.head.weight is model.embed.weight
            assert tied or not prepared, f"{what}: the tied parameters came apart"
            assert shares_memory(model.head.weight, model.embed.weight), f"{what}: came apart"
            after = {name: p.requires_grad for name, p in model.named_parameters()}
            assert {n: after[n] for n in trains} == trains, f"{what}: requires_grad {after}"
            assert all(isinstance(p, nn.Parameter) for p in model.parameters()), what


class Adapted(Mlp):
    """The MLP frozen, with a low-rank adapter beside its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.a = nn.Linear(4, 2, bias=False, dtype=torch.float64)
        self.b = nn.Linear(2, 8, bias=False, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x) + self.b(self.a(x))
        out: torch.Tensor = self.down(hidden.relu()) + self.beside(x)
        return out


def _adapted() -> nn.Module:
    model = Adapted()
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            param.copy_(small(*param.shape, salt=number))
    return model


def _shard_adapted(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    parallelize_module(model, mesh, {"b": ColwiseParallel()})
    return MLP.shard(model, mesh)


ADAPTED: Model = replace(MLP, name="adapted", build=_adapted, shard=_shard_adapted)


@pytest.mark.exercises("checkpoint.unusual_loads")
class TestAdapters:
    @pytest.mark.law("structure")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", gathering(FLAT))
    @pytest.mark.thorough(but=["fsdp1"])
    def test_the_adapters_alone(self, device: Any, recipe: str) -> None:
        """ignore_frozen_params saves the adapters alone; loaded, they leave another base alone."""
        mine = trainee(recipe, ADAPTED, device)
        new = trainee(recipe, ADAPTED, device, spoilt=True)
        adapters = whole(ADAPTED, trainable=True)
        assert "a.weight" in adapters
        assert "up.weight" not in adapters
        expected = {n: adapters.get(n, torch.zeros_like(t)) for n, t in whole(ADAPTED).items()}
        for way in WAYS.values():
            options = replace(way, ignore_frozen_params=True, strict=False)
            state = get_model_state_dict(mine.wrapped, options=options)
            check = assert_full if options.full_state_dict else assert_sharded
            check(state, adapters, device, said(options))
            spoil(new.wrapped)
            load(new.wrapped, state, options)
            assert_loaded(new, expected, said(options))


@pytest.mark.exercises("checkpoint.unusual_loads")
class TestMeshesWithoutRankZero:
    @pytest.mark.law("group")
    @pytest.mark.world(4, collective=8, limit=25)
    @pytest.mark.parametrize("recipe", gathering(FLAT))
    @pytest.mark.thorough(but=["fully_shard"])
    def test_only_its_ranks_call(self, device: Any, world: Any, shared: Path, recipe: str) -> None:
        """On a mesh of ranks 1 and 3 these alone get, set and save state dicts."""
        for shape in [(1, 2), (2, 1)] if recipe != "fsdp1" else [(2, 1)]:
            table = torch.tensor([1, 3], dtype=torch.int).reshape(shape)
            grid = DeviceMesh(device.type, table, mesh_dim_names=("dp", "tp"))
            if world.rank not in (1, 3):
                continue
            made = RECIPES[recipe].make
            mine = made(MLP, device, grid=grid, change=dress)
            expected, what = whole(MLP), f"{shape}"
            sharded = get_model_state_dict(mine.wrapped)
            assert_sharded(sharded, expected, device, what)
            state = get_model_state_dict(mine.wrapped, options=FULL)
            assert_full(state, expected, device, what)

            folder = shared / what
            group = grid.get_group("tp" if shape == (1, 2) else "dp")
            state_dict_saver.save({"model": sharded}, checkpoint_id=folder, process_group=group)
            new = made(MLP, device, grid=grid, change=dress_and_spoil)
            found = {"model": get_model_state_dict(new.wrapped)}
            state_dict_loader.load(found, checkpoint_id=folder, process_group=group)
            set_model_state_dict(new.wrapped, found["model"])
            assert_loaded(new, expected, f"{what}, saved and loaded")
            spoil(new.wrapped)
            set_model_state_dict(new.wrapped, state, options=FULL)
            assert_loaded(new, expected, f"{what}, full")

    @pytest.mark.law("group")
    @pytest.mark.world(4, collective=8, limit=25)
    @pytest.mark.parametrize("recipe", gathering(["fsdp1", "fully_shard"], "fsdp1"))
    @pytest.mark.thorough(but=["fsdp1"])
    def test_the_optimizer(self, device: Any, world: Any, recipe: str) -> None:
        """On a mesh of ranks 1 and 3 these alone must get, set and save the optimizer's state."""
        table = torch.tensor([[1], [3]], dtype=torch.int)
        grid = DeviceMesh(device.type, table, mesh_dim_names=("dp", "tp"))
        if world.rank not in (1, 3):
            return
        mine, oracle = RECIPES[recipe].make(MLP, device, grid=grid), Oracle("sgd")
        optimizer = sgd(mine.wrapped)
        train_wrapped(mine, optimizer, 0, STEPS)
        for options in (SHARDED, FULL):
            state = get_optimizer_state_dict(mine.wrapped, optimizer, options=options)
            assert_optimizer(state, oracle, options, device, said(options))
            fresh = other("sgd", mine.wrapped)
            set_optimizer_state_dict(mine.wrapped, fresh, state, options=options)
            state = get_optimizer_state_dict(mine.wrapped, fresh)
            assert_optimizer(state, oracle, SHARDED, device, f"{said(options)}, loaded")
