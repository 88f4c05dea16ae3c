"""More tensors, and larger ones, than any batch or buffer takes, through each function."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch

from conformance.kit.agree import assert_raises_everywhere
from conformance.kit.compare import assert_same, local
from conformance.kit.data import numbers
from conformance.kit.functions import Function, Leaves, Place, each
from conformance.kit.layouts import R, S, dtensor, part
from conformance.kit.refusals import MISSING
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


def _names() -> list[str]:
    """Names of 256 KiB together, which no compression makes much shorter."""
    return [hashlib.shake_256(bytes([n])).hexdigest(1024) for n in range(128)]


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherNames:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=30)
    def test_a_difference_beside_long_names(self, judged: Any, mesh: Any, world: Any) -> None:
        """Ranks that hold many and long names must work, and hear of the one that differs."""
        names, line = _names(), mesh(2)
        value: dict[str, Any] = {
            name: dtensor(numbers(4, 4, salt=n), line, [S(n % 2)]) for n, name in enumerate(names)
        }
        more = value | ({"zz plain": numbers(3)} if world.rank else {})
        got = judged(more)
        for n, name in enumerate(names):
            assert_same(got[name], numbers(4, 4, salt=n), name[:9])
        for key in ("zz last", "!! first"):
            odd = dtensor(numbers(4, 4), line, [S(world.rank)])
            at_its_place = dict(sorted({**value, key: odd}.items()))
            assert_raises_everywhere(world, partial(judged, at_its_place), key, name=key)


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastNames:
    @pytest.mark.law("values")
    @pytest.mark.world(2, collective=8, limit=30)
    def test_a_difference_beside_long_names(
        self, judged: Any, mesh: Any, world: Any, device: torch.device
    ) -> None:
        """Where ranks place the last of many, long names otherwise each must get its part."""
        names, line = [*_names(), "zz last"], mesh(2)
        into: dict[str, Any] = {name: dtensor(torch.zeros(4, 4), line, [S(0)]) for name in names}
        if world.rank:
            into["zz last"] = dtensor(torch.zeros(4, 4), line, [S(1)])
        full = {name: numbers(4, 4, salt=n) for n, name in enumerate(names)}
        judged(full if world.rank == 0 else {}, into, device)
        for name, got in into.items():
            assert_same(local(got), part(full[name], line, got.placements), name[:9])


@pytest.mark.law("symmetry")
@pytest.mark.world(2, collective=8, limit=30)
@pytest.mark.parametrize("at", [0, 1])
@each(lambda function: function.talks and not function.only)
def test_one_rank_has_more_to_tell(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device, at: int
) -> None:
    """An error of any length on one rank, which the others know nothing of, must be on all."""
    judged = subject.function(f"_state_dict_utils.{function.name}")
    line, full, wrong = mesh(2), numbers(4, 4), world.rank == at
    for size in (1 << 10, 20_000, 40_000, 100_000):
        key = "layer.odd" + "w" * size
        fine = dtensor(torch.zeros(4, 4), line, [S(0)])
        into = {"fine": fine, key: dtensor(numbers(2 if wrong else 4, 4), line, [S(0)])}
        if function.name == "_gather_state_dict":
            call = partial(judged, {"fine": fine, key: threading.Lock() if wrong else 3})
        elif function.name == "_broadcast_state_dict":
            call = partial(judged, {"fine": full, key: full}, into, device)
        else:
            info = subject.function("_state_dict_utils._TensorInfo")
            source = dict.fromkeys(into, info(full.shape, full.dtype) if world.rank else full)
            call = partial(judged, source, into, list(into), device)
        assert_raises_everywhere(world, call, "layer.odd", kinds=MISSING, name=str(size))


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherLeavesOfOneRank:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=30)
    @pytest.mark.parametrize("at", [0, 1])
    def test_many_that_others_lack(self, judged: Any, mesh: Any, world: Any, at: int) -> None:
        """Leaves that one rank alone has must be refused on all, however many these are."""
        names = _names()
        for count in (1, 16, 64, 128):
            found = ["fine", *(names[:count] if world.rank == at else ())]
            value = {name: dtensor(numbers(4, 4), mesh(2), [S(0)]) for name in found}
            named = re.compile("|".join(name[:20] for name in names))
            assert_raises_everywhere(
                world, partial(judged, value), named, kinds=MISSING, name=str(count)
            )
