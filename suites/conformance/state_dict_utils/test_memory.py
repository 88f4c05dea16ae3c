"""What a call needs besides its result: a part of the model, never a model.

The model is 96 MiB in 24 tensors, over four ranks. Besides the result half of that is allowed:
room for the buffers of an implementation and of its backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from conformance.kit.layouts import R, S, dtensor, rows, sharded_tensor
from conformance.kit.levels import MEMORY
from conformance.kit.memory import MIB, peak_growth

pytestmark = pytest.mark.needs("resident memory")

WHOLE = 96 * MIB
SHARE = WHOLE // 4
BESIDES = WHOLE // 2

NAMES = [f"layer{n}.weight" for n in range(24)]

Model = dict[str, Any]


@pytest.fixture
def grows(device: torch.device) -> Callable[..., None]:
    """`grows(to, make)`: the call that `make(model)` gives grows by `to` bytes and little more.

    A small model goes first, or the pages of code that a first call touches would count. `make`
    takes out of the model what is not to stay.
    """

    def check(to: int, make: Callable[[Model], Callable[[], Any]]) -> None:
        grown = 0
        for length in (64, MIB // 4):
            model: Model = {
                name: torch.full((length, 4), float(n), device=device)
                for n, name in enumerate(NAMES)
            }
            call = make(model)
            grown = peak_growth(call, device)
            model.clear()
        said = f"{grown / MIB:.0f} MiB at the highest for a result of {to // MIB}"
        print(said)
        assert grown <= to + BESIDES, f"{said}; expected at most {BESIDES // MIB} more"

    return check


def sharded(model: Model, mesh: Any, *placements: Any) -> Model:
    """The model as DTensors, and no longer whole."""
    return {name: dtensor(model.pop(name), mesh, placements) for name in NAMES}


def targets(model: Model, mesh: Any, placement: Any) -> Model:
    """DTensors for the model to land in, with other values."""
    return {name: dtensor(model[name] + 1, mesh, [placement]) for name in NAMES}


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGather:
    @pytest.mark.law("cost")
    @pytest.mark.should(MEMORY)
    @pytest.mark.world(4)
    @pytest.mark.parametrize("dim", [0, 1])
    def test_a_result_and_a_bucket(self, judged: Any, mesh: Any, grows: Any, dim: int) -> None:
        """Besides the model that it gets, a rank must need no more than a bucket."""

        def make(model: Model) -> Callable[[], Any]:
            value = sharded(model, mesh(4), S(dim))
            return lambda: judged(value)

        grows(WHOLE, make)

    @pytest.mark.law("cost")
    @pytest.mark.should(MEMORY)
    @pytest.mark.world(4)
    @pytest.mark.parametrize("dims", [(0, 0), (0, 1)], ids=str)
    def test_over_an_unsorted_mesh(
        self, judged: Any, mesh: Any, grows: Any, dims: tuple[int, int]
    ) -> None:
        """Over an unsorted 2-D mesh a rank must need no more than the model and a bucket."""

        def make(model: Model) -> Callable[[], Any]:
            value = sharded(model, mesh(2, 2, ranks=[3, 1, 0, 2]), *map(S, dims))
            return lambda: judged(value)

        grows(WHOLE, make)

    @pytest.mark.law("cost")
    @pytest.mark.should(MEMORY)
    @pytest.mark.world(4)
    def test_others_only_send(self, judged: Any, mesh: Any, rank: int, grows: Any) -> None:
        """Ranks that get no result must need no more than a bucket."""

        def make(model: Model) -> Callable[[], Any]:
            value = sharded(model, mesh(4), S(0))
            return lambda: judged(value, ranks_only=(2,))

        grows(WHOLE if rank == 2 else 0, make)


@pytest.mark.judges("_state_dict_utils._all_gather_sharded_tensor")
class TestAllGatherShardedTensor:
    @pytest.mark.law("cost")
    @pytest.mark.should(MEMORY)
    @pytest.mark.world(4)
    def test_a_result_and_a_bucket(self, judged: Any, grows: Any) -> None:
        """For one tensor as large as the model a rank must need it and a bucket, no more."""

        def make(model: Model) -> Callable[[], Any]:
            whole = torch.cat(list(model.values()))
            model.clear()
            tensor = sharded_tensor(whole, rows(whole.shape, [len(whole) // 4] * 4))
            return lambda: judged(tensor)

        grows(WHOLE, make)


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcast:
    @pytest.mark.law("cost")
    @pytest.mark.should(MEMORY)
    @pytest.mark.world(4)
    @pytest.mark.parametrize("dim", [0, 1])
    def test_shards_are_filled_where_they_are(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, grows: Any, dim: int
    ) -> None:
        """To fill sharded targets that have memory, a rank must need no more than a bucket."""

        def make(model: Model) -> Callable[[], Any]:
            mine = targets(model, mesh(4), S(dim))
            full = {} if rank else dict(model)
            return lambda: judged(full, mine, device)

        grows(0, make)

    @pytest.mark.law("cost")
    @pytest.mark.should(MEMORY)
    @pytest.mark.world(4)
    def test_no_rank_needs_a_large_tensor_whole(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, grows: Any
    ) -> None:
        """No rank must hold a large tensor whole that is for shards, wherever the source has it."""
        for home in dict.fromkeys([device, torch.device("cpu")]):

            def make(model: Model, home: torch.device = home) -> Callable[[], Any]:
                whole = torch.cat(list(model.values()))
                model.clear()
                mine = {"weight": dtensor(whole + 1, mesh(4), [S(0)])}
                full = {} if rank else {"weight": whole.to(home)}
                return lambda: judged(full, mine, device)

            grows(0, make)

    @pytest.mark.law("cost")
    @pytest.mark.should(MEMORY)
    @pytest.mark.world(4)
    def test_plain_targets_are_made_anew(
        self, judged: Any, rank: int, device: torch.device, grows: Any
    ) -> None:
        """For plain targets a rank must need the model once and a bucket, no more."""

        def make(model: Model) -> Callable[[], Any]:
            mine = {name: torch.empty_like(tensor) for name, tensor in model.items()}
            full = {} if rank else dict(model)
            return lambda: judged(full, mine, device)

        grows(WHOLE, make)


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistribute:
    @pytest.mark.law("cost")
    @pytest.mark.should(MEMORY)
    @pytest.mark.world(4)
    @pytest.mark.parametrize("placement", [S(0), S(1), R], ids=str)
    def test_the_shards_and_no_more(
        self, judged: Any, mesh: Any, device: torch.device, grows: Any, placement: Any
    ) -> None:
        """A rank that cuts its part from the model must need that part and a bucket, no more."""

        def make(model: Model) -> Callable[[], Any]:
            mine = targets(model, mesh(4), placement)
            full = dict(model)
            return lambda: judged(full, mine, device)

        grows(WHOLE if placement == R else SHARE, make)


@pytest.mark.judges("_state_dict_utils._copy_state_dict")
class TestCopy:
    @pytest.mark.law("cost")
    @pytest.mark.should(MEMORY)
    @pytest.mark.world(1)
    def test_values_go_straight_to_their_place(self, judged: Any, grows: Any) -> None:
        """A copy between state dicts that have memory must need no more than a bucket."""

        def make(model: Model) -> Callable[[], Any]:
            source = dict(model)
            target = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
            return lambda: judged(source, target)

        grows(0, make)
