"""torch.distributed.checkpoint: saved on one mesh, loaded on another, or on none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.layouts import dtensor
from integration.kit.checkpoints import (
    FLAT,
    assert_loaded,
    dress_and_spoil,
    trainee,
    whole,
)
from integration.kit.models import MLP, TRANSFORMER, Mlp, Model, small
from integration.kit.optimizers import (
    OPTIMIZERS,
    STEPS,
    Oracle,
    assert_optimizer,
    other,
    train_wrapped,
)
from integration.kit.recipes import GATHERS, RECIPES, Trainee, gathering


def save(state: dict[str, Any], folder: Path) -> None:
    state_dict_saver.save(state, checkpoint_id=folder)


def grid(device: torch.device, *shape: int) -> DeviceMesh:
    """A mesh of the first ranks, dp by tp; all ranks of the world must call."""
    ranks = torch.arange(shape[0] * shape[1], dtype=torch.int).reshape(shape)
    return DeviceMesh(device.type, ranks, mesh_dim_names=("dp", "tp"))


def shapes(recipe: str, *each: tuple[int, int]) -> list[tuple[int, int]]:
    """Those of a recipe: over one rank FSDP1 gives up sharding, and warns."""
    return [shape for shape in each if recipe != "fsdp1" or shape[0] > 1]


def fresh(recipe: str, model: Model, device: torch.device, mesh: DeviceMesh) -> Trainee:
    """A model with none of the oracle's values, over another mesh."""
    return RECIPES[recipe].make(model, device, grid=mesh, change=dress_and_spoil)


def load_model(mine: Trainee, folder: Path, group: dist.ProcessGroup | None = None) -> None:
    state = {"model": get_model_state_dict(mine.wrapped)}
    state_dict_loader.load(state, checkpoint_id=folder, process_group=group)
    set_model_state_dict(mine.wrapped, state["model"])


def _odd() -> nn.Module:
    """An MLP of 7 hidden units and 5 outputs: no two ranks share them alike."""
    model = Mlp()
    model.up = nn.Linear(4, 7, dtype=torch.float64)
    model.beside = nn.Linear(4, 5, dtype=torch.float64)
    model.down = nn.Linear(7, 5, dtype=torch.float64)
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            param.copy_(small(*param.shape, salt=number + 40))
    return model


AT_ONCE = [name for name in FLAT if not RECIPES[name].late]
"""Recipes without a forward in them: that of tensor parallelism needs even shards."""

THOROUGH = pytest.mark.thorough
ROADS: list[Any] = [
    pytest.param("ddp", "fully_shard", marks=THOROUGH),
    pytest.param("fully_shard", "replicate", marks=THOROUGH),
    pytest.param("fsdp1", "fully_shard", marks=THOROUGH),
    ("fully_shard", "fsdp1"),
    pytest.param("replicate", "fsdp1", marks=THOROUGH),
    ("fsdp1", "ddp"),
]

ODD = replace(MLP, name="odd", build=_odd)


@pytest.mark.exercises("checkpoint.reshard")
class TestModelOntoAnotherMesh:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", gathering(FLAT))
    @pytest.mark.thorough
    def test_as_many_ranks(self, device: Any, shared: Path, recipe: str) -> None:
        """What a 2x2 mesh saved is loaded on 2x2, 4x1 and 1x4, each rank its part."""
        folder = shared / "saved"
        save({"model": get_model_state_dict(trainee(recipe, MLP, device).wrapped)}, folder)
        for shape in shapes(recipe, (2, 2), (4, 1), (1, 4)):
            mine = fresh(recipe, MLP, device, grid(device, *shape))
            load_model(mine, folder)
            assert_loaded(mine, whole(MLP), f"on {shape}")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", gathering(FLAT))
    @pytest.mark.thorough(but=["ddp"])
    def test_fewer_ranks(self, device: Any, world: Any, shared: Path, recipe: str) -> None:
        """What four ranks saved two can load, as 2x1 and as 1x2, in their own group."""
        folder = shared / "saved"
        save({"model": get_model_state_dict(trainee(recipe, MLP, device).wrapped)}, folder)
        for shape in shapes(recipe, (2, 1), (1, 2)):
            mesh = grid(device, *shape)
            if world.rank < 2:
                mine = fresh(recipe, MLP, device, mesh)
                load_model(mine, folder, mesh.get_group("dp" if shape[0] > 1 else "tp"))
                assert_loaded(mine, whole(MLP), f"on {shape}")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @GATHERS
    @pytest.mark.parametrize(("source", "target"), ROADS, ids=str)
    @pytest.mark.thorough
    def test_another_recipe(self, device: Any, shared: Path, source: str, target: str) -> None:
        """What one recipe saved another can load, tied and frozen parameters included."""
        old = trainee(source, TRANSFORMER, device)
        save({"model": get_model_state_dict(old.wrapped)}, shared / "saved")
        new = trainee(target, TRANSFORMER, device, spoilt=True)
        load_model(new, shared / "saved")
        assert_loaded(new, whole(TRANSFORMER), "loaded")
        rows, _ = TRANSFORMER.batch(3, 8)
        same = trainee(target, TRANSFORMER, device)
        with torch.no_grad():
            expected = same.wrapped(same.mine(rows))
            assert_same(new.wrapped(new.mine(rows)), expected, "the output")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", AT_ONCE)
    @pytest.mark.thorough
    def test_uneven_shards(self, device: Any, shared: Path, recipe: str) -> None:
        """Shards of different size, and empty ones, travel between 2x2, 4x1 and 1x4."""
        first = shared / "first"
        save({"model": get_model_state_dict(trainee(recipe, ODD, device).wrapped)}, first)
        for shape in shapes(recipe, (4, 1), (1, 4)):
            mine = fresh(recipe, ODD, device, grid(device, *shape))
            load_model(mine, first)
            assert_loaded(mine, whole(ODD), f"2x2 to {shape}")
            back = shared / f"{shape}"
            save({"model": get_model_state_dict(mine.wrapped)}, back)
            again = trainee(recipe, ODD, device, spoilt=True)
            load_model(again, back)
            assert_loaded(again, whole(ODD), f"{shape} to 2x2")

    @pytest.mark.law("values")
    @pytest.mark.world(8)
    @pytest.mark.thorough
    def test_hybrid(self, device: Any, shared: Path) -> None:
        """What HSDP over 2x2x2 saved fully_shard loads there, and the other way round."""
        for recipe, target in (("hsdp", "fully_shard-hybrid"), ("fully_shard-hybrid", "hsdp")):
            source = trainee(recipe, MLP, device)
            save({"model": get_model_state_dict(source.wrapped)}, shared / recipe)
            mine = trainee(target, MLP, device, spoilt=True)
            load_model(mine, shared / recipe)
            assert_loaded(mine, whole(MLP), f"{recipe} to {target}")


def blank(state: dict[str, Any]) -> dict[str, Any]:
    return {k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else v for k, v in state.items()}


@pytest.mark.exercises("checkpoint.reshard")
class TestModelOntoNoMesh:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", AT_ONCE)
    # torch warns whoever loads without a process group that it takes him to be alone.
    @pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
    @pytest.mark.thorough(but=["fully_shard"])
    def test_one_process_alone(self, device: Any, world: Any, shared: Path, recipe: str) -> None:
        """One process loads what four saved into plain tensors, or into a torch.save file."""
        folder, expected = shared / "saved", whole(ODD)
        save({"model": get_model_state_dict(trainee(recipe, ODD, device).wrapped)}, folder)
        if world.rank == 2:
            state = {"model": blank(expected)}
            state_dict_loader.load(state, checkpoint_id=folder, no_dist=True)
            for name, full in expected.items():
                assert_same(state["model"][name], full, f"loaded: {name}")
            dcp_to_torch_save(folder, shared / "one.pt")
            found = torch.load(shared / "one.pt", weights_only=True)["model"]
            assert set(found) == set(expected), f"in the file: {sorted(found)}"
            for name, full in expected.items():
                assert_same(found[name], full, f"in the file: {name}")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", ["fsdp1", "fully_shard"])
    @pytest.mark.thorough
    def test_what_was_never_sharded(
        self, device: Any, world: Any, shared: Path, recipe: str
    ) -> None:
        """A full state dict that rank 0 wrote with torch.save reaches a sharded model."""
        if world.rank == 0:
            torch.save(whole(MLP), shared / "full.pt")
        dist.barrier()
        mine = trainee(recipe, MLP, device, spoilt=True)
        state = torch.load(shared / "full.pt") if world.rank == 0 else {}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(mine.wrapped, state, options=options)
        assert_loaded(mine, whole(MLP), "from the file")


OPTIMIZER_ROADS: list[Any] = [
    ("fully_shard", "fully_shard", (4, 1)),
    pytest.param("fully_shard", "fully_shard", (1, 4), marks=THOROUGH),
    pytest.param("fsdp1", "fully_shard", (1, 4), marks=[GATHERS, THOROUGH]),
    pytest.param("fsdp1", "fully_shard", (2, 2), marks=[GATHERS, THOROUGH]),
    pytest.param("fsdp1", "fsdp1", (4, 1), marks=GATHERS),
    ("fully_shard", "fsdp1", (4, 1)),
]


@pytest.mark.exercises("checkpoint.reshard")
class TestOptimizerOntoAnotherMesh:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize(("source", "target", "shape"), OPTIMIZER_ROADS, ids=str)
    @pytest.mark.thorough
    def test_as_many_ranks(
        self, device: Any, shared: Path, source: str, target: str, shape: tuple[int, int]
    ) -> None:
        """Model and optimizer saved on 2x2 are loaded on another mesh, and train on from there."""
        folder = shared / "saved"
        old = RECIPES[source].make(MLP, device)
        optimizer = OPTIMIZERS["sgd"](old.wrapped)
        train_wrapped(old, optimizer, 0, STEPS)
        model_state, optimizer_state = get_state_dict(old.wrapped, optimizer)
        save({"model": model_state, "optimizer": optimizer_state}, folder)

        new = RECIPES[target].make(MLP, device, grid=grid(device, *shape), change=_zeroed)
        optimizer = other("sgd", new.wrapped)
        model_state, optimizer_state = get_state_dict(new.wrapped, optimizer)
        state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
        state_dict_loader.load(state, checkpoint_id=folder)
        set_state_dict(
            new.wrapped,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        oracle, sharded = Oracle("sgd"), StateDictOptions()
        model_state, optimizer_state = get_state_dict(new.wrapped, optimizer)
        assert_optimizer(optimizer_state, oracle, sharded, device, "loaded")
        train_wrapped(new, optimizer, STEPS, STEPS + 1)
        oracle.step(STEPS, STEPS + 1)
        _, optimizer_state = get_state_dict(new.wrapped, optimizer)
        assert_optimizer(optimizer_state, oracle, sharded, device, "a step later")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("target", [(4, 1), (1, 4), (2, 1)], ids=str)
    @pytest.mark.thorough(but=["(1, 4)"])
    def test_uneven_shards(
        self, device: Any, world: Any, shared: Path, target: tuple[int, int]
    ) -> None:
        """Uneven shards of moments reach another mesh, and one of half the ranks."""
        folder = shared / "saved"
        old = RECIPES["fully_shard"].make(ODD, device)
        optimizer = _stepped(old.wrapped)
        model_state, optimizer_state = get_state_dict(old.wrapped, optimizer)
        save({"model": model_state, "optimizer": optimizer_state}, folder)
        oracle = _odd()
        moments = _stepped(oracle)
        mesh = grid(device, *target)
        if world.rank >= mesh.size():
            return
        group = mesh.get_group("dp") if target == (2, 1) else None
        new = RECIPES["fully_shard"].make(ODD, device, grid=mesh, change=_zeroed)
        optimizer = torch.optim.SGD(new.wrapped.parameters(), 1.0, momentum=0.25, foreach=False)
        model_state, optimizer_state = get_state_dict(new.wrapped, optimizer)
        state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
        state_dict_loader.load(state, checkpoint_id=folder, process_group=group)
        set_state_dict(
            new.wrapped,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        params = dict(new.wrapped.named_parameters())
        for name, param in oracle.named_parameters():
            mine: Any = params[name]
            for kind, got, full in (
                ("value", mine, param),
                (
                    "moment",
                    optimizer.state[mine]["momentum_buffer"],
                    moments.state[param]["momentum_buffer"],
                ),
            ):
                expected = dtensor(full.detach(), mine.device_mesh, mine.placements)
                assert isinstance(got, DTensor), f"{kind} of {name}: a {type(got).__name__}"
                assert_same(got._local_tensor, expected._local_tensor, f"{kind} of {name}")
        assert optimizer.param_groups[0]["momentum"] == 0.5


def _zeroed(module: nn.Module) -> None:
    with torch.no_grad():
        for param in module.parameters():
            param.zero_()


def _stepped(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer after a step on made-up gradients, sharded as the parameters are."""
    made = torch.optim.SGD(model.parameters(), 0.5, momentum=0.5, foreach=False)
    for number, param in enumerate(model.parameters()):
        grad = numbers(*param.shape, salt=number, dtype=torch.float64, device=param.device)
        if isinstance(param, DTensor):
            param.grad = dtensor(grad, param.device_mesh, param.placements)
        else:
            param.grad = grad
    made.step()
    made.zero_grad()
    return made
