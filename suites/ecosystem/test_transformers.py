"""transformers: a tied language model under its own TP plan and FSDP2, and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ecosystem.digests import Digests
from ecosystem.kit.language import llama, mean, text
from ecosystem.kit.resume import assert_close, assert_equal, moments, parameters

pytestmark = pytest.mark.needs("package transformers")

MESHES = {"fsdp2 x tp2": (2, 2), "fsdp4": (4, 1), "tp4": (1, 4)}


class Trainee:
    """A model that transformers loaded and sharded."""

    def __init__(self, source: Path, mesh: str) -> None:
        from transformers import LlamaForCausalLM
        from transformers.distributed import DistributedConfig

        shards, tp = MESHES[mesh]
        self.model: Any = LlamaForCausalLM.from_pretrained(
            source,
            distributed_config=DistributedConfig(fsdp_size=shards, tp_size=tp),
            attn_implementation="eager",
        )
        self.model.train()
        grid = self.model._device_mesh
        self.data = grid["fsdp"] if shards > 1 else None
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, foreach=False)

    def step(self, number: int) -> torch.Tensor:
        rows = text(number, self.data)
        loss = self.model(input_ids=rows, labels=rows).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        value: torch.Tensor = loss.detach()
        return value.full_tensor() if hasattr(value, "full_tensor") else value

    def state(self) -> list[Any]:
        return [parameters(self.model), moments(self.model, self.optimizer)]


def random_weights(folder: Path, rank: int, salt: int = 0) -> Path:
    """A folder as from_pretrained takes it, written by rank 0."""
    where = folder / f"random-{salt}"
    if rank == 0:
        llama(salt).save_pretrained(where)
    torch.distributed.barrier()
    return where


@pytest.mark.exercises("transformers", suite="ecosystem")
@pytest.mark.law("compatibility")
class TestDistributed:
    @pytest.mark.world(4, collective=30, limit=120)
    @pytest.mark.parametrize(
        ("first", "second"),
        [("fsdp2 x tp2", "fsdp2 x tp2"), ("fsdp2 x tp2", "fsdp4"), ("fsdp4", "tp4")],
    )
    def test_resumed(self, note: Digests, shared: Path, rank: int, first: str, second: str) -> None:
        """Saved in shards on one mesh, loaded on another to the bit with its moments, continued."""
        from transformers.distributed import load_optimizer_distributed, save_optimizer_distributed

        one = Trainee(random_weights(shared, rank), first)
        note("first losses", [one.step(0), one.step(1)])
        saved = one.state()
        one.model.save_pretrained(shared / "saved", distributed_checkpoint=True)
        save_optimizer_distributed(one.model, one.optimizer, str(shared / "optimizer"))
        expected = [one.step(2), one.step(3)]
        note("losses", expected)

        other = Trainee(shared / "saved", second)
        other.step(0)
        other = Trainee(shared / "saved", second)
        load_optimizer_distributed(other.model, other.optimizer, str(shared / "optimizer"))
        assert_equal(other.state(), saved, "loaded")
        got = [other.step(2), other.step(3)]
        note("losses after the load", got)
        note("parameters", dict(other.model.named_parameters()))
        if first == second:
            assert_equal(got, expected, "losses after the load")
        else:
            assert_close(mean(got, other.data), mean(expected, one.data), "losses after the load")

    @pytest.mark.world(4, collective=30, limit=120)
    @pytest.mark.parametrize("mesh_of", list(MESHES))
    def test_gathered_into_a_file(
        self, note: Digests, shared: Path, rank: int, mesh_of: str
    ) -> None:
        """save_pretrained gathers the trained model into a file that a plain model loads alike."""
        from transformers import LlamaForCausalLM

        one = Trainee(random_weights(shared, rank), mesh_of)
        one.step(0)
        expected = parameters(one.model)
        one.model.save_pretrained(shared / "whole")
        torch.distributed.barrier()
        plain = LlamaForCausalLM.from_pretrained(shared / "whole")
        note("file", dict(plain.named_parameters()))
        assert_equal(parameters(plain), expected, "from the file")
        assert plain.lm_head.weight is plain.model.embed_tokens.weight, "the head is not tied"
