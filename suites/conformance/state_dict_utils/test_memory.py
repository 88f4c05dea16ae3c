"""What a call needs besides its result: a part of the model, never a model.

The bound is that of `kit.growth`. test_memory_options.py and test_memory_alone.py hold every option
to it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from conformance.kit.growth import SHARE, WHOLE, Model, assert_grows, sharded, targets
from conformance.kit.layouts import R, S, dtensor, rows, sharded_tensor
from conformance.kit.levels import MEMORY

pytestmark = pytest.mark.needs("resident memory")


@pytest.fixture
def grows(device: torch.device) -> Callable[..., None]:
    """`grows(to, make)`: see `kit.growth.assert_grows`."""
    return partial(assert_grows, device=device)


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGather:
    @pytest.mark.law("cost")
    @pytest.mark.should(MEMORY)
    @pytest.mark.world(4)
    @pytest.mark.parametrize("dim", [0, 1])
    @pytest.mark.thorough(but=["1"])
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
    @pytest.mark.thorough
    def test_over_an_unsorted_mesh(
        self, judged: Any, mesh: Any, grows: Any, dims: tuple[int, int]
    ) -> None:
        """Over an unsorted 2-D mesh a rank must need no more than the model and a bucket."""

        def make(model: Model) -> Callable[[], Any]:
            value = sharded(model, mesh(2, 2, ranks=[3, 1, 2, 0]), *map(S, dims))
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
    @pytest.mark.thorough(but=["0"])
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
    @pytest.mark.thorough(but=["R"])
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
