"""Checkpoints of states that few tests have: on some ranks, in pieces, flat, of slices, empty."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.optim import SGD, Optimizer

from conformance.kit.compare import assert_same, local
from conformance.kit.data import numbers
from integration.kit.checkpoints import given
from integration.kit.recipes import GATHERS

pytestmark = [
    pytest.mark.filterwarnings("ignore:`_get_pg_default_device` will be deprecated"),
    pytest.mark.filterwarnings("ignore:Multiple backends are registered"),
    pytest.mark.filterwarnings("ignore:Please use DTensor instead"),
]

FULL = StateDictOptions(full_state_dict=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def layers(*sizes: int) -> nn.Module:
    """Layers without a bias, one weight larger than the other by a factor."""
    model = nn.Sequential(*(nn.Linear(4, size, bias=False) for size in sizes))
    with torch.no_grad():
        for number, param in enumerate(model.parameters(), 1):
            param.fill_(number)
    return model


def momentum(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), 0.5, momentum=0.5, foreach=False)


def stepped(model: nn.Module, optimizer: Optimizer, unused: str = "") -> dict[str, torch.Tensor]:
    """Take a step without the parameter `unused`; by name, what this rank holds of each moment.

    As in a backward, what FSDP1 leaves empty on this rank has no gradient.
    """
    for number, (name, param) in enumerate(model.named_parameters(), 1):
        used = param.numel() and name != unused
        param.grad = torch.full_like(param, number) if used else None
    optimizer.step()
    return moments(model, optimizer)


def moments(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    return {
        name: local(optimizer.state[param]["momentum_buffer"]).clone()
        for name, param in model.named_parameters()
        if optimizer.state.get(param)
    }


def assert_moments(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(expected), f"moments of {list(got)}, expected {list(expected)}"
    for name, moment in expected.items():
        assert_same(got[name], moment, f"moment of {name}")


@pytest.mark.exercises("checkpoint.optimizer")
class TestFsdp1OnSomeRanks:
    @pytest.mark.law("group")
    @pytest.mark.world(4, collective=8, limit=25)
    @pytest.mark.parametrize("original", [False, True], ids=["flat parameters", "original"])
    @GATHERS
    @pytest.mark.thorough(but=["flat parameters"])
    def test_the_first_of_its_group_has_it(self, device: Any, world: Any, original: bool) -> None:
        """FSDP1 on ranks 1 and 3 must give the optimizer's state, and load rank 1's, among them."""
        group = dist.new_group([1, 3])
        if world.rank not in (1, 3):
            return
        model = FullyShardedDataParallel(
            layers(4).to(device), group, device_id=device, use_orig_params=original
        )
        optimizer = momentum(model)
        stepped(model, optimizer)
        found = FullyShardedDataParallel.optim_state_dict(model, optimizer, group=group)["state"]
        expected = torch.ones(4, 4, device=device)
        assert_same(found["0.weight"]["momentum_buffer"], expected, "of optim_state_dict()")
        state: Any = get_optimizer_state_dict(model, optimizer, options=FULL)
        assert_same(state["state"]["0.weight"]["momentum_buffer"], expected, "got")
        state["state"]["0.weight"]["momentum_buffer"] *= 2
        options = BROADCAST
        source = state if world.rank == 1 else {}
        set_optimizer_state_dict(model, optimizer, source, options=options)
        state = get_optimizer_state_dict(model, optimizer, options=FULL)
        assert_same(state["state"]["0.weight"]["momentum_buffer"], expected * 2, "loaded")


@pytest.mark.exercises("checkpoint.reshard")
class TestPieces:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("saved", [False, True], ids=["loaded", "saved"])
    def test_a_rank_with_two_pieces(
        self, device: Any, mesh: Any, shared: Path, saved: bool
    ) -> None:
        """What a rank holds in two pieces must be saved as these, and loaded into both."""
        full, line = numbers(8, 2, device=device), mesh(2)
        pieces: list[Placement] = [_StridedShard(0, split_factor=2)]
        old, new = (pieces, [Shard(0)]) if saved else ([Shard(0)], pieces)
        state = {"x": distribute_tensor(full, line, old)}
        state_dict_saver.save(state, checkpoint_id=shared / "saved")
        found = {"x": distribute_tensor(torch.zeros_like(full), line, new)}
        state_dict_loader.load(found, checkpoint_id=shared / "saved")
        expected = distribute_tensor(full, line, new).to_local()
        assert_same(found["x"].to_local(), expected, f"from {old} into {new}")


STATES: dict[str, Callable[[Any, Any], Any]] = {
    "FSDP1": lambda device, _: get_model_state_dict(
        FullyShardedDataParallel(layers(4, 4).to(device), device_id=device)
    ),
    "a slice": lambda device, line: {
        "x": DTensor.from_local(numbers(4, 2, device=device)[2:], line, [Shard(0)])
    },
}


@pytest.mark.exercises("checkpoint.async")
class TestStagedStates:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("kind", STATES)
    @pytest.mark.parametrize("stager", [None, BlockingAsyncStager], ids=["default", "blocking"])
    @pytest.mark.thorough(but=["default-a slice"])
    def test_async_save(self, device: Any, mesh: Any, shared: Path, kind: str, stager: Any) -> None:
        """What save() saves async_save() must save, too, whoever stages it."""
        state = STATES[kind](device, mesh(2))
        state_dict_saver.save(state, checkpoint_id=shared / "save")
        written: Any = state_dict_saver.async_save(
            state, checkpoint_id=shared / "async", async_stager=stager and stager()
        )
        written.result(timeout=20)
        found = []
        for folder in ("save", "async"):
            found.append({name: torch.zeros(value.shape) for name, value in state.items()})
            state_dict_loader.load(found[-1], checkpoint_id=shared / folder)
        for name, value in found[0].items():
            assert_same(found[1][name], value, name)


@pytest.mark.exercises("checkpoint.async")
class TestStagedViews:
    @pytest.mark.law("values")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("stager", [None, BlockingAsyncStager], ids=["default", "blocking"])
    @pytest.mark.thorough(but=["default"])
    def test_conjugated_and_negated(self, device: Any, shared: Path, stager: Any) -> None:
        """What async_save() writes must be the values that a lazy view has."""
        spectrum = numbers(4, dtype=torch.complex64, device=device)
        state = {
            "conjugate": spectrum.conj(),
            "negated": spectrum.conj().imag,
            "as it is": spectrum,
        }
        written: Any = state_dict_saver.async_save(
            state, checkpoint_id=shared, async_stager=stager and stager()
        )
        written.result(timeout=20)
        found = {name: torch.zeros(4, dtype=value.dtype) for name, value in state.items()}
        state_dict_loader.load(found, checkpoint_id=shared)
        for name, value in state.items():
            assert_same(found[name], value.resolve_conj().resolve_neg(), name)


def on_fsdp1(model: nn.Module, device: Any, line: Any) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=device, use_orig_params=True)


def on_fully_shard(model: nn.Module, device: Any, line: Any) -> nn.Module:
    fully_shard(model, mesh=line)
    return model


@pytest.mark.exercises("checkpoint.optimizer")
class TestFlatStates:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("wrap", [on_fsdp1, on_fully_shard])
    @GATHERS
    @pytest.mark.thorough(but=["on_fsdp1"])
    def test_into_a_new_optimizer(self, device: Any, mesh: Any, wrap: Any) -> None:
        """A flat state must land in a new optimizer of a model that has gradients."""
        model = wrap(layers(4, 4).to(device), device, mesh(2))
        optimizer = momentum(model)
        expected = stepped(model, optimizer)
        state = get_optimizer_state_dict(model, optimizer, options=FLAT)
        fresh = momentum(model)
        set_optimizer_state_dict(model, fresh, state, options=FLAT)
        assert_moments(moments(model, fresh), expected)

    @pytest.mark.law("values")
    @pytest.mark.world(2, collective=8, limit=25)
    @pytest.mark.parametrize("sizes", [(4, 4), (4, 8)], ids=str)
    @GATHERS
    @pytest.mark.thorough(but=["(4, 8)"])
    def test_into_the_same_optimizer(self, device: Any, sizes: tuple[int, int], mesh: Any) -> None:
        """FSDP1 must load a flat state into the optimizer that gave it, which trains on."""
        model = on_fsdp1(layers(*sizes).to(device), device, mesh(2))
        optimizer = momentum(model)
        expected = stepped(model, optimizer)
        state = get_optimizer_state_dict(model, optimizer, options=FLAT)
        set_optimizer_state_dict(model, optimizer, state, options=FLAT)
        assert_moments(moments(model, optimizer), expected)


def without(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), 0.5)


def in_one_group(model: nn.Module) -> Optimizer:
    first, second = model.parameters()
    groups: list[dict[str, Any]] = [{"params": [first], "momentum": 0.5}, {"params": [second]}]
    return SGD(groups, 0.5, foreach=False)


def of_each(model: nn.Module) -> list[Optimizer]:
    return [SGD([param], 0.5) for param in model.parameters()]


@pytest.mark.exercises("checkpoint.optimizer")
class TestNoState:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("make", [without, in_one_group, of_each, momentum])
    @pytest.mark.parametrize("options", [StateDictOptions(), FULL, BROADCAST], ids=range(3))
    @pytest.mark.thorough(but=["1-in_one_group", "2-momentum"])
    def test_it_takes_what_it_gave(
        self, device: Any, mesh: Any, make: Any, options: StateDictOptions
    ) -> None:
        """SGD without momentum, or with an unused layer, must load its own state, and the rates."""
        model = on_fully_shard(layers(4, 4).to(device), device, mesh(2))
        mine = make(model)
        each = mine if isinstance(mine, list) else [mine]
        for optimizer in each:
            stepped(model, optimizer, unused="1.weight" if make is momentum else "")
            optimizer.zero_grad()
        expected = [moments(model, optimizer) for optimizer in each]
        state = get_optimizer_state_dict(model, mine, options=options)
        for group in (group for optimizer in each for group in optimizer.param_groups):
            group["lr"] = 0.25
        set_optimizer_state_dict(model, mine, given(state, options), options=options)
        rates = {group["lr"] for optimizer in each for group in optimizer.param_groups}
        assert rates == {0.5}, f"rates {rates} are loaded"
        for optimizer, before in zip(each, expected, strict=True):
            assert_moments(moments(model, optimizer), before)


@pytest.mark.exercises("checkpoint.optimizer")
class TestStages:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
    def test_each_has_its_rate(self, device: Any, world: Any, shared: Path, flat: bool) -> None:
        """The optimizer of a pipeline's stage must get back its own rate from a checkpoint."""
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        stage = nn.ModuleDict({f"{world.rank}": layers(4)}).to(device)
        make = partial(SGD, momentum=0.5, foreach=False)
        old, new = (make(stage.parameters(), rate) for rate in (1.0 + world.rank, 0.5))
        expected = stepped(stage, old)
        stage.zero_grad()
        saved = {"optimizer": get_optimizer_state_dict(stage, old, options=options)}
        state_dict_saver.save(saved, checkpoint_id=shared / "saved")
        found = {"optimizer": get_optimizer_state_dict(stage, new, options=options)}
        state_dict_loader.load(found, checkpoint_id=shared / "saved")
        set_optimizer_state_dict(stage, new, found["optimizer"], options=options)
        assert_moments(moments(stage, new), expected)
        assert [group.get("lr") for group in new.param_groups] == [1.0 + world.rank]


@pytest.mark.exercises("checkpoint.model")
class TestModelAndOptimizerAtOnce:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("what", ["both", "the optimizer"])
    @pytest.mark.parametrize("wrap", [on_fsdp1, on_fully_shard])
    @GATHERS
    @pytest.mark.thorough(but=["on_fully_shard-both"])
    def test_rank_0_has_them(self, device: Any, mesh: Any, wrap: Any, what: str) -> None:
        """set_state_dict() must broadcast what rank 0 gives to ranks that give {}."""
        model = wrap(layers(4, 4).to(device), device, mesh(2))
        optimizer = momentum(model)
        expected = stepped(model, optimizer)
        optimizer.zero_grad()
        state = get_optimizer_state_dict(model, optimizer, options=FULL)
        weights = get_model_state_dict(model, options=FULL)
        held = [local(param).clone() for param in model.parameters()]
        fresh = momentum(model)
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()
        set_state_dict(
            model,
            fresh,
            model_state_dict=given(weights, BROADCAST) if what == "both" else {},
            optim_state_dict=given(state, BROADCAST),
            options=BROADCAST,
        )
        assert_moments(moments(model, fresh), expected)
        for param, before in zip(model.parameters(), held, strict=True):
            wanted = before if what == "both" else torch.zeros_like(before)
            assert_same(local(param), wanted)

    @pytest.mark.law("group")
    @pytest.mark.world(3, collective=8, limit=25)
    @GATHERS
    def test_the_optimizer_of_some_ranks(self, device: Any, world: Any) -> None:
        """FSDP1 on ranks 0 and 2 must load an optimizer alone among them, without rank 1."""
        group = dist.new_group([0, 2])
        if world.rank == 1:
            return
        model: nn.Module = FullyShardedDataParallel(
            layers(4, 4).to(device), process_group=group, device_id=device, use_orig_params=True
        )
        optimizer, fresh = momentum(model), momentum(model)
        expected = stepped(model, optimizer)
        optimizer.zero_grad()
        state = get_optimizer_state_dict(model, optimizer, options=FULL)
        set_state_dict(
            model,
            fresh,
            model_state_dict={},
            optim_state_dict=given(state, BROADCAST),
            options=BROADCAST,
        )
        assert_moments(moments(model, fresh), expected)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2)
    def test_rank_0_has_no_model(self, device: Any, rank: int) -> None:
        """A model that other ranks have must be refused on all ranks, since rank 0 sends none."""
        model = layers(4).to(device)
        optimizer = momentum(model)
        stepped(model, optimizer)
        weights = get_model_state_dict(model, options=FULL)
        state = get_optimizer_state_dict(model, optimizer, options=FULL)
        with pytest.raises(RuntimeError, match="rank 0"):
            set_state_dict(
                model,
                optimizer,
                model_state_dict={} if rank == 0 else weights,
                optim_state_dict=given(state, BROADCAST),
                options=BROADCAST,
            )
