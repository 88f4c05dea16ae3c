"""torchtitan: its smallest Llama under its own TP and FSDP, saved by its own CheckpointManager."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own habit
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from ecosystem.digests import Digests
from ecosystem.kit.resume import assert_close, assert_equal, moments, parameters

pytestmark = pytest.mark.needs("package torchtitan")

ROWS, LENGTH = 8, 8
MESHES = {
    "fsdp2 x tp2": (1, 2, 2),
    "fsdp4": (1, 4, 1),
    "tp4": (1, 1, 4),
    "hsdp": (2, 2, 1),
    "ddp4": (4, 1, 1),
}
"""Name to (replicas, shards, tensor parallelism)."""


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchtitan takes a machine without an accelerator for one with CUDA."""
    from torchtitan.distributed import parallel_dims

    monkeypatch.setattr(parallel_dims, "device_type", "cpu")


@dataclass
class Titan:
    """A model with what torchtitan's trainer builds around it."""

    model: Any
    optimizers: Any
    schedulers: Any
    dims: Any

    def step(self, number: int) -> torch.Tensor:
        """Train on a batch; the mean loss over all rows."""
        generator = torch.Generator().manual_seed(number)
        text = torch.randint(2048, (ROWS, LENGTH + 1), generator=generator)
        data = self.dims.get_optional_mesh("batch")
        mine = text if data is None else text.chunk(data.size())[data.get_local_rank()]
        out = self.model(mine[:, :-1])
        out = out.full_tensor() if hasattr(out, "full_tensor") else out
        loss = F.cross_entropy(out.flatten(0, 1).float(), mine[:, 1:].flatten())
        # torchtitan has FSDP sum gradients; DDP takes their mean.
        (loss / (data.size() if data is not None and self.dims.fsdp_enabled else 1)).backward()
        self.optimizers.step()
        self.schedulers.step()
        self.optimizers.zero_grad()
        return loss.detach()

    def state(self) -> list[Any]:
        """Parameters, the optimizer's state and the rate, whole. Every rank must call."""
        (optimizer,) = self.optimizers
        return [
            parameters(self.model),
            moments(self.model, optimizer),
            [group["lr"] for group in optimizer.param_groups],
        ]


def titan(mesh: str, salt: int = 0) -> Titan:
    from torchtitan.components.lr_scheduler import build_lr_schedulers
    from torchtitan.components.optimizer import build_optimizers
    from torchtitan.config import JobConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.models.llama3 import Transformer, llama3_args, parallelize_llama

    replicas, shards, tp = MESHES[mesh]
    job = JobConfig()
    job.training.seq_len = LENGTH
    job.training.mixed_precision_param = "float32"
    job.parallelism.disable_loss_parallel = True
    job.optimizer.implementation = "for-loop"
    job.activation_checkpoint.mode = "none"
    job.lr_scheduler.warmup_steps = 2
    dims = ParallelDims(
        dp_replicate=replicas,
        dp_shard=shards,
        cp=1,
        tp=tp,
        pp=1,
        ep=1,
        etp=1,
        world_size=replicas * shards * tp,
    )
    dims.build_mesh()
    args = replace(llama3_args["debugmodel"], n_layers=2, max_seq_len=LENGTH)
    with torch.device("meta"):
        model = Transformer(args)
    if replicas > 1 and shards == 1:  # DDP takes no model on meta
        model.to_empty(device="cpu")
    model = parallelize_llama(model, dims, job)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # Gloo has no reduction that scales
            module.set_force_sum_reduction_for_comms(True)
    if shards > 1 or tp > 1:
        model.to_empty(device="cpu")
    torch.manual_seed(salt)
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    model.train()
    optimizers = build_optimizers([model], job.optimizer, dims)
    return Titan(model, optimizers, build_lr_schedulers(optimizers, job.lr_scheduler, 10), dims)


@contextmanager
def manager(of: Titan, folder: Path, mode: str = "disabled") -> Iterator[Any]:
    """Torchtitan's CheckpointManager over a folder that all ranks share."""
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.config.job_config import Checkpoint

    made = CheckpointManager(
        dataloader=None,
        model_parts=[of.model],
        optimizers=of.optimizers,
        lr_schedulers=of.schedulers,
        states={},
        checkpoint_config=Checkpoint(enable=True, interval=1, keep_latest_k=0, async_mode=mode),
        sd_adapter=None,
        base_folder=str(folder),
    )
    try:
        yield made
        made.maybe_wait_for_staging()
    finally:
        made.close()


@pytest.mark.exercises("torchtitan", suite="ecosystem")
@pytest.mark.law("compatibility")
class TestCheckpoint:
    @pytest.mark.world(4, collective=30, limit=150)
    @pytest.mark.parametrize("mode", ["disabled", "async"])
    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ("fsdp2 x tp2", "fsdp2 x tp2"),
            ("fsdp2 x tp2", "fsdp4"),
            ("fsdp4", "fsdp2 x tp2"),
            ("hsdp", "tp4"),
            ("ddp4", "fsdp2 x tp2"),
        ],
    )
    def test_resumed(self, note: Digests, shared: Path, mode: str, first: str, second: str) -> None:
        """What CheckpointManager saved on one mesh is loaded on another to the bit, and goes on."""
        one = titan(first)
        note("first losses", [one.step(0), one.step(1)])
        saved = one.state()
        with manager(one, shared, mode) as checkpoints:
            checkpoints.save(2)
            checkpoints.maybe_wait_for_staging()
            expected = [one.step(2), one.step(3)]
        note("losses", expected)

        other = titan(second, salt=1)
        with manager(other, shared, mode) as checkpoints:
            assert checkpoints.load(2)
        assert_equal(other.state(), saved, "loaded")
        got = [other.step(2), other.step(3)]
        note("losses after the load", got)
        note("parameters", dict(other.model.named_parameters()))
        if first == second:
            assert_equal(got, expected, "losses after the load")
        else:
            assert_close(mean(got, other), mean(expected, one), "losses after the load")


def mean(losses: list[torch.Tensor], of: Titan) -> list[torch.Tensor]:
    """Over the ranks that hold other rows."""
    data = of.dims.get_optional_mesh("batch")
    if data is None:
        return losses
    found = []
    for loss in losses:
        total = loss.clone()
        torch.distributed.all_reduce(total, group=data.get_group())
        found.append(total / data.size())
    return found


@pytest.mark.exercises("torchtitan", suite="ecosystem")
@pytest.mark.law("compatibility")
class TestStateDict:
    @pytest.mark.world(4, collective=30, limit=150)
    @pytest.mark.parametrize("mesh_of", ["fsdp2 x tp2", "hsdp"])
    def test_full_to_another_mesh(self, note: Digests, rank: int, mesh_of: str) -> None:
        """The full state dict of rank 0 is broadcast into a model on another mesh to the bit."""
        one, other = titan(mesh_of), titan("fsdp4", salt=1)
        state = get_model_state_dict(
            one.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        note("state", state)
        assert bool(state) == (rank == 0)
        set_model_state_dict(
            other.model,
            state,
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        )
        assert_equal(parameters(other.model), parameters(one.model), "loaded")
