"""Every bit pattern that a dtype has, in every kind of leaf, through each function."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch

from conformance.kit.agree import attempt
from conformance.kit.compare import assert_same, local
from conformance.kit.data import DTYPES
from conformance.kit.functions import Function, Place, each
from conformance.kit.layouts import S, dtensor, part
from conformance.kit.patterns import patterns, uneven

# What Gloo moves, and torch computes with.
USUAL = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
]
# A kind whose numbers are added to others, and kinds that take collectives of torch's own.
_COMPUTED = {"pending"}
_WITH_TORCH = {"unfinished", "unfinished rows", "rows of wrappers"}


def _some(values: torch.Tensor) -> list[torch.Tensor]:
    """Twenty of all, and twenty NaNs."""
    flat = values.reshape(-1)
    odd = flat[flat.isnan()]
    return [part for found in (flat, odd) for part in found[:: len(found) // 20 + 1].clone()]


_copies = each(lambda function: function.values and not function.same_objects)


@pytest.mark.law("values")
@pytest.mark.world(2)
@pytest.mark.parametrize("what", ["usual", "rare"])
@_copies
@pytest.mark.thorough(but=["rare"])
def test_every_bit(
    function: Function,
    mesh: Any,
    world: Any,
    subject: Any,
    device: torch.device,
    what: str,
) -> None:
    """Each bit pattern of each dtype must arrive as it left, in each kind of leaf."""
    place = Place(world, mesh(2), subject, device)
    leaves = {
        f"{name} of {dtype}": (name, uneven(patterns(dtype, columns=4)).to(device))
        for name, kind in function.kinds().items()
        for dtype in DTYPES
        if name not in _COMPUTED
        and (dtype in USUAL or name not in _WITH_TORCH)
        and (kind.usual and dtype in USUAL) == (what == "usual")
    }
    if "rows" in function.kinds() and what == "rare":
        leaves |= {
            f"0-dim {kind} {number} of {dtype}": (kind, value.to(device))
            for dtype in USUAL
            for number, value in enumerate(_some(patterns(dtype, columns=4)))
            for kind in ("plain", "replica")
        }
    call = function.call(place, leaves)
    call.check(call.run())


# Integer dtype -> its smallest value and its largest.
_RANGES = {torch.bool: (0, 1)} | {
    dtype: (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    for dtype in (
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    )
}


@pytest.mark.law("values")
@pytest.mark.world(2, collective=8, limit=30)
@each(lambda function: function.name in ("_broadcast_state_dict", "_distribute_state_dict"))
def test_integers_that_do_not_fit(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device
) -> None:
    """A target without data must be refused, or take all bits of integers of another range."""
    judged = subject.function(f"_state_dict_utils.{function.name}")
    for theirs, ours in permutations(_RANGES, 2):
        (low, high), (least, most) = _RANGES[ours], _RANGES[theirs]
        if low <= least and most <= high:
            continue
        full = torch.tensor([least, most, 1, most - 1], dtype=theirs)
        into = {"w": dtensor(torch.zeros(4, dtype=ours), mesh(2), [S(0)]).to("meta")}
        given = {"w": full} if world.rank == 0 or not function.talks else {}
        if attempt(lambda: judged(given, into, device)) is None:  # noqa: B023
            expected = part(full, mesh(2), [S(0)])
            assert_same(local(into["w"]), expected, f"{theirs} in the place of {ours}")


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistributeIntegers:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_integers_that_fit(self, judged: Any, mesh: Any, device: torch.device) -> None:
        """A target on meta that can hold the integers must keep its own dtype."""
        _assert_taken(lambda full, into: judged(full, into, device), mesh)


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastIntegers:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_integers_that_fit(
        self, judged: Any, mesh: Any, rank: int, device: torch.device
    ) -> None:
        """A target on meta that can hold the integers must keep its own dtype."""
        _assert_taken(lambda full, into: judged({} if rank else full, into, device), mesh)


def _assert_taken(load: Any, mesh: Any) -> None:
    for theirs, ours in (
        (torch.uint8, torch.bfloat16),
        (torch.int16, torch.float32),
        (torch.int32, torch.int64),
        (torch.bool, torch.int8),
    ):
        full = torch.arange(4).to(theirs)
        into = {"w": dtensor(full.to(ours), mesh(2), [S(0)]).to("meta")}
        load({"w": full}, into)
        assert_same(local(into["w"]), part(full.to(ours), mesh(2), [S(0)]), f"{theirs} -> {ours}")
