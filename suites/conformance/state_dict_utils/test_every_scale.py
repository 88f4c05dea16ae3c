"""More tensors, and larger ones, than any batch or buffer takes, through each function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from conformance.kit.compare import assert_same, local
from conformance.kit.functions import Function, Leaves, Place, each
from conformance.kit.layouts import R, S, dtensor, part
from conformance.kit.scales import LARGE, MANY


@pytest.mark.law("values")
@pytest.mark.world(2)
@each(lambda function: function.values and not function.same_objects)
def test_many(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device
) -> None:
    """Each tensor must arrive, however many there are, and of whatever size in bytes."""
    _assert_arrive(function, Place(world, mesh(2), subject, device), MANY)


@pytest.mark.law("values")
@pytest.mark.world(2)
@each(lambda function: function.talks)
def test_a_large_one(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device
) -> None:
    """One that no buffer takes must arrive as the others do, before, between or behind them."""
    _assert_arrive(function, Place(world, mesh(2), subject, device), LARGE)


def _assert_arrive(
    function: Function, place: Place, scales: Mapping[str, Callable[[], Leaves]]
) -> None:
    known = function.kinds()
    for name, make in scales.items():
        leaves = {
            key: (kind if kind in known else next(iter(known)), full.to(place.device))
            for key, (kind, full) in make().items()
        }
        if "rows" not in known:
            # One call a tensor: what many of them share is nothing here.
            few = list(leaves.items())[:40]
            leaves = {key: (kind, full.contiguous()) for key, (kind, full) in few}
        call = function.call(place, leaves)
        try:
            call.check(call.run())
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastGrid:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_large_ones(self, judged: Any, mesh: Any, world: Any, device: torch.device) -> None:
        """What is cut over two dimensions must arrive on every rank, whatever its size."""
        square = mesh(2, 2)
        full: dict[str, torch.Tensor] = {}
        layouts: list[list[Any]] = [
            [S(0), S(1)],
            [R, R],
            [S(1), S(0)],
            [S(0), S(0)],
            [R, S(1)],
            [S(0), R],
            [R, R],
        ]
        for size in (96, 160, 512, 1024):
            whole = (torch.arange(size * size) % 251).float().view(size, size)
            full |= {f"{size} {n}": whole + n for n in range(len(layouts))}
        into = {
            key: dtensor(torch.zeros_like(whole), square, layouts[n % len(layouts)])
            for n, (key, whole) in enumerate(full.items())
        }
        given = {}
        if world.rank == 0:  # every second one lies turned in the source's memory
            given = {
                key: whole.t().contiguous().t() if n % 2 else whole
                for n, (key, whole) in enumerate(full.items())
            }
        judged(given, into, device)
        for key, got in into.items():
            assert_same(local(got), part(full[key], square, got.placements), key)
