"""accelerate: a tied transformers model under its FSDP2, saved and resumed by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from ecosystem.digests import Digests
from ecosystem.kit.language import llama, mean, text
from ecosystem.kit.resume import assert_close, assert_equal, moments, parameters

pytestmark = [
    pytest.mark.needs("package accelerate"),
    pytest.mark.needs("package transformers"),
]

MESHES = {"fsdp4": (1, 4), "hsdp": (2, 2)}
"""Name to (replicas, shards)."""


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Variables of `accelerate launch`; of its state a process has one, and each check its own."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    # accelerate offers FSDP on accelerators only. Its code for it is the same on each of them, and
    # runs on the CPU once it is told that this is one.
    monkeypatch.setattr(
        PartialState, "_prepare_backend", lambda *_, **__: ("gloo", DistributedType.MULTI_XPU)
    )
    monkeypatch.setattr(
        PartialState, "set_device", lambda self: setattr(self, "device", torch.device("cpu"))
    )
    for name, value in {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(name, value)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Trainee:
    """A model and its optimizer that an Accelerator has prepared."""

    def __init__(self, mesh: str, kind: str, salt: int = 0) -> None:
        from accelerate import Accelerator, FullyShardedDataParallelPlugin
        from accelerate.parallelism_config import ParallelismConfig
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        replicas, shards = MESHES[mesh]
        self.accelerator = Accelerator(
            fsdp_plugin=FullyShardedDataParallelPlugin(
                fsdp_version=2,
                state_dict_type=kind,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
                cpu_ram_efficient_loading=False,
            ),
            parallelism_config=ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=shards),
        )
        model = llama(salt)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        self.model: Any
        self.optimizer: Any
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.model.train()
        self.data = init_device_mesh("cpu", (replicas * shards,))

    def step(self, number: int) -> torch.Tensor:
        rows = text(number, self.data)
        loss = self.model(input_ids=rows, labels=rows).loss
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        value: torch.Tensor = loss.detach()
        return value.full_tensor() if hasattr(value, "full_tensor") else value

    def state(self) -> list[Any]:
        return [parameters(self.model), moments(self.model, self.optimizer.optimizer)]


@pytest.mark.exercises("accelerate", suite="ecosystem")
@pytest.mark.law("compatibility")
class TestFsdp2:
    @pytest.mark.world(4, collective=30, limit=120)
    @pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
    @pytest.mark.parametrize("mesh_of", list(MESHES))
    def test_resumed(self, note: Digests, shared: Path, kind: str, mesh_of: str) -> None:
        """What save_state saved load_state loads to the bit, and training goes on to the bit."""
        one = Trainee(mesh_of, kind)
        note("first losses", [one.step(0), one.step(1)])
        saved = one.state()
        one.accelerator.save_state(str(shared / "state"))
        expected = [one.step(2), one.step(3)]
        note("losses", expected)

        other = Trainee(mesh_of, kind, salt=1)
        other.accelerator.load_state(str(shared / "state"))
        assert_equal(other.state(), saved, "loaded")
        got = [other.step(2), other.step(3)]
        note("losses after the load", got)
        note("parameters", dict(other.model.named_parameters()))
        assert_equal(got, expected, "losses after the load")

    @pytest.mark.world(4, collective=30, limit=120)
    @pytest.mark.parametrize("mesh_of", list(MESHES))
    def test_get_state_dict(self, note: Digests, rank: int, mesh_of: str) -> None:
        """Accelerator.get_state_dict gives rank 0 the whole trained model."""
        one = Trainee(mesh_of, "FULL_STATE_DICT")
        one.step(0)
        expected = parameters(one.model)
        state = one.accelerator.get_state_dict(one.model)
        note("state", state)
        if rank == 0:
            for name, value in expected.items():
                assert_equal(state[name], value, name)

    @pytest.mark.world(4, collective=30, limit=120)
    @pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
    def test_from_one_mesh_to_another(self, note: Digests, shared: Path, kind: str) -> None:
        """What save_state saved of two replicas of two shards four shards load, and go on."""
        one = Trainee("hsdp", kind)
        one.step(0)
        saved = one.state()
        one.accelerator.save_state(str(shared / "state"))
        expected = [one.step(2), one.step(3)]
        other = Trainee("fsdp4", kind, salt=1)
        other.accelerator.load_state(str(shared / "state"))
        assert_equal(other.state(), saved, "loaded")
        got = [other.step(2), other.step(3)]
        note("losses", got)
        assert_close(mean(got, other.data), mean(expected, one.data), "losses after the load")
