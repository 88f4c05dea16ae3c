"""lightning-fabric: ModelParallelStrategy, its checkpoints in shards and in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ecosystem.digests import Digests
from ecosystem.kit.resume import Step, assert_close, assert_equal, moments, parameters
from ecosystem.kit.small import mlp, sharded, stepper

pytestmark = pytest.mark.needs("package lightning-fabric")

MESHES = {"fsdp2 x tp2": (2, 2), "fsdp4": (4, 1), "tp4": (1, 4)}


@pytest.fixture(autouse=True)
def under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fabric takes a process with torchrun's variables for one that was started for it."""
    for name, value in {
        "TORCHELASTIC_RUN_ID": "none",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(name, value)


def parallelize(model: nn.Module, mesh: Any) -> nn.Module:
    """What a user gives to ModelParallelStrategy, which names its dimensions at length."""
    shards, tp = mesh["data_parallel"], mesh["tensor_parallel"]
    if tp.size() > 1:
        from ecosystem.kit.small import tensor_parallel

        tensor_parallel(model, tp)
    return sharded(model, shards)


class Trainee:
    """A model and its optimizer under Fabric."""

    def __init__(self, mesh: str, salt: int = 0, *, in_shards: bool = True) -> None:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import ModelParallelStrategy

        shards, tp = MESHES[mesh]
        strategy = ModelParallelStrategy(
            parallelize_fn=parallelize,
            data_parallel_size=shards,
            tensor_parallel_size=tp,
            save_distributed_checkpoint=in_shards,
        )
        self.fabric = Fabric(accelerator="cpu", devices=shards * tp, strategy=strategy)
        self.fabric.launch()
        self.wrapped = self.fabric.setup_module(mlp(salt))
        self.model: nn.Module = self.wrapped.module
        self.optimizer = self.fabric.setup_optimizers(
            torch.optim.AdamW(self.wrapped.parameters(), lr=1e-2, foreach=False)
        )
        data = strategy.device_mesh["data_parallel"]
        self.step: Step = stepper(self.wrapped, self.optimizer, data, backward=self.fabric.backward)
        self.data = data

    def state(self) -> list[Any]:
        return [parameters(self.model), moments(self.model, self.optimizer.optimizer)]

    def objects(self) -> dict[str, Any]:
        """What is given to Fabric's save and load; the model must be the wrapped one."""
        return {"model": self.wrapped, "optimizer": self.optimizer, "steps": 0}


@pytest.mark.exercises("lightning-fabric", suite="ecosystem")
@pytest.mark.law("compatibility")
class TestModelParallel:
    @pytest.mark.world(4, collective=30, limit=120)
    @pytest.mark.parametrize("in_shards", [True, False], ids=["sharded", "one file"])
    @pytest.mark.parametrize(
        ("first", "second"),
        [("fsdp2 x tp2", "fsdp2 x tp2"), ("fsdp2 x tp2", "fsdp4"), ("fsdp4", "tp4")],
    )
    def test_resumed(
        self, note: Digests, shared: Path, in_shards: bool, first: str, second: str
    ) -> None:
        """What Fabric saved on one mesh it loads on another to the bit, and training goes on."""
        one = Trainee(first, in_shards=in_shards)
        note("first losses", [one.step(0), one.step(1)])
        saved, file = one.state(), shared / "checkpoint"
        one.fabric.save(file, one.objects() | {"steps": 2})
        expected = [one.step(2), one.step(3)]
        note("losses", expected)

        other = Trainee(second, salt=1, in_shards=in_shards)
        objects = other.objects()
        other.fabric.load(file, objects)
        assert objects["steps"] == 2
        assert_equal(other.state(), saved, "loaded")
        got = [other.step(2), other.step(3)]
        note("losses after the load", got)
        note("parameters", dict(other.model.named_parameters()))
        if first == second:
            assert_equal(got, expected, "losses after the load")
        else:
            assert_close(mean(got, other), mean(expected, one), "losses after the load")

    @pytest.mark.world(4, collective=30, limit=120)
    def test_a_raw_file(self, note: Digests, shared: Path, rank: int) -> None:
        """load_raw puts a plain file's weights into the sharded model to the bit."""
        file = shared / "raw.pt"
        if rank == 0:
            torch.save(mlp(7).state_dict(), file)
        torch.distributed.barrier()
        one = Trainee("fsdp2 x tp2")
        one.fabric.load_raw(file, one.wrapped)
        note("parameters", dict(one.model.named_parameters()))
        assert_equal(
            parameters(one.model),
            {name: value.detach() for name, value in mlp(7).named_parameters()},
            "loaded",
        )


def mean(losses: list[torch.Tensor], of: Trainee) -> list[torch.Tensor]:
    """Over the ranks that hold other rows."""
    found = []
    for loss in losses:
        total = loss.clone()
        torch.distributed.all_reduce(total, group=of.data.get_group())
        found.append(total / of.data.size())
    return found
