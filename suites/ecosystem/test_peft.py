"""peft: LoRA over a frozen base, under fully_shard and tensor parallelism, adapters saved alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from ecosystem.digests import Digests
from ecosystem.kit.language import mean
from ecosystem.kit.resume import assert_close, assert_equal, moments, parameters
from ecosystem.kit.small import mlp, stepper

pytestmark = pytest.mark.needs("package peft")

FULL_TRAINED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)


def adapted(salt: int = 0) -> Any:
    """The small model with LoRA on both layers; the adapters' numbers depend on the salt."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(salt)
    model = get_peft_model(mlp(), LoraConfig(r=4, target_modules=["0", "2"]))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:  # zeros would make the adapters nothing
                param.normal_(std=0.1)
    return model


class Trainee:
    def __init__(self, grid: Any, salt: int = 0) -> None:
        self.model = adapted(salt)
        names = grid.mesh_dim_names
        if "tp" in names:
            base = "base_model.model"
            parallelize_module(
                self.model,
                grid["tp"],
                {
                    f"{base}.0.base_layer": ColwiseParallel(),
                    f"{base}.0.lora_B.default": ColwiseParallel(),
                    f"{base}.2.base_layer": RowwiseParallel(),
                    f"{base}.2.lora_A.default": RowwiseParallel(),
                },
            )
        self.data = grid["dp"] if "tp" in names else grid
        fully_shard(self.model, mesh=self.data)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2, foreach=False)
        self.step = stepper(self.model, self.optimizer, self.data)

    def state(self) -> list[Any]:
        return [parameters(self.model), moments(self.model, self.optimizer)]


@pytest.mark.exercises("peft", suite="ecosystem")
@pytest.mark.law("compatibility")
class TestLora:
    @pytest.mark.world(4, collective=30, limit=90)
    @pytest.mark.parametrize("second", ["the same", "another"])
    def test_resumed(self, note: Digests, mesh: Any, shared: Path, second: str) -> None:
        """Adapters and moments saved in shards are loaded, on another mesh too, and train on."""
        one = Trainee(mesh(2, 2))
        note("first losses", [one.step(0), one.step(1)])
        saved = one.state()
        state: dict[str, Any] = {
            "model": get_model_state_dict(one.model, options=TRAINED),
            "optimizer": get_optimizer_state_dict(one.model, one.optimizer),
        }
        assert all("lora" in name for name in state["model"]), list(state["model"])
        state_dict_saver.save(state, checkpoint_id=shared)
        expected = [one.step(2), one.step(3)]
        note("losses", expected)

        other = Trainee(mesh(2, 2) if second == "the same" else mesh(4), salt=1)
        state = {
            "model": get_model_state_dict(other.model, options=TRAINED),
            "optimizer": get_optimizer_state_dict(other.model, other.optimizer),
        }
        state_dict_loader.load(state, checkpoint_id=shared)
        set_model_state_dict(other.model, state["model"], options=TRAINED)
        set_optimizer_state_dict(other.model, other.optimizer, state["optimizer"])
        assert_equal(other.state(), saved, "loaded")
        got = [other.step(2), other.step(3)]
        note("losses after the load", got)
        if second == "the same":
            assert_equal(got, expected, "losses after the load")
        else:
            assert_close(mean(got, other.data), mean(expected, one.data), "losses after the load")

    @pytest.mark.world(4, collective=30, limit=90)
    def test_a_file_of_adapters(self, note: Digests, mesh: Any, shared: Path, rank: int) -> None:
        """Adapters gathered on rank 0, saved by peft, loaded by peft into the unsharded model."""
        from peft import PeftModel

        one = Trainee(mesh(2, 2))
        one.step(0)
        expected = parameters(one.model)
        state = get_model_state_dict(one.model, options=FULL_TRAINED)
        note("state", state)
        if rank == 0:
            one.model.save_pretrained(shared / "adapters", state_dict=state)
        torch.distributed.barrier()
        plain = PeftModel.from_pretrained(mlp(), shared / "adapters", is_trainable=True)
        note("loaded", dict(plain.named_parameters()))
        assert_equal(parameters(plain), expected, "from the file")

    @pytest.mark.world(4, collective=30, limit=90)
    def test_broadcast(self, note: Digests, mesh: Any, rank: int) -> None:
        """Adapters of rank 0 reach every rank's shards, and the frozen base keeps its numbers."""
        one = Trainee(mesh(2, 2), salt=1)
        whole = adapted()
        state = {n: p.detach() for n, p in whole.named_parameters() if p.requires_grad}
        set_model_state_dict(one.model, state if rank == 0 else {}, options=BROADCAST)
        note("parameters", dict(one.model.named_parameters()))
        assert_equal(parameters(one.model), parameters(whole), "loaded")
