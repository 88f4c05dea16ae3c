"""Checkpoints of FSDP1 over tensor parallelism that torch as it is and the subject share.

A column-wise weight is `Shard(0)` in FSDP's dimension with the one, `_StridedShard(0)` with the
other: the same tensor, in other pieces. Whoever reads the files must not notice.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from harness.settings.subjects import Subject
from integration.kit.checkpoints import assert_loaded, assert_sharded, dress, whole
from integration.kit.models import MLP
from integration.kit.optimizers import (
    OPTIMIZERS,
    STEPS,
    Oracle,
    assert_optimizer,
    other,
    train_wrapped,
)
from integration.kit.recipes import GATHERS, RECIPES
from integration.test_checkpoint_dcp import _zeroed, fresh, grid, load_model, save

TARGETS: list[Any] = [
    pytest.param("fsdp1", (2, 2), marks=pytest.mark.thorough),
    ("fsdp1", (4, 1)),
    pytest.param("fully_shard", (2, 2), marks=pytest.mark.thorough),
    pytest.param("fully_shard", (4, 1), marks=pytest.mark.thorough),
    ("fully_shard", (1, 4)),
]


@pytest.mark.judges("tensor.parallel.fsdp.DTensorExtensions")
class TestTorchAndSubject:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    @GATHERS
    @pytest.mark.parametrize(("target", "shape"), TARGETS, ids=str)
    @pytest.mark.parametrize("writes", ["torch", "subject"])
    @pytest.mark.thorough
    def test_one_writes_and_the_other_reads(
        self,
        device: Any,
        shared: Path,
        subject: Subject,
        writes: str,
        target: str,
        shape: tuple[int, int],
    ) -> None:
        """Model and optimizer arrive bit for bit, and train on as the unsharded model does."""
        with _side(subject, writes == "subject"):
            old = RECIPES["fsdp1"].make(MLP, device)
            optimizer = OPTIMIZERS["sgd"](old.wrapped)
            train_wrapped(old, optimizer, 0, STEPS)
            model_state, optimizer_state = get_state_dict(old.wrapped, optimizer)
            save({"model": model_state, "optimizer": optimizer_state}, shared / "saved")
        with _side(subject, writes == "torch"):
            new = RECIPES[target].make(MLP, device, grid=grid(device, *shape), change=_zeroed)
            optimizer = other("sgd", new.wrapped)
            model_state, optimizer_state = get_state_dict(new.wrapped, optimizer)
            state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
            state_dict_loader.load(state, checkpoint_id=shared / "saved")
            set_state_dict(
                new.wrapped,
                optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
            oracle, sharded = Oracle("sgd"), StateDictOptions()
            model_state, optimizer_state = get_state_dict(new.wrapped, optimizer)
            assert_sharded(model_state, oracle.params(), device, "loaded")
            assert_optimizer(optimizer_state, oracle, sharded, device, "loaded")
            train_wrapped(new, optimizer, STEPS, STEPS + 1)
            oracle.step(STEPS, STEPS + 1)
            model_state, optimizer_state = get_state_dict(new.wrapped, optimizer)
            assert_sharded(model_state, oracle.params(), device, "a step later")
            assert_optimizer(optimizer_state, oracle, sharded, device, "a step later")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("shape", [(2, 2), (4, 1)], ids=str)
    @pytest.mark.parametrize("writes", ["torch", "subject"])
    @pytest.mark.thorough(but=["subject-(2, 2)"])
    def test_the_model_alone(
        self, device: Any, shared: Path, subject: Subject, writes: str, shape: tuple[int, int]
    ) -> None:
        """What one wrote of a model is what the other reads, onto the same mesh and another."""
        with _side(subject, writes == "subject"):
            old = RECIPES["fsdp1"].make(MLP, device, change=dress)
            save({"model": get_model_state_dict(old.wrapped)}, shared / "saved")
        with _side(subject, writes == "torch"):
            mine = fresh("fsdp1", MLP, device, grid(device, *shape))
            load_model(mine, shared / "saved")
            assert_loaded(mine, whole(MLP), f"on {shape}")


def _side(subject: Subject, own: bool) -> AbstractContextManager[Any]:
    return subject.in_place() if own else nullcontext()
