"""torch alone: what its own tests of these APIs are about, in our words and on its own types."""

from __future__ import annotations

from concurrent.futures import Future
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
from torch.distributed.tensor.parallel.ddp import _pre_dp_module_transform
from torch.nn.parallel import DistributedDataParallel

from ecosystem.digests import Digests
from ecosystem.kit.resume import assert_close, assert_equal, moments, parameters, whole
from ecosystem.kit.small import batch, mlp, sharded, stepper, tensor_parallel

FULL = StateDictOptions(full_state_dict=True)
FULL_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)


def alone(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The oracle: the whole model, trained on whole batches in this process."""
    model = mlp()
    optimizer = adamw(model)
    for number in range(steps):
        model(batch(number)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.exercises("torch", suite="ecosystem")
@pytest.mark.law("compatibility")
class TestTensorParallelTraining:
    @pytest.mark.world(4, collective=20, limit=60)
    def test_ddp(self, note: Digests, mesh: Any) -> None:
        """TP x DDP after _pre_dp_module_transform trains as the whole model does."""
        grid = mesh(2, 2)
        model = tensor_parallel(mlp(), grid["tp"])
        _pre_dp_module_transform(model)
        wrapped = DistributedDataParallel(model, device_mesh=grid["dp"])
        step = stepper(wrapped, adamw(wrapped), grid["dp"])
        note("losses", [step(number) for number in range(3)])
        expected, _ = alone(3)
        got = [wrapped(batch(9)).detach()]
        assert_close(got, [expected(batch(9)).detach()], "the trained model's output")

    @pytest.mark.world(4, collective=20, limit=60)
    @pytest.mark.thorough
    def test_fsdp1(self, note: Digests, mesh: Any) -> None:
        """FSDP1 x TP trains as the whole model does."""
        grid = mesh(2, 2)
        model = tensor_parallel(mlp(), grid["tp"])
        wrapped = FullyShardedDataParallel(
            model, device_mesh=grid["dp"], use_orig_params=True, device_id=torch.device("cpu")
        )
        step = stepper(wrapped, adamw(wrapped), grid["dp"])
        note("losses", [step(number) for number in range(3)])
        expected, _ = alone(3)
        got = [wrapped(batch(9)).detach()]
        assert_close(got, [expected(batch(9)).detach()], "the trained model's output")


MODES = [
    StateDictOptions(
        full_state_dict=full,
        cpu_offload=offload,
        flatten_optimizer_state_dict=flat,
        broadcast_from_rank0=broadcast,
        strict=strict,
    )
    for full, offload, flat, broadcast, strict in product((False, True), repeat=5)
    # A full and flat state of an optimizer torch's own code cannot set, whoever serves it: see
    # suites/expectations/callers.toml.
    if not (full and flat) and (full or not broadcast)
]


def said(options: StateDictOptions) -> str:
    return "-".join(name for name, value in vars(options).items() if value is True) or "none"


@pytest.mark.exercises("torch", suite="ecosystem")
@pytest.mark.law("compatibility")
class TestDistributedStateDict:
    @pytest.mark.world(4, collective=20, limit=60)
    @pytest.mark.parametrize("options", MODES, ids=said)
    @pytest.mark.thorough
    def test_a_round_trip(
        self, note: Digests, mesh: Any, rank: int, options: StateDictOptions
    ) -> None:
        """With every set of options: what was got of a trained model is set in another one."""
        grid = mesh(2, 2)
        one, other = sharded(mlp(), grid), sharded(mlp(1), grid)
        first, second = adamw(one), adamw(other)
        step = stepper(one, first, grid["dp"])
        step(0)
        stepper(other, second, grid["dp"])(5)
        saved = [parameters(one), moments(one, first)]
        model: Any
        optimizer: Any
        model, optimizer = get_state_dict(one, first, options=options)
        if options.full_state_dict and options.cpu_offload and not options.broadcast_from_rank0:
            # Only rank 0 has it, and each rank sets its own.
            objects = [[model, optimizer]]
            torch.distributed.broadcast_object_list(objects)
            model, optimizer = objects[0]
        if options.broadcast_from_rank0 and rank:
            model, optimizer = {}, {}
        # Not set_state_dict, which leaves the optimizer out on the ranks that have nothing.
        set_model_state_dict(other, model, options=options)
        set_optimizer_state_dict(other, second, optimizer, options=options)
        note("parameters", dict(other.named_parameters()))
        assert_equal([parameters(other), moments(other, second)], saved, "set")

    @pytest.mark.world(4, collective=20, limit=60)
    @pytest.mark.parametrize("keep", [True, False], ids=["kept", "dropped"])
    @pytest.mark.parametrize("full", [True, False], ids=["full", "sharded"])
    @pytest.mark.thorough
    def test_submodules(self, note: Digests, mesh: Any, keep: bool, full: bool) -> None:
        """The state of one submodule, with and without its prefix."""
        model = sharded(mlp(), mesh(2, 2))
        options = StateDictOptions(full_state_dict=full, keep_submodule_prefixes=keep)
        inner = model.get_submodule("0")
        state = get_model_state_dict(model, submodules={inner}, options=options)
        note("state", state)
        prefix = "0." if keep else ""
        expected = {f"{prefix}{n}": p.detach() for n, p in mlp()[0].named_parameters()}
        assert_equal(whole(state), expected, "got")


@pytest.mark.exercises("torch", suite="ecosystem")
@pytest.mark.law("compatibility")
class TestAsync:
    @pytest.mark.world(4, collective=20, limit=60)
    @pytest.mark.parametrize("threaded", [False, True], ids=["at once", "in a thread"])
    @pytest.mark.thorough
    def test_default_stager(self, note: Digests, mesh: Any, threaded: bool) -> None:
        """DefaultStager gives the state of the moment, twice from one stager, while it changes."""
        grid = mesh(2, 2)
        model = sharded(mlp(), grid)
        optimizer = adamw(model)
        step = stepper(model, optimizer, grid["dp"])
        stager = DefaultStager(StagingOptions(False, False, threaded, False))
        for turn in range(2):
            step(turn)
            state: dict[str, Any] = {
                "model": get_model_state_dict(model),
                "optimizer": get_optimizer_state_dict(model, optimizer),
            }
            expected = whole(state)
            found = stager.stage(state)
            staged = found.result() if isinstance(found, Future) else found
            with torch.no_grad():
                for param in model.parameters():
                    param.zero_()
            note(f"staged {turn}", staged)
            assert_equal(whole(staged), expected, f"turn {turn}")
        stager.close()

    @pytest.mark.world(4, collective=20, limit=60)
    @pytest.mark.thorough
    def test_async_save(self, note: Digests, mesh: Any, shared: Path) -> None:
        """What async_save began to write is what is loaded, whatever training did meanwhile."""
        grid = mesh(2, 2)
        model = sharded(mlp(), grid)
        optimizer = adamw(model)
        step = stepper(model, optimizer, grid["dp"])
        step(0)
        saved = [parameters(model), moments(model, optimizer)]
        state: dict[str, Any] = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }
        group = torch.distributed.new_group()
        future: Any = state_dict_saver.async_save(state, checkpoint_id=shared, process_group=group)
        step(1)
        future.result()
        other = sharded(mlp(1), mesh(4))
        second = adamw(other)
        state = {
            "model": get_model_state_dict(other),
            "optimizer": get_optimizer_state_dict(other, second),
        }
        state_dict_loader.load(state, checkpoint_id=shared)
        set_model_state_dict(other, state["model"])
        set_optimizer_state_dict(other, second, state["optimizer"])
        note("parameters", dict(other.named_parameters()))
        assert_equal([parameters(other), moments(other, second)], saved, "loaded")


def table(kind: str) -> torch.Tensor:
    return torch.arange(48.0).reshape(6, 8)[: 5 if kind == "uneven rows" else 6]


def wrapped_table(mesh: Any, rank: int, kind: str) -> DTensor:
    """A table of 6 x 8 over two ranks: by rows, evenly or not, by columns, in one shard or two."""
    full = table(kind)
    rows = [(0, 3), (3, len(full))][rank]
    columns = [(0, 4), (4, 8)][rank]
    cuts = {
        "row-wise": [(rows, (0, 8))],
        "uneven rows": [(rows, (0, 8))],
        "column-wise": [((0, 6), columns)],
        "two shards": [((0, 6), (c, c + 2)) for c in (columns[0], columns[0] + 2)],
    }[kind]
    shards = [full[r[0] : r[1], c[0] : c[1]].clone() for r, c in cuts]
    local = LocalShardsWrapper(shards, [(r[0], c[0]) for r, c in cuts])
    return DTensor.from_local(
        local,
        mesh,
        [Shard(0 if "row" in kind else 1)],
        run_check=False,
        shape=full.shape,
        stride=(8, 1),
    )


@pytest.mark.exercises("torch", suite="ecosystem")
@pytest.mark.law("compatibility")
@pytest.mark.parametrize("kind", ["row-wise", "uneven rows", "column-wise", "two shards"])
class TestLocalShardsWrapper:
    @pytest.mark.world(2, collective=20, limit=60)
    @pytest.mark.parametrize("options", [FULL, FULL_ON_CPU], ids=["device", "cpu"])
    @pytest.mark.thorough(but=["device-row-wise", "cpu-two shards"])
    def test_gathered(
        self, note: Digests, mesh: Any, rank: int, kind: str, options: StateDictOptions
    ) -> None:
        """A full state dict holds the whole table."""
        model = nn.Module()
        model.register_parameter("table", nn.Parameter(wrapped_table(mesh(2), rank, kind)))
        state = get_model_state_dict(model, options=options)
        note("state", state)
        if not (options.cpu_offload and rank):
            assert_equal(state, {"table": table(kind)}, "gathered")

    @pytest.mark.world(2, collective=20, limit=60)
    @pytest.mark.thorough(but=["two shards"])
    def test_staged_and_saved(
        self, note: Digests, mesh: Any, rank: int, shared: Path, kind: str
    ) -> None:
        """Staged, saved and loaded into another table of the same kind, it has the same numbers."""
        mine, line = wrapped_table(mesh(2), rank, kind), mesh(2)
        future: Any = state_dict_saver.async_save({"table": mine}, checkpoint_id=shared)
        future.result()
        other = wrapped_table(line, rank, kind)
        local: Any = other._local_tensor
        for shard in local.local_shards():
            shard.zero_()
        state_dict_loader.load({"table": other}, checkpoint_id=shared)
        note("loaded", other)
        assert_equal(other._local_tensor, mine._local_tensor, "loaded")
