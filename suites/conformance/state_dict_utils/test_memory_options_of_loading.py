"""The bound on memory of broadcast and distribute, as test_memory_options.py states it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from conformance.kit.groups import group
from conformance.kit.growth import (
    NAMES,
    SHARE,
    WHOLE,
    Call,
    Model,
    assert_grows,
    result_on,
    targets,
)
from conformance.kit.layouts import R, S, dtensor

pytestmark = pytest.mark.needs("resident memory")


@pytest.fixture
def grows(device: torch.device) -> Callable[..., None]:
    """`grows(to, make)`: see `kit.growth.assert_grows`."""
    return partial(assert_grows, device=device)


def _also(value: Any) -> Any:
    """One more variant: each takes seconds."""
    return pytest.param(value, marks=pytest.mark.thorough)


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastMemory:
    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("strict", [False, _also(True)], ids=["loose", "strict"])
    @pytest.mark.parametrize("cpu_offload", [_also(False), True], ids=["device", "cpu"])
    @pytest.mark.parametrize("placement", [S(0), _also(R)], ids=str)
    def test_options(
        self,
        judged: Any,
        mesh: Any,
        rank: int,
        device: torch.device,
        grows: Any,
        placement: Any,
        cpu_offload: bool,
        strict: bool,
    ) -> None:
        """Targets that have memory must be filled there, with any options."""

        def make(model: Model) -> Call:
            mine = targets(model, mesh(4), placement)
            full = {} if rank else dict(model)
            return lambda: judged(full, mine, device, strict=strict, cpu_offload=cpu_offload)

        grows(0, make)

    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("cpu_offload", [False, True], ids=["device", "cpu"])
    @pytest.mark.parametrize("kind", ["sharded", _also("replicated"), _also("plain"), "tied"])
    @pytest.mark.thorough(but=["tied-device"])
    def test_targets_on_meta(
        self,
        judged: Any,
        mesh: Any,
        rank: int,
        device: torch.device,
        grows: Any,
        kind: str,
        cpu_offload: bool,
    ) -> None:
        """Targets on meta must be made once, in this rank's part of the model."""

        def make(model: Model) -> Call:
            bare = {name: tensor.to("meta") for name, tensor in model.items()}
            mine: Model = bare
            if kind == "tied":
                mine = {**bare, **{f"twin.{name}": tensor for name, tensor in bare.items()}}
            elif kind != "plain":
                placement = S(0) if kind == "sharded" else R
                mine = {n: dtensor(t, mesh(4), [placement]) for n, t in bare.items()}
            full = dict(model)
            if kind == "tied":
                full.update({f"twin.{name}": tensor for name, tensor in model.items()})
            source = {} if rank else full
            if rank:
                full.clear()
            return lambda: judged(source, mine, device, cpu_offload=cpu_offload)

        grows(result_on(device, SHARE if kind == "sharded" else WHOLE, cpu_offload), make)

    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    def test_what_nobody_wants(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, grows: Any
    ) -> None:
        """Keys that no rank has must take no memory anywhere."""

        def make(model: Model) -> Call:
            mine = targets({NAMES[0]: model[NAMES[0]]}, mesh(4), S(0))
            full = {} if rank else dict(model)
            return lambda: judged(full, mine, device, strict=True)

        grows(0, make)

    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    def test_what_one_rank_wants(
        self, judged: Any, rank: int, device: torch.device, grows: Any
    ) -> None:
        """Plain targets of one rank alone must take no memory on the others."""

        def make(model: Model) -> Call:
            mine = {n: torch.empty_like(t) for n, t in model.items()} if rank == 2 else {}
            full = {} if rank else dict(model)
            return lambda: judged(full, mine, device)

        grows(WHOLE if rank == 2 else 0, make)

    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    def test_in_a_group(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, grows: Any
    ) -> None:
        """In a group of some of the ranks the bound must hold as in all of them."""
        some, line = group(1, 3), mesh(2, ranks=[1, 3])
        if rank not in (1, 3):
            return

        def make(model: Model) -> Call:
            mine = targets(model, line, S(0))
            full = {} if rank != 1 else dict(model)
            return lambda: judged(full, mine, device, pg=some)

        grows(0, make)

    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("what", ["dtype", "strides"])
    @pytest.mark.thorough(but=["strides"])
    def test_targets_that_take_more_than_a_copy(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, grows: Any, what: str
    ) -> None:
        """Targets of another dtype or other strides must be filled without a copy of the model."""

        def make(model: Model) -> Call:
            if what == "dtype":
                other = {name: tensor.double() for name, tensor in model.items()}
                mine = targets(other, mesh(4), S(0))
            else:
                mine = {}
                for name, tensor in model.items():
                    wide = torch.zeros(4, len(tensor) // 4, device=tensor.device).t()
                    mine[name] = dtensor(tensor, mesh(4), [S(0)], local=wide)
            full = {} if rank else dict(model)
            return lambda: judged(full, mine, device)

        grows(0, make)


@pytest.mark.judges("_state_dict_utils._broadcast_tensors")
class TestBroadcastTensorsMemory:
    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("meta", [_also(False), True], ids=["memory", "meta"])
    def test_shards(
        self,
        judged: Any,
        subject: Any,
        mesh: Any,
        rank: int,
        device: torch.device,
        grows: Any,
        meta: bool,
    ) -> None:
        """Shards must be filled where they are, or made once, without whole tensors on the way."""
        info = subject.function("_state_dict_utils._TensorInfo")

        def make(model: Model) -> Call:
            mine = targets(model, mesh(4), S(0))
            if meta:
                mine = {n: dtensor(t.to("meta"), mesh(4), [S(0)]) for n, t in model.items()}
            source = {n: info(t.shape, t.dtype) if rank else t for n, t in model.items()}
            return lambda: judged(source, mine, NAMES, device)

        grows(SHARE if meta else 0, make)


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistributeMemory:
    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("kind", ["sharded", "plain", "tied"])
    @pytest.mark.thorough(but=["sharded"])
    def test_targets_on_meta(
        self, judged: Any, mesh: Any, device: torch.device, grows: Any, kind: str
    ) -> None:
        """Targets on meta must be made once, in this rank's part of the model."""

        def make(model: Model) -> Call:
            bare = {name: tensor.to("meta") for name, tensor in model.items()}
            mine: Model = dict(bare)
            full = dict(model)
            if kind == "tied":
                mine.update({f"twin.{name}": tensor for name, tensor in bare.items()})
                full.update({f"twin.{name}": tensor for name, tensor in model.items()})
            elif kind == "sharded":
                mine = {n: dtensor(t, mesh(4), [S(0)]) for n, t in bare.items()}
            return lambda: judged(full, mine, device)

        grows(SHARE if kind == "sharded" else WHOLE, make)


@pytest.mark.judges("_state_dict_utils._distribute_tensors")
class TestDistributeTensorsMemory:
    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("meta", [_also(False), True], ids=["memory", "meta"])
    def test_shards(
        self, judged: Any, mesh: Any, device: torch.device, grows: Any, meta: bool
    ) -> None:
        """Shards must be filled where they are, or made once."""

        def make(model: Model) -> Call:
            mine = targets(model, mesh(4), S(0))
            if meta:
                mine = {n: dtensor(t.to("meta"), mesh(4), [S(0)]) for n, t in model.items()}
            pairs = {name: (mine[name], tensor) for name, tensor in model.items()}
            return lambda: judged(pairs, NAMES, device)

        grows(SHARE if meta else 0, make)
