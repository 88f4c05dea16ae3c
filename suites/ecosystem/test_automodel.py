"""nemo-automodel: a tied language model under its FSDP2 x TP, saved by its Stateful wrappers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own habit
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from ecosystem.digests import Digests
from ecosystem.kit.language import llama, mean, text
from ecosystem.kit.resume import assert_close, assert_equal, moments, parameters

pytestmark = [
    pytest.mark.needs("package nemo-automodel"),
    pytest.mark.needs("package transformers"),
]

MESHES = {"fsdp2 x tp2": (1, 2, 2), "fsdp4": (1, 4, 1), "hsdp": (2, 2, 1)}
"""Name to (replicas, shards, tensor parallelism)."""


class Trainee:
    """A model that Automodel's parallelizer has sharded."""

    def __init__(self, mesh: str, salt: int = 0) -> None:
        from nemo_automodel.components.distributed.parallelizer import fsdp2_strategy_parallelize

        shape = MESHES[mesh]
        grid = init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "dp_shard_cp", "tp"))
        grid["dp_replicate", "dp_shard_cp"]._flatten("dp_cp")
        self.data = grid["dp_replicate", "dp_shard_cp"]._flatten("dp")
        self.model: Any = fsdp2_strategy_parallelize(
            llama(salt), grid, mp_policy=MixedPrecisionPolicy()
        )
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, foreach=False)

    def step(self, number: int) -> torch.Tensor:
        rows = text(number, self.data)
        logits = self.model(input_ids=rows).logits
        if isinstance(logits, DTensor):
            logits = logits.full_tensor()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def state(self) -> list[Any]:
        return [parameters(self.model), moments(self.model, self.optimizer)]

    def stateful(self, *, on_cpu: bool) -> dict[str, Any]:
        """What Automodel gives to dcp.save and dcp.load."""
        from nemo_automodel.components.checkpoint.stateful_wrappers import (
            ModelState,
            OptimizerState,
        )

        return {
            "model": ModelState(self.model, cpu_offload=on_cpu),
            "optim": OptimizerState(self.model, self.optimizer, cpu_offload=on_cpu),
        }


@pytest.mark.exercises("nemo-automodel", suite="ecosystem")
@pytest.mark.law("compatibility")
class TestStateful:
    @pytest.mark.world(4, collective=30, limit=120)
    @pytest.mark.parametrize("on_cpu", [False, True], ids=["device", "cpu"])
    @pytest.mark.parametrize(
        ("first", "second"),
        [("fsdp2 x tp2", "fsdp2 x tp2"), ("fsdp2 x tp2", "fsdp4"), ("hsdp", "fsdp2 x tp2")],
    )
    def test_resumed(
        self, note: Digests, shared: Path, on_cpu: bool, first: str, second: str
    ) -> None:
        """Its model and optimizer, saved on one mesh, load on another to the bit, and go on."""
        one = Trainee(first)
        note("first losses", [one.step(0), one.step(1)])
        saved = one.state()
        state_dict_saver.save(one.stateful(on_cpu=on_cpu), checkpoint_id=shared)
        expected = [one.step(2), one.step(3)]
        note("losses", expected)

        other = Trainee(second, salt=1)
        other.step(0)
        state_dict_loader.load(other.stateful(on_cpu=False), checkpoint_id=shared)
        assert_equal(other.state(), saved, "loaded")
        got = [other.step(2), other.step(3)]
        note("losses after the load", got)
        note("parameters", dict(other.model.named_parameters()))
        if first == second:
            assert_equal(got, expected, "losses after the load")
        else:
            assert_close(mean(got, other.data), mean(expected, one.data), "losses after the load")
