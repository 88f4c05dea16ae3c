"""The bound on memory of what a rank does alone: every option, every kind of leaf.

For each device that tensors lie on:

    growth <= result + model / 2

where `result` is what is handed out in new memory on that device (see `kit.growth`):

    offload, iterate      the model on the CPU, once however many leaves share its memory
    create                the model on the CPU if shared, else nothing, for nobody writes there
    copy, similarity,     nothing
    flatten, unflatten
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from conformance.kit.growth import WHOLE, Call, Model, assert_grows, result_on, sharded
from conformance.kit.layouts import S

pytestmark = [pytest.mark.needs("resident memory"), pytest.mark.thorough]


@pytest.fixture
def grows(device: torch.device) -> Callable[..., None]:
    """`grows(to, make)`: see `kit.growth.assert_grows`."""
    return partial(assert_grows, device=device)


# Name -> leaves of which a copy takes as much as the model, and no more.
SNAPSHOTS: dict[str, Callable[[Model, Any], Model]] = {
    "plain": lambda model, _: dict(model),
    "parameters": lambda model, _: {n: nn.Parameter(t) for n, t in model.items()},
    "DTensors": lambda model, mesh: sharded(model, mesh(1), S(0)),
    "the same tensors twice": lambda model, _: {"a": dict(model), "b": [*model.values()]},
    "parameters and their twins": lambda model, _: (
        lambda held: {"a": held, "b": {n: t.detach() for n, t in held.items()}}
    )({n: nn.Parameter(t) for n, t in model.items()}),
    "DTensors and their twins": lambda model, mesh: (
        lambda held: {"a": held, "b": {n: t.detach() for n, t in held.items()}}
    )(sharded(model, mesh(1), S(0))),
    "tensors and their transposes": lambda model, _: {
        "a": dict(model),
        "b": {n: t.t() for n, t in model.items()},
    },
    "DTensors and what is in them": lambda model, mesh: (
        lambda held: {"a": held, "b": {n: t.to_local() for n, t in held.items()}}
    )(sharded(model, mesh(1), S(0))),
    "most of each and all of it": lambda model, _: {
        "a": {n: t[len(t) // 8 :] for n, t in model.items()},
        "b": dict(model),
    },
}
SNAPSHOT_KINDS = [pytest.param(make, id=name.replace(" ", "-")) for name, make in SNAPSHOTS.items()]


@pytest.mark.judges("_state_dict_utils._offload_state_dict_to_cpu")
class TestOffloadMemory:
    @pytest.mark.law("cost")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("leaves", SNAPSHOT_KINDS)
    def test_the_model_once(
        self, judged: Any, mesh: Any, device: torch.device, grows: Any, leaves: Any
    ) -> None:
        """A snapshot must hold each byte of the model once, however many leaves show it."""

        def make(model: Model) -> Call:
            value = leaves(model, mesh)
            return lambda: judged(value)

        grows(result_on(device, WHOLE, cpu_offload=True), make)

    @pytest.mark.law("cost")
    @pytest.mark.world(2)
    def test_nothing_for_nobody(self, judged: Any, rank: int, device: Any, grows: Any) -> None:
        """A rank outside `ranks_only` must not copy anything."""

        def make(model: Model) -> Call:
            value = dict(model)
            return lambda: judged(value, ranks_only=(1,))

        grows(result_on(device, WHOLE, cpu_offload=True) if rank == 1 else 0, make)


@pytest.mark.judges("_state_dict_utils._iterate_state_dict")
class TestIterateMemory:
    @pytest.mark.law("cost")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("leaves", SNAPSHOT_KINDS)
    def test_the_model_once(
        self, judged: Any, mesh: Any, device: torch.device, grows: Any, leaves: Any
    ) -> None:
        """With `cpu_offload` results must be held once, however many leaves show them."""

        def make(model: Model) -> Call:
            value = leaves(model, mesh)
            return lambda: judged(value, _same, _same, _same, cpu_offload=True)

        grows(result_on(device, WHOLE, cpu_offload=True), make)

    @pytest.mark.law("cost")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("non_blocking", [False, True], ids=["waiting", "non-blocking"])
    def test_into_a_companion(self, judged: Any, grows: Any, non_blocking: bool) -> None:
        """Values must go straight into the memory of a companion, `cpu_offload` or not."""

        def make(model: Model) -> Call:
            into = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
            return partial(
                judged,
                dict(model),
                *[_same] * 3,
                cpu_offload=True,
                companion_obj=into,
                non_blocking=non_blocking,
            )

        grows(0, make)

    @pytest.mark.law("cost")
    @pytest.mark.world(1)
    def test_a_walk_that_changes_nothing(self, judged: Any, grows: Any) -> None:
        """A walk whose functions return what they are given must copy nothing."""

        def make(model: Model) -> Call:
            value = dict(model)
            return lambda: judged(value, _same, _same, _same)

        grows(0, make)


def _same(tensor: Any, *_: Any) -> Any:
    return tensor


@pytest.mark.judges("_state_dict_utils._create_cpu_state_dict")
class TestCreateMemory:
    @pytest.mark.law("cost")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("share", [False, True], ids=["own", "shared"])
    @pytest.mark.parametrize("leaves", SNAPSHOT_KINDS)
    def test_the_model_once_at_most(
        self,
        judged: Any,
        mesh: Any,
        device: torch.device,
        grows: Any,
        leaves: Any,
        share: bool,
    ) -> None:
        """Buffers must not be written, but for what sharing writes, and that once."""

        def make(model: Model) -> Call:
            value = leaves(model, mesh)
            return lambda: judged(value, share_memory=share)

        grows(result_on(device, WHOLE, cpu_offload=True) if share else 0, make)


@pytest.mark.judges("_state_dict_utils._copy_state_dict")
class TestCopyMemory:
    @pytest.mark.law("cost")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("kind", ["tensors", "DTensors", "transposed", "parameters", "uint16"])
    @pytest.mark.parametrize("non_blocking", [False, True], ids=["waiting", "non-blocking"])
    def test_straight_into_place(
        self, judged: Any, mesh: Any, grows: Any, kind: str, non_blocking: bool
    ) -> None:
        """Values of every kind must go straight into the memory that takes them."""

        def make(model: Model) -> Call:
            source: Model = dict(model)
            into: Model = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
            if kind == "DTensors":
                source, into = (sharded(held, mesh(1), S(0)) for held in (source, into))
            elif kind == "transposed":
                into = {name: tensor.view(4, -1).t() for name, tensor in into.items()}
            elif kind == "parameters":
                source = {name: nn.Parameter(tensor) for name, tensor in source.items()}
                into = {name: nn.Parameter(tensor) for name, tensor in into.items()}
            elif kind == "uint16":
                source = {name: tensor.view(torch.uint16) for name, tensor in source.items()}
                into = {name: tensor.view(torch.uint16) for name, tensor in into.items()}
            return lambda: judged(source, into, non_blocking=non_blocking)

        grows(0, make)


@pytest.mark.judges("_state_dict_utils._check_state_dict_similarity")
class TestSimilarityMemory:
    @pytest.mark.law("cost")
    @pytest.mark.world(1)
    def test_nothing_is_copied(self, judged: Any, grows: Any) -> None:
        """A comparison must take no memory, for it reads no values."""

        def make(model: Model) -> Call:
            other = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
            return lambda: judged(dict(model), other)

        grows(0, make)


@pytest.mark.judges("_state_dict_utils._flatten_state_dict")
class TestFlattenMemory:
    @pytest.mark.law("cost")
    @pytest.mark.world(1)
    def test_nothing_is_copied(self, judged: Any, subject: Any, grows: Any) -> None:
        """Flattening and the way back must hand on the very tensors."""
        back = subject.function("_state_dict_utils._unflatten_state_dict")

        def make(model: Model) -> Call:
            value = {"model": [dict(model)]}
            return lambda: back(*judged(value))

        grows(0, make)
