"""What torch's own code around the set owes on roads that no other file takes.

Most of this is not for the set to mend; `--callers` puts a subject in the place of that code, too.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.optim import SGD, Optimizer

from conformance.kit.agree import assert_raises_everywhere, exchange
from conformance.kit.compare import assert_same
from conformance.kit.refusals import MISSING
from integration.kit.checkpoints import (
    assert_full,
    assert_loaded,
    given,
    said,
    spoil,
    trainee,
    whole,
)
from integration.kit.models import MLP, TIED
from integration.kit.optimizers import (
    FROZEN,
    OPTIMIZERS,
    ROWS,
    STEPS,
    Oracle,
    adamw,
    assert_optimizer,
    freeze,
    other,
    train,
    train_wrapped,
)
from integration.kit.oracle import Pair
from integration.kit.recipes import FSDP1, FSDP1_FLAT, GATHERS, RECIPES
from integration.test_checkpoint_dcp import grid, save
from integration.test_training_roads import SINGLE, to_single

SHARDED = StateDictOptions()
FULL = StateDictOptions(full_state_dict=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)
KEY = "up.weight"


def one_group(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=1 / 8, momentum=0.5, foreach=False)


def local_state(optimizer: Optimizer) -> list[tuple[str, Any]]:
    """What the optimizer holds on this rank, in the order of its parameters."""
    return [
        (f"{number}.{name}", value._local_tensor if isinstance(value, DTensor) else value)
        for group in optimizer.param_groups
        for number, param in enumerate(group["params"])
        for name, value in sorted(optimizer.state.get(param, {}).items())
    ]


def assert_same_state(got: Optimizer, expected: Optimizer, what: str) -> None:
    for (name, mine), (_, theirs) in zip(local_state(got), local_state(expected), strict=True):
        if isinstance(theirs, torch.Tensor):
            assert_same(mine, theirs, f"{what}: {name}")
        else:
            assert mine == theirs, f"{what}: {name}"


@pytest.mark.exercises("checkpoint.optimizer")
class TestOptimizer:
    @pytest.mark.filterwarnings("ignore:`_get_pg_default_device` will be deprecated")
    @pytest.mark.filterwarnings("ignore:Multiple backends are registered")
    @pytest.mark.law("values")
    @pytest.mark.world(4, collective=8, limit=25)
    @GATHERS
    def test_flat_parameters(self, device: Any) -> None:
        """FSDP1 without use_orig_params gives the oracle's state under the names, and takes it."""
        mine = FSDP1_FLAT.make(MLP, device)
        optimizer = one_group(mine.wrapped)
        train_wrapped(mine, optimizer, 0, STEPS)
        oracle = MLP.build()
        theirs = one_group(oracle)
        train(
            theirs,
            lambda s: MLP.loss(oracle(MLP.batch(s, ROWS)[0]), MLP.batch(s, ROWS)[1]),
            0,
            STEPS,
        )
        for options in (FULL, SHARDED, BROADCAST, ON_CPU):
            state: Any = get_optimizer_state_dict(mine.wrapped, optimizer, options=options)
            if options is FULL:
                for name, param in oracle.named_parameters():
                    got = state["state"][name]["momentum_buffer"]
                    assert_same(got, theirs.state[param]["momentum_buffer"], name)
            fresh = one_group(mine.wrapped)
            state = given(state, options)
            set_optimizer_state_dict(mine.wrapped, fresh, state, options=options)
            assert_same_state(fresh, optimizer, str(options))

    @pytest.mark.law("structure")
    @pytest.mark.world(4, collective=8, limit=25)
    @GATHERS
    def test_tied_parameters(self, device: Any) -> None:
        """FSDP1 gives and takes the state of a tied parameter once; all of a full one on rank 0."""
        mine = FSDP1.make(TIED, device)
        optimizer = adamw(mine.wrapped)
        train_wrapped(mine, optimizer, 0, STEPS)
        for options in (SHARDED, FULL, BROADCAST, ON_CPU):
            state: Any = get_optimizer_state_dict(mine.wrapped, optimizer, options=options)
            assert "twin.weight" not in state.get("state", {}), "a state for each name"
            fresh = adamw(mine.wrapped)
            set_optimizer_state_dict(mine.wrapped, fresh, given(state, options), options=options)
            assert_same_state(fresh, optimizer, str(options))

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("name", ["sgd", "adamw"])
    @pytest.mark.thorough
    def test_onto_another_mesh(self, device: Any, shared: Path, name: str) -> None:
        """The state of TP x DDP on 2x2, in files, is right on 1x4, 4x1, and under fully_shard."""
        old = RECIPES["ddp"].make(MLP, device)
        optimizer = OPTIMIZERS[name](old.wrapped)
        train_wrapped(old, optimizer, 0, STEPS)
        save({"optimizer": get_optimizer_state_dict(old.wrapped, optimizer)}, shared / "saved")
        for recipe, shape in (("ddp", (1, 4)), ("ddp", (4, 1)), ("fully_shard", (2, 2))):
            new = RECIPES[recipe].make(MLP, device, grid=grid(device, *shape))
            fresh = other(name, new.wrapped)
            state = {"optimizer": get_optimizer_state_dict(new.wrapped, fresh)}
            state_dict_loader.load(state, checkpoint_id=shared / "saved")
            set_optimizer_state_dict(new.wrapped, fresh, state["optimizer"])
            found = get_optimizer_state_dict(new.wrapped, fresh)
            assert_optimizer(found, Oracle(name), SHARDED, device, f"{recipe} {shape}")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    def test_a_rank_s_own_tensors(self, device: Any) -> None:
        """Under TP x DDP a rank's own plain tensors, as torch gave them, are still taken."""
        mine = RECIPES["ddp"].make(MLP, device)
        optimizer = adamw(mine.wrapped)
        train_wrapped(mine, optimizer, 0, STEPS)
        state: Any = get_optimizer_state_dict(mine.wrapped, optimizer)
        for entry in state["state"].values():
            for name, value in entry.items():
                entry[name] = value.to_local() if isinstance(value, DTensor) else value
        fresh = adamw(mine.wrapped)
        set_optimizer_state_dict(mine.wrapped, fresh, state)
        assert_same_state(fresh, optimizer, "plain local tensors")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(4, collective=8, limit=25)
    @pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
    @pytest.mark.thorough
    def test_missing_on_rank_0(self, device: Any, world: Any, flat: bool) -> None:
        """A broadcast state that lacks a parameter's is refused on every rank, by name."""
        mine = RECIPES["fully_shard"].make(MLP, device)
        optimizer, oracle = adamw(mine.wrapped), Oracle("adamw")
        state: Any = oracle.flat() if flat else oracle.state()
        for at in [key for key in (state if flat else state["state"]) if KEY in key]:
            del (state if flat else state["state"])[at]
        options = StateDictOptions(
            full_state_dict=True, broadcast_from_rank0=True, flatten_optimizer_state_dict=flat
        )
        call = partial(
            set_optimizer_state_dict,
            mine.wrapped,
            optimizer,
            given(state, options),
            options=options,
        )
        assert_raises_everywhere(world, call, KEY, kinds=MISSING)


class Silent(nn.Module):
    """A module that does not save one of its parameters, as one with a frozen base does not."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.Linear(4, 4)
        self.base = nn.Linear(4, 4)
        self.register_state_dict_post_hook(self._forget)

    @staticmethod
    def _forget(_module: Any, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
        del state_dict[f"{prefix}base.weight"]


class Versioned(nn.Module):
    """A module that is told which version of it a state dict is of."""

    _version = 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.told: list[int | None] = []

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, *rest: Any
    ) -> None:
        self.told.append(metadata.get("version"))
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)


@pytest.mark.exercises("checkpoint.unusual_loads")
class TestModel:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_versions_of_modules(self, device: Any) -> None:
        """A module must be told the version that the state dict is of, as its load hooks ask."""
        for way, strict, version in product((SHARDED, FULL, BROADCAST), (True, False), (3, 2)):
            model = nn.Sequential(Versioned()).to(device)
            state: Any = nn.Sequential(Versioned()).state_dict()
            state._metadata["0"]["version"] = version
            options = StateDictOptions(**{**vars(way), "strict": strict})
            set_model_state_dict(model, state, options=options)
            told = model[0].told
            assert told == [version], f"{said(options)}: told {told}, expected {version}"

    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_what_the_model_does_not_save(self, device: Any) -> None:
        """A full, strict load of what the model itself saved must be possible."""
        model = Silent().to(device)
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        state: Any = get_model_state_dict(model, options=FULL)
        assert "base.weight" not in state
        state = {name: value.clone() for name, value in state.items()}
        spoil(model.kept)
        set_model_state_dict(model, state, options=FULL)
        for name, param in model.named_parameters():
            assert_same(param.detach(), before[name], name)

    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", ["fully_shard"])
    @pytest.mark.thorough
    def test_without_the_frozen_ones(self, device: Any, recipe: str) -> None:
        """What a save with ignore_frozen_params gave, a strict load with it takes, in each way."""
        for way in (FULL, BROADCAST):
            options = StateDictOptions(**{**vars(way), "ignore_frozen_params": True})
            mine = RECIPES[recipe].make(MLP, device, change=freeze)
            state = get_model_state_dict(mine.wrapped, options=options)
            assert FROZEN not in state
            if way is BROADCAST:
                options = StateDictOptions(**{**vars(options), "strict": False})
            spoil(mine.wrapped)
            set_model_state_dict(mine.wrapped, given(state, options), options=options)
            expected = {k: v.detach() for k, v in MLP.build().state_dict().items()}
            expected[FROZEN] = torch.zeros_like(expected[FROZEN])
            assert_full(
                get_model_state_dict(mine.wrapped, options=FULL), expected, device, "loaded"
            )

    @pytest.mark.law("compatibility")
    @pytest.mark.world(4, collective=8, limit=25)
    @pytest.mark.parametrize("recipe", ["ddp", "fully_shard"])
    @pytest.mark.thorough(but=["fully_shard"])
    def test_one_rank_alone_loads(self, device: Any, world: Any, recipe: str) -> None:
        """Where nothing travels, one rank may load a full state dict while the others do not."""
        mine = trainee(recipe, MLP, device)
        if world.rank == 1:
            spoil(mine.wrapped)
            set_model_state_dict(mine.wrapped, whole(MLP), options=FULL)
        exchange(world, "back")
        assert_loaded(mine, whole(MLP), "one rank loaded")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(4, collective=8, limit=25)
    @pytest.mark.thorough
    def test_a_rank_without(self, device: Any, world: Any) -> None:
        """FSDP1 gathers in a full load: a rank without a state dict is named on every rank."""
        mine = trainee("fsdp1", MLP, device)
        state = whole(MLP) if world.rank < 2 else {}
        call = partial(set_model_state_dict, mine.wrapped, state, options=ON_CPU)
        assert_raises_everywhere(world, call, "full state dict")
        set_model_state_dict(mine.wrapped, whole(MLP), options=ON_CPU)
        assert_loaded(mine, whole(MLP), "after the error")


class TestClipping:
    @pytest.mark.exercises("training.fsdp1")
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("recipe", [FSDP1, FSDP1_FLAT], ids=lambda r: r.name)
    @pytest.mark.thorough(but=["fsdp1-flat"])
    def test_each_norm(self, device: Any, world: Any, recipe: Any) -> None:
        """Each p-norm that FSDP1 takes must be the whole model's, on every rank alike."""
        pair = Pair(recipe.make(SINGLE, device, change=to_single), change=to_single)
        for number, p in enumerate((1.0, 2.0, 3.0, math.inf)):
            pair.zero_grad()
            pair.backward(f"{p}", number)
            model: Any = pair.trainee.wrapped
            norm = model.clip_grad_norm_(0.5, p)
            expected = nn.utils.clip_grad_norm_(pair.oracle.parameters(), 0.5, p)
            assert expected > 0.5, "nothing to clip"
            torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
            again = model.clip_grad_norm_(1e9, p)
            torch.testing.assert_close(again, torch.full_like(again, 0.5), rtol=1e-5, atol=0)
            told = exchange(world, [float(norm), float(again)], f"norm {p}")
            assert all(one == told[0] for one in told), f"{p}: {told}"

    @pytest.mark.exercises("training.fsdp1")
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_large_gradients_of_half_precision(self, device: Any, mesh: Any) -> None:
        """A norm whose square float16 cannot hold must be right, and gradients not become zero."""
        grid = mesh(2, 2)
        layer = nn.Linear(4, 8, bias=False, device=device, dtype=torch.float16)
        model: Any = FullyShardedDataParallel(
            parallelize_module(nn.Sequential(layer), grid["tp"], {"0": ColwiseParallel()}),
            device_mesh=grid["dp"],
            device_id=device,
            use_orig_params=True,
        )
        for scale in (1.0, 400.0):
            model.zero_grad()
            output = model(torch.ones(1, 4, device=device, dtype=torch.float16))
            (output.sum() * scale).backward()
            exact = torch.tensor(scale * math.sqrt(32), dtype=torch.float16, device=device)
            norm = model.clip_grad_norm_(float(exact) / 2)
            torch.testing.assert_close(norm.to(exact.dtype), exact, rtol=1e-2, atol=0)
            for param in model.parameters():
                if param.grad is not None and param.grad.numel():
                    half = torch.full_like(param.grad, scale / 2)
                    torch.testing.assert_close(param.grad, half, rtol=1e-2, atol=0)
