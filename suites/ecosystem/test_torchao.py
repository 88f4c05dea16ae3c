"""torchao: quantised weights and optimizer state, wrapper subclasses that have few operations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Shard

from ecosystem.digests import Digests, digest
from ecosystem.kit.resume import assert_equal
from ecosystem.kit.small import mlp, sharded, stepper
from ecosystem.parts import copied, inner_tensors

pytestmark = pytest.mark.needs("package torchao")

FULL = StateDictOptions(full_state_dict=True)
FULL_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
SHARDED = StateDictOptions()

WEIGHTS = ["int8", "float8"]
OPTIMIZERS = ["AdamW8bit", "AdamWFp8"]


def quantised(kind: str, salt: int = 0) -> nn.Module:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    model = mlp(salt)
    configs = {
        "int8": lambda: Int8WeightOnlyConfig(version=2),
        "float8": lambda: Float8WeightOnlyConfig(version=2),
    }
    quantize_(model, configs[kind]())
    weight = model.get_parameter("0.weight")
    assert inner_tensors(weight) is not None, f"{kind}: a plain {type(weight).__name__}"
    return model


def held(model: nn.Module) -> dict[str, Any]:
    return {name: value.detach() for name, value in model.state_dict().items()}


@pytest.mark.exercises("torchao", suite="ecosystem")
@pytest.mark.law("compatibility")
class TestWeights:
    @pytest.mark.world(2, limit=90)
    @pytest.mark.parametrize("kind", WEIGHTS)
    def test_a_full_state_dict_is_got(self, note: Digests, kind: str) -> None:
        """Quantised weights come out of get_model_state_dict with their class, parts and bits."""
        model = quantised(kind)
        state = get_model_state_dict(model, options=FULL)
        note("state", state)
        assert_equal(state, held(model), "full")

    @pytest.mark.world(2, limit=90)
    @pytest.mark.parametrize("kind", WEIGHTS)
    def test_a_full_state_dict_is_set(self, note: Digests, kind: str) -> None:
        """A full state dict of quantised weights is loaded into another model to the bit."""
        model, state = quantised(kind, salt=1), held(quantised(kind))
        set_model_state_dict(model, state, options=FULL)
        note("loaded", held(model))
        assert_equal(held(model), held(quantised(kind)), "loaded")

    @pytest.mark.world(2, limit=90)
    @pytest.mark.parametrize("kind", WEIGHTS)
    def test_a_full_state_dict_is_broadcast(self, note: Digests, rank: int, kind: str) -> None:
        """Rank 0's quantised weights reach the model of every rank to the bit."""
        model = quantised(kind, salt=1)
        state = held(quantised(kind)) if rank == 0 else {}
        set_model_state_dict(model, state, options=BROADCAST)
        note("loaded", held(model))
        assert_equal(held(model), held(quantised(kind)), "loaded")

    @pytest.mark.world(2, limit=90)
    @pytest.mark.parametrize("kind", WEIGHTS)
    def test_a_checkpoint(self, note: Digests, shared: Path, kind: str) -> None:
        """Quantised weights go through dcp.save and dcp.load to the bit."""
        state_dict_saver.save(
            {"model": get_model_state_dict(quantised(kind))}, checkpoint_id=shared
        )
        model = quantised(kind, salt=1)
        state = get_model_state_dict(model)
        state_dict_loader.load({"model": state}, checkpoint_id=shared)
        set_model_state_dict(model, state)
        note("loaded", held(model))
        assert_equal(held(model), held(quantised(kind)), "loaded")

    @pytest.mark.world(2, limit=90)
    @pytest.mark.parametrize("kind", WEIGHTS)
    @pytest.mark.parametrize("options", [FULL, FULL_ON_CPU], ids=["device", "cpu"])
    def test_a_sharded_weight_is_gathered(
        self, note: Digests, mesh: Any, rank: int, kind: str, options: StateDictOptions
    ) -> None:
        """A weight that is quantised and sharded by rows comes back whole, dequantised alike."""
        model, line = quantised(kind), mesh(2)
        whole = model.get_parameter("0.weight").detach()
        rows = whole.shape[0] // 2
        local = whole[rank * rows : (rank + 1) * rows]
        sharded = DTensor.from_local(local, line, [Shard(0)], run_check=False)
        model.get_submodule("0").register_parameter(
            "weight", nn.Parameter(sharded, requires_grad=False)
        )
        state = get_model_state_dict(model, options=options)
        note("gathered", state)
        if options.cpu_offload and rank:
            assert state == {}, f"rank {rank} of a state dict on the CPU: {list(state)}"
            return
        got: Any = state["0.weight"]
        assert type(got) is type(whole), f"a {type(got).__name__}"
        assert_equal(got.dequantize(), whole.dequantize(), "dequantised")


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    import torchao.optim

    made: torch.optim.Optimizer = getattr(torchao.optim, name)(model.parameters(), lr=1e-2)
    return made


def trained(name: str, mesh: Any, steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    names = mesh.mesh_dim_names
    model = sharded(mlp(), mesh)
    optimizer = optimizer_of(name, model)
    step = stepper(model, optimizer, mesh["dp"] if "tp" in names else mesh)
    for number in range(steps):
        step(number)
    return model, optimizer, step


def local_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What this rank holds of the optimizer's state; no collective."""
    return {
        name: {
            key: copied(value._local_tensor if isinstance(value, DTensor) else value)
            for key, value in optimizer.state[param].items()
        }
        for name, param in model.named_parameters()
    }


def quantises(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether any of the state is a wrapper subclass: else the check would prove nothing."""
    found = [v for entry in local_state(model, optimizer).values() for v in entry.values()]
    return any(isinstance(v, dict) for v in found)


@pytest.fixture
def eager() -> Iterator[None]:
    """Keep torchao from compiling the step of each parameter, which takes a minute a check."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.exercises("torchao", suite="ecosystem")
@pytest.mark.law("compatibility")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.usefixtures("eager")
class TestOptimizers:
    @pytest.mark.world(2, limit=120)
    def test_training(self, note: Digests, mesh: Any, name: str) -> None:
        """Training under fully_shard with quantised optimizer state gives the same bits twice."""
        line = mesh(2)
        runs = []
        for turn in range(2):
            model, optimizer, step = trained(name, line, steps=0)
            losses = [step(number) for number in range(4)]
            runs.append([losses, copied(dict(model.named_parameters()))])
            note(f"turn {turn}: losses and parameters", runs[-1])
            note(f"turn {turn}: state", local_state(model, optimizer))
            assert quantises(model, optimizer)
        assert_equal(runs[1], runs[0], "the second turn")

    @pytest.mark.world(2, limit=120)
    def test_a_checkpoint_is_resumed(
        self, note: Digests, mesh: Any, shared: Path, name: str
    ) -> None:
        """Saved and loaded on the same mesh, training continues to the bit as if uninterrupted."""
        model, optimizer, step = trained(name, mesh(2))
        state: dict[str, Any] = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }
        state_dict_saver.save(state, checkpoint_id=shared)
        expected = [step(2), step(3)]

        model, optimizer, step = trained(name, mesh(2), steps=1)
        state = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }
        state_dict_loader.load(state, checkpoint_id=shared)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        got = [step(2), step(3)]
        note("losses", got)
        assert_equal(got, expected, "losses after the load")

    @pytest.mark.world(2, limit=120)
    @pytest.mark.parametrize("options", [FULL, FULL_ON_CPU], ids=["device", "cpu"])
    def test_a_full_state_dict_is_got(
        self, note: Digests, mesh: Any, rank: int, name: str, options: StateDictOptions
    ) -> None:
        """The full state of a quantised optimizer is the parts of all ranks, six times alike."""
        model, optimizer, _ = trained(name, mesh(2))
        dequantised = {
            n: {
                k: (
                    DTensor.from_local(
                        v._local_tensor.dequantize(), v.device_mesh, v.placements, run_check=False
                    ).full_tensor()
                    if isinstance(v, DTensor) and inner_tensors(v._local_tensor) is not None
                    else v.full_tensor()
                    if isinstance(v, DTensor)
                    else v
                )
                for k, v in optimizer.state[p].items()
            }
            for n, p in model.named_parameters()
        }
        seen = set()
        for turn in range(6):
            state: Any = get_optimizer_state_dict(model, optimizer, options=options)
            # At once: what has not arrived yet shows here, and no longer below.
            seen.add(digest(state))
            if not turn:
                note("state", state)
            if options.cpu_offload and rank:
                continue
            for n, entry in state["state"].items():
                for k, v in entry.items():
                    got = v.dequantize() if hasattr(v, "codes") else v
                    assert_equal(got, dequantised[n][k], f"turn {turn}: {n}: {k}")
        assert len(seen) == 1, f"six states in a row are {len(seen)} different ones"

    @pytest.mark.world(4, limit=120)
    def test_tensor_parallel(self, note: Digests, mesh: Any, shared: Path, name: str) -> None:
        """Under fully_shard and tensor parallelism: saved, loaded, continued to the bit."""
        model, optimizer, step = trained(name, mesh(2, 2))
        state: dict[str, Any] = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }
        state_dict_saver.save(state, checkpoint_id=shared)
        expected = [step(2), step(3)]
        note("losses", expected)
        model, optimizer, step = trained(name, mesh(2, 2), steps=1)
        state = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }
        state_dict_loader.load(state, checkpoint_id=shared)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        assert_equal([step(2), step(3)], expected, "losses after the load")
