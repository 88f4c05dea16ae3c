"""torchrec: sharded tables, DTensors over LocalShardsWrapper, saved and loaded in another way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)
from torch.distributed.tensor import DTensor

from ecosystem.digests import Digests
from ecosystem.kit.resume import assert_equal
from ecosystem.parts import copied

pytestmark = pytest.mark.needs("package torchrec")

KINDS = ["row-wise", "column-wise", "table-wise"]
ROWS, WIDTH = 10, 8
FULL = StateDictOptions(full_state_dict=True)
FULL_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)


def table(name: str, salt: int) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(salt + len(name)))


def tables(kind: str, salt: int = 0, *, dtensor: bool = True) -> Any:
    """Two tables under DistributedModelParallel, sharded in this way, with the salt's numbers."""
    from torchrec.distributed import sharding_plan
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.types import ShardingEnv, ShardingPlan
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bags = EmbeddingBagCollection(
                tables=[
                    EmbeddingBagConfig(
                        name=name, embedding_dim=WIDTH, num_embeddings=ROWS, feature_names=[name]
                    )
                    for name in ("first", "second")
                ]
            )

        def forward(self, features: Any) -> torch.Tensor:
            values: torch.Tensor = self.bags(features).values()
            return values

    model, size = Model(), dist.get_world_size()
    ways = {
        "row-wise": {n: sharding_plan.row_wise() for n in ("first", "second")},
        "column-wise": {
            n: sharding_plan.column_wise(ranks=list(range(size))) for n in ("first", "second")
        },
        "table-wise": {
            n: sharding_plan.table_wise(rank=r) for r, n in enumerate(("first", "second"))
        },
    }
    sharder = EmbeddingBagCollectionSharder()
    plan = sharding_plan.construct_module_sharding_plan(
        model.bags, ways[kind], sharder=sharder, world_size=size, local_size=size, device_type="cpu"
    )
    made = DistributedModelParallel(
        model,
        env=ShardingEnv(size, dist.get_rank(), dist.group.WORLD, output_dtensor=dtensor),
        device=torch.device("cpu"),
        plan=ShardingPlan({"bags": plan}),
        sharders=[sharder],
    )
    for name, value in made.state_dict().items():
        for offset, shard in parts(value):
            shard.copy_(part(expected(salt)[name], offset, shard.shape))
    return made


def parts(value: Any) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """(offset, tensor) of each shard that this rank holds of a table."""
    local = value._local_tensor
    return [
        (tuple(offset), shard.detach())
        # A rank without a shard has an offset all the same.
        for offset, shard in zip(local.local_offsets(), local.local_shards(), strict=False)
        if shard.numel()
    ]


def part(whole: torch.Tensor, offset: Any, shape: Any) -> torch.Tensor:
    return whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]


def assembled(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Each table, put together from the shards of all ranks by their offsets."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: parts(value) for name, value in state.items()})
    found = {}
    for name in state:
        whole = torch.full((ROWS, WIDTH), float("nan"))
        for one in everyone:
            for offset, shard in one[name]:
                part(whole, offset, shard.shape).copy_(shard)
        found[name] = whole
    return found


def step(model: Any, number: int) -> torch.Tensor:
    """Trains on some rows of each table; the loss of this rank's part."""
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    generator = torch.Generator().manual_seed(10 * number + dist.get_rank())
    features = KeyedJaggedTensor(
        keys=["first", "second"],
        values=torch.randint(ROWS, (8,), generator=generator),
        lengths=torch.full((8,), 1, dtype=torch.int32),
    )
    loss = model(features).square().sum()
    loss.backward()
    with torch.no_grad():
        for param in model.parameters():
            if param.grad is not None:
                param -= 0.1 * param.grad
                param.grad = None
    value: torch.Tensor = loss.detach()
    return value


def held(state: dict[str, Any]) -> dict[str, Any]:
    """What this rank holds of each table, part by part."""
    return {
        name: copied(value._local_tensor if isinstance(value, DTensor) else value)
        for name, value in state.items()
    }


def expected(salt: int) -> dict[str, torch.Tensor]:
    return {f"bags.embedding_bags.{name}.weight": table(name, salt) for name in ("first", "second")}


@pytest.mark.exercises("torchrec", suite="ecosystem")
@pytest.mark.law("compatibility")
@pytest.mark.parametrize("kind", KINDS)
class TestTables:
    @pytest.mark.world(2, collective=30, limit=90)
    @pytest.mark.parametrize("options", [FULL, FULL_ON_CPU], ids=["device", "cpu"])
    def test_gathered(self, note: Digests, rank: int, kind: str, options: StateDictOptions) -> None:
        """A full state dict of sharded tables holds each table whole."""
        state = get_model_state_dict(tables(kind).module, options=options)
        note("state", state)
        if options.cpu_offload and rank:
            assert state == {}, f"rank {rank}: {list(state)}"
            return
        assert_equal(state, expected(0), "gathered")

    @pytest.mark.world(2, collective=30, limit=90)
    @pytest.mark.parametrize("second", KINDS)
    def test_a_checkpoint(self, note: Digests, shared: Path, kind: str, second: str) -> None:
        """Trained tables that were saved sharded one way load sharded in another, and train on."""
        one = tables(kind)
        note("first losses", [step(one, 0), step(one, 1)])
        saved = assembled(one.state_dict())
        state_dict_saver.save(one.state_dict(), checkpoint_id=shared)
        losses = [step(one, 2), step(one, 3)]
        other = tables(second, salt=1)
        state = other.state_dict()
        state_dict_loader.load(state, checkpoint_id=shared)
        other.load_state_dict(state)
        assert_equal(assembled(other.state_dict()), saved, "loaded")
        got = [step(other, 2), step(other, 3)]
        note("losses", got)
        if kind == second:  # else other kernels train it, at other rates
            assert_equal(got, losses, "losses after the load")

    @pytest.mark.world(2, collective=30, limit=90)
    def test_staged(self, note: Digests, shared: Path, kind: str) -> None:
        """async_save writes the tables of the moment of the save, while training goes on."""
        one = tables(kind)
        step(one, 0)
        before = assembled(one.state_dict())
        # Of its own: the save's collectives run in a thread, beside those of the training.
        group = dist.new_group()
        future: Any = state_dict_saver.async_save(
            one.state_dict(), checkpoint_id=shared, process_group=group
        )
        step(one, 1)
        future.result()
        other = tables(kind, salt=1)
        state = other.state_dict()
        state_dict_loader.load(state, checkpoint_id=shared)
        note("loaded", held(state))
        assert_equal(assembled(state), before, "loaded")
