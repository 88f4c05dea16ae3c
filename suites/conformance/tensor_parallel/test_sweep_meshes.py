"""Groups and meshes that are not all ranks in their own order, for every function at once."""

from __future__ import annotations

from typing import Any

import pytest

from conformance.kit.data import numbers
from conformance.kit.groups import UNSORTED
from conformance.kit.tp_kinds import Seat, Unusual
from conformance.kit.tp_roads import Function, functions


def _right(function: Function, judged: Any, seat: Seat, rows: tuple[int, ...]) -> None:
    for length in rows:
        full = numbers(length, 3)
        for name, road in function.roads(full, seat):
            try:
                road.check(road.call(judged), full)
            except AssertionError as error:
                raise AssertionError(f"{name}, {length} rows: {error}") from None


class TestMeshes:
    @pytest.mark.law("group")
    @UNSORTED
    @functions(2, lambda function: function.placed, world=3)
    def test_any_mesh(self, function: Function, judged: Any, seat: Seat) -> None:
        """On meshes in another order, of some ranks, of one, each member must get its part."""
        _right(function, judged, Unusual(seat.mesh, seat.world, seat.subject), (7, 2, 0))

    @pytest.mark.law("group")
    @UNSORTED
    @functions(4, world=3)
    def test_any_root_of_three(self, function: Function, judged: Any, seat: Seat) -> None:
        """On a root mesh of odd size, in another order, each rank must get its part."""
        for shape in ((3, 1), (1, 3), (1, 3, 1), (3, 1, 1)):
            unusual = Unusual(seat.mesh, seat.world, seat.subject, shape)
            _right(function, judged, unusual, (9, 3))

    @pytest.mark.law("group")
    @UNSORTED
    @functions(4)
    def test_any_root_of_four(self, function: Function, judged: Any, seat: Seat) -> None:
        """On a root mesh in another order, with replicas, too, each rank must get its part."""
        for shape in ((2, 2), (2, 1, 2), (1, 2, 2), (2, 2, 1)):
            unusual = Unusual(seat.mesh, seat.world, seat.subject, shape)
            _right(function, judged, unusual, (8, 4))
