"""dcp.async_save: what is saved is the moment of the save, while training goes on."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import (
    BlockingAsyncStager,
    DefaultStager,
    StagingOptions,
)
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.optim import Optimizer

from conformance.kit.compare import assert_same, local
from integration.kit.checkpoints import FLAT
from integration.kit.models import MLP
from integration.kit.optimizers import STEPS, Oracle, sgd, train_wrapped
from integration.kit.recipes import RECIPES, Trainee, gathering

# torch warns whoever loads without a process group that it takes him to be alone.
ALONE = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ROUNDS = 2

STAGERS: dict[str, Any] = {
    "default": lambda: None,
    "blocking": BlockingAsyncStager,
    "in a thread": lambda: DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=True,
            use_non_blocking_copy=False,
        )
    ),
}


class Held(FileSystemWriter):
    """Writes nothing before the check lets it: by then training has gone on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.go: Future[None] = Future()

    def write_data(self, plan: Any, planner: Any) -> Any:
        self.go.result(timeout=20)
        return super().write_data(plan, planner)


def state_of(mine: Trainee, optimizer: Optimizer) -> dict[str, Any]:
    """What a trainer saves; without the optimizer where its state knows no placements."""
    state: dict[str, Any] = {"model": get_model_state_dict(mine.wrapped), "salt": [1, (2, 3)]}
    if mine.recipe.name not in ("ddp", "replicate"):
        state["optimizer"] = get_optimizer_state_dict(mine.wrapped, optimizer)
    return state


def moment(oracle: Oracle, saved: dict[str, Any]) -> dict[str, Any]:
    """The same state of the oracle, now."""
    state: dict[str, Any] = {
        "model": {name: param.clone() for name, param in oracle.params().items()}
    }
    if "optimizer" in saved:
        state["optimizer"] = oracle.state()
    return state


def assert_saved(folder: Path, expected: dict[str, Any], what: str) -> None:
    """One process alone finds these values in the checkpoint."""
    found: dict[str, Any] = {
        "model": {name: torch.zeros_like(t) for name, t in expected["model"].items()}
    }
    if "optimizer" in expected:
        found["optimizer"] = {
            "state": {
                name: {kind: torch.zeros_like(t) for kind, t in entry.items()}
                for name, entry in expected["optimizer"]["state"].items()
            }
        }
    state_dict_loader.load(found, checkpoint_id=folder, no_dist=True)
    for name, full in expected["model"].items():
        assert_same(found["model"][name], full, f"{what}: {name}")
    for name, entry in expected.get("optimizer", {"state": {}})["state"].items():
        for kind, full in entry.items():
            assert_same(found["optimizer"]["state"][name][kind], full, f"{what}: {name} {kind}")


def save(
    state: dict[str, Any], folder: Path, stager: Any, group: dist.ProcessGroup | None
) -> tuple[Held, Any]:
    """Start to save; returns when the state may be changed."""
    writer = Held(folder)
    # A group of its own: the save communicates from another thread while training does.
    answer: Any = state_dict_saver.async_save(
        state, storage_writer=writer, async_stager=stager, process_group=group
    )
    if hasattr(answer, "staging_completion"):
        answer.staging_completion.result(timeout=20)
        answer = answer.upload_completion
    return writer, answer


def tensors(state: Any) -> list[torch.Tensor]:
    """All tensors with elements, each as this rank holds it."""
    if isinstance(state, dict):
        return [t for value in state.values() for t in tensors(value)]
    if isinstance(state, (list, tuple)):
        return [t for value in state for t in tensors(value)]
    return [local(state)] if isinstance(state, torch.Tensor) and local(state).numel() else []


@pytest.mark.exercises("checkpoint.async")
class TestAsyncSave:
    @pytest.mark.law("isolation")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", gathering(FLAT, "fsdp1"))
    @ALONE
    @pytest.mark.thorough(but=["ddp"])
    def test_the_moment_of_the_save(
        self, device: Any, world: Any, shared: Path, recipe: str
    ) -> None:
        """Whoever stages, the checkpoint holds the values at the save, and training is not hurt."""
        group = dist.new_group()
        mine, oracle = RECIPES[recipe].make(MLP, device), Oracle("sgd")
        optimizer = sgd(mine.wrapped)
        train_wrapped(mine, optimizer, 0, STEPS)
        salt = STEPS
        for name, make in STAGERS.items():
            stager = make()
            for number in range(ROUNDS):
                what, folder = f"{name}, save {number}", shared / f"{name} {number}"
                state = state_of(mine, optimizer)
                expected = moment(oracle, state)
                writer, written = save(state, folder, stager, group)
                # Training starts anew, so that its sums stay exact however often it is saved.
                with torch.no_grad():
                    for param in mine.wrapped.parameters():
                        param.zero_()
                    for param in oracle.model.parameters():
                        param.zero_()
                train_wrapped(mine, optimizer, salt, salt + 1)
                oracle.step(salt, salt + 1)
                salt += 1
                writer.go.set_result(None)
                written.result(timeout=20)
                if world.rank == number:
                    assert_saved(folder, expected, what)
            if stager is not None:
                stager.close()

    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", gathering(FLAT, "fsdp1"))
    @ALONE
    @pytest.mark.thorough
    def test_a_cached_staging(self, device: Any, world: Any, shared: Path, recipe: str) -> None:
        """A stager that caches stages each save in the same memory, which is not the model's."""
        group = dist.new_group()
        mine, oracle = RECIPES[recipe].make(MLP, device), Oracle("sgd")
        optimizer = sgd(mine.wrapped)
        train_wrapped(mine, optimizer, 0, STEPS)
        stager = BlockingAsyncStager(cache_staged_state_dict=True)
        if not torch.accelerator.is_available():
            # A cache that the stager makes itself is pinned, which no machine without can do.
            stager.state_dict_cache = BlockingAsyncStager().stage(state_of(mine, optimizer))
        places: list[list[int]] = []
        for number in range(3):
            state = state_of(mine, optimizer)
            expected = moment(oracle, state)
            writer, written = save(state, shared / f"{number}", stager, group)
            staged: Any = stager.state_dict_cache
            places.append([t.untyped_storage().data_ptr() for t in tensors(staged)])
            own = {t.untyped_storage().data_ptr() for t in tensors(state)}
            assert places[-1], f"save {number}: nothing was staged"
            assert not own & set(places[-1]), f"save {number}: staged in the model's own memory"
            train_wrapped(mine, optimizer, STEPS + number, STEPS + number + 1)
            oracle.step(STEPS + number, STEPS + number + 1)
            writer.go.set_result(None)
            written.result(timeout=20)
            if world.rank == number:
                assert_saved(shared / f"{number}", expected, f"save {number}")
        assert places[1] == places[2] == places[0], "staged elsewhere at each save"
