"""The bound on memory of what moves tensors between ranks: every option, every kind of leaf.

For each rank, and each device that tensors lie on:

    growth <= result + model / 2

where `result` is what this rank is given in new memory on that device (see `kit.growth`):

    gather        the model on the ranks that want it; on a device nothing with `cpu_offload`
    broadcast,    nothing for a DTensor with memory where the result belongs, this rank's part for
    distribute    one without, the model for plain targets
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial

from conformance.kit.growth import (
    WHOLE,
    Call,
    Model,
    assert_grows,
    result_on,
    sharded,
)
from conformance.kit.layouts import SS, R, S, rows, sharded_tensor

pytestmark = pytest.mark.needs("resident memory")


@pytest.fixture
def grows(device: torch.device) -> Callable[..., None]:
    """`grows(to, make)`: see `kit.growth.assert_grows`."""
    return partial(assert_grows, device=device)


def _pending(model: Model, mesh: Any) -> Model:
    return {
        name: DTensor.from_local(model.pop(name), mesh, [Partial()], run_check=False)
        for name in list(model)
    }


def _sharded_tensors(model: Model) -> Model:
    made = {}
    for name in list(model):
        whole = model.pop(name)
        made[name] = sharded_tensor(whole, rows(whole.shape, [len(whole) // 4] * 4))
    return made


# Name -> a state dict of the model in leaves of that kind, over four ranks.
LEAVES: dict[str, Callable[[Model, Any], Model]] = {
    "rows": lambda model, mesh: sharded(model, mesh(4), S(0)),
    "columns": lambda model, mesh: sharded(model, mesh(4), S(1)),
    "grid": lambda model, mesh: sharded(model, mesh(2, 2), S(0), S(1)),
    "FSDP over TP": lambda model, mesh: sharded(model, mesh(2, 2), SS(0, 2), S(0)),
    "replicas": lambda model, mesh: sharded(model, mesh(4), R),
    "pending": lambda model, mesh: _pending(model, mesh(4)),
    "ShardedTensor": lambda model, _: _sharded_tensors(model),
    "plain": lambda model, _: dict(model),
    "parameters": lambda model, _: {n: nn.Parameter(t) for n, t in model.items()},
    "nested": lambda model, mesh: {"model": [sharded(model, mesh(4), S(0)), {}]},
    "tied": lambda model, mesh: (
        lambda held: {"one": held, "two": {n: t.detach() for n, t in held.items()}}
    )(sharded(model, mesh(4), S(0))),
}


def _also(value: Any) -> Any:
    """One more variant: each takes seconds."""
    return pytest.param(value, marks=pytest.mark.thorough)


_EACH_RUN = {"tied"}
KINDS = [
    pytest.param(
        make,
        id=name.replace(" ", "-"),
        marks=() if name in _EACH_RUN else pytest.mark.thorough,
    )
    for name, make in LEAVES.items()
]


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherMemory:
    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("leaves", KINDS)
    def test_offloaded(
        self, judged: Any, mesh: Any, device: torch.device, grows: Any, leaves: Any
    ) -> None:
        """With `cpu_offload` the model must be held once, on the CPU, and never on the device."""

        def make(model: Model) -> Call:
            value = leaves(model, mesh)
            return lambda: judged(value, cpu_offload=True)

        grows(result_on(device, WHOLE, cpu_offload=True), make)

    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    @pytest.mark.thorough
    @pytest.mark.parametrize("leaves", KINDS)
    def test_offloaded_on_some_ranks(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, grows: Any, leaves: Any
    ) -> None:
        """With `ranks_only` the others must not make room for a result that they are not given."""

        def make(model: Model) -> Call:
            value = leaves(model, mesh)
            return lambda: judged(value, cpu_offload=True, ranks_only=(1,))

        grows(result_on(device, WHOLE, cpu_offload=True) if rank == 1 else 0, make)

    @pytest.mark.law("cost")
    @pytest.mark.thorough
    @pytest.mark.world(4)
    @pytest.mark.parametrize(
        "options",
        [{"ranks_only": (3, 1)}, {"ranks_only": (1, 2, 3)}, {"pg": True}, {"type_check": False}],
        ids=["two-ranks", "three-ranks", "pg", "unchecked"],
    )
    def test_other_options(
        self, judged: Any, mesh: Any, rank: int, grows: Any, options: dict[str, Any]
    ) -> None:
        """No other option may cost more than the result and a part of the model."""
        wanted = options.get("ranks_only", range(4))
        if "pg" in options:
            options = {"pg": dist.group.WORLD}

        def make(model: Model) -> Call:
            value = sharded(model, mesh(4), S(0))
            return lambda: judged(value, **options)

        grows(WHOLE if rank in wanted else 0, make)

    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("cpu_offload", [False, _also(True)], ids=["device", "cpu"])
    @pytest.mark.parametrize("placement", [S(0), _also(S(1)), _also(SS(0, 2))], ids=str)
    def test_a_large_tensor(
        self,
        judged: Any,
        mesh: Any,
        device: torch.device,
        grows: Any,
        placement: Any,
        cpu_offload: bool,
    ) -> None:
        """One tensor as large as the model must take no more than many that are as large."""

        def make(model: Model) -> Call:
            value = sharded(model, mesh(4), placement)
            return lambda: judged(value, cpu_offload=cpu_offload)

        grows(result_on(device, WHOLE, cpu_offload), make, single=True)

    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("kind", ["pending", "ShardedTensor"])
    @pytest.mark.thorough(but=["ShardedTensor"])
    def test_a_large_tensor_of_another_kind(
        self, judged: Any, mesh: Any, rank: int, grows: Any, kind: str
    ) -> None:
        """The same must hold where it has to be reduced, or is no DTensor, for one rank alone."""

        def make(model: Model) -> Call:
            value = LEAVES[kind](model, mesh)
            return lambda: judged(value, ranks_only=(0,))

        grows(WHOLE if rank == 0 else 0, make, single=True)


@pytest.mark.judges("_state_dict_utils._all_gather_sharded_tensor")
class TestAllGatherShardedTensorMemory:
    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    @pytest.mark.parametrize(
        "cut", [_also("columns"), "uneven", _also("on one rank"), _also("two shards a rank")]
    )
    def test_in_any_shards(self, judged: Any, device: torch.device, grows: Any, cut: str) -> None:
        """However it is cut, a large tensor must take its result and a part of the model."""

        def make(model: Model) -> Call:
            whole = model.pop("weight")
            part = len(whole) // 8
            boxes = {
                "columns": lambda: rows(whole.shape, [1] * 4, dim=1),
                "uneven": lambda: rows(whole.shape, [part, 3 * part, 0, 4 * part]),
                "on one rank": lambda: rows(whole.shape, [8 * part], [2]),
                "two shards a rank": lambda: rows(whole.shape, [part] * 8, [0, 1, 2, 3] * 2),
            }[cut]()
            tensor = sharded_tensor(whole, boxes)
            return lambda: judged(tensor, device=device)

        grows(WHOLE, make, single=True)
