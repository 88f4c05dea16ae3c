"""Copies into a DTensor of another mesh: refused where the parts belong to other ranks.

A copy takes place on each rank by itself, so parts that are numbered otherwise land in the wrong
place of the whole tensor, and nothing shows it. Names of dimensions say nothing of the values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial

from conformance.kit.agree import attempt
from conformance.kit.cases import every_second
from conformance.kit.compare import assert_same, fingerprint, local
from conformance.kit.containers import dashed
from conformance.kit.data import numbers
from conformance.kit.groups import UNSORTED
from conformance.kit.layouts import SS, R, S, dtensor, part

FULL = (8, 8)
Pair = tuple[tuple[DeviceMesh, list[Any]], tuple[DeviceMesh, list[Any]]]

# Name -> (mesh, placements) of the source and of the target, over four ranks. The local shapes are
# the same on both sides, and other values belong there.
OTHER: dict[str, Callable[[Any], Pair]] = {
    "a mesh of another shape": lambda mesh: (
        (mesh(2, 2), [S(0), S(1)]),
        (mesh(2, 2, ranks=[0, 2, 1, 3]), [S(0), S(1)]),
    ),
    "a grid and a line": lambda mesh: ((mesh(2, 2), [SS(0, 2), S(0)]), (mesh(4), [S(0)])),
    "another part of the ranks": lambda mesh: (
        (mesh(2, 2)["tp"], [S(0)]),
        (mesh(2, 2)["dp"], [S(0)]),
    ),
    "rows and columns of a grid": lambda mesh: (
        (mesh(2, 2), [S(0), R]),
        (mesh(2, 2), [R, S(0)]),
    ),
    "whole and pending": lambda mesh: ((mesh(4), [R]), (mesh(4), [Partial()])),
    "pending and whole": lambda mesh: ((mesh(4), [Partial()]), (mesh(4), [R])),
    "sum and average": lambda mesh: ((mesh(4), [Partial()]), (mesh(4), [Partial("avg")])),
    "rows and rows in turn": lambda mesh: ((mesh(4), [S(0)]), (mesh(4), [SS(0, 2)])),
}
TURNED: dict[str, Callable[[Any], Pair]] = {
    "ranks in another order": lambda mesh: (
        (mesh(4), [S(0)]),
        (mesh(4, ranks=[3, 1, 0, 2]), [S(0)]),
    ),
    "a grid in another order": lambda mesh: (
        (mesh(2, 2), [S(0), S(1)]),
        (mesh(2, 2, ranks=[3, 1, 0, 2]), [S(0), S(1)]),
    ),
}
CASES = [
    *(pytest.param(make, id=dashed(name)) for name, make in OTHER.items()),
    *(pytest.param(make, id=dashed(name), marks=UNSORTED) for name, make in TURNED.items()),
]

# The same parts on the same ranks: other objects, or other words.
SAME: dict[str, Callable[[Any], Pair]] = {
    "another object": lambda mesh: (
        (mesh(4), [S(0)]),
        (DeviceMesh(mesh(4).device_type, torch.arange(4), mesh_dim_names=("x",)), [S(0)]),
    ),
    "other names": lambda mesh: ((mesh(4), [S(0)]), (mesh(4, names=("other",)), [S(0)])),
    "no names": lambda mesh: (
        (mesh(2, 2), [S(0), S(1)]),
        (DeviceMesh(mesh(4).device_type, torch.arange(4).view(2, 2)), [S(0), S(1)]),
    ),
    "a part of two meshes": lambda mesh: (
        (mesh(2, 2)["tp"], [S(0)]),
        (mesh(2, 2, names=("other", "tp"))["tp"], [S(0)]),
    ),
}
SAME_CASES = [pytest.param(make, id=dashed(name)) for name, make in SAME.items()]


def _filled(mesh: DeviceMesh, placements: list[Any], salt: int) -> DTensor:
    full = numbers(*FULL, salt=salt)
    return dtensor(full, mesh, placements, local=part(full, mesh, placements).clone())


def _two(make: Callable[[Any], Pair], mesh: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    here, there = make(mesh)
    source, into = _filled(*here, salt=0), _filled(*there, salt=1)
    assert local(source).shape == local(into).shape, "the parts do not even look alike"
    before = {"fine": numbers(3), "layer.w": source}
    return before, {"fine": numbers(3, salt=1), "layer.w": into}


def _same(tensor: Any, *_: Any) -> Any:
    return tensor


def _assert_refused(call: Callable[[], Any], into: Any, subject: Any) -> None:
    before = fingerprint(into)
    error = attempt(call)
    kind = subject.function("_state_dict_utils.CompanionMismatch")
    assert isinstance(error, kind), f"expected a CompanionMismatch, got {error!r}"
    assert "layer.w" in str(error), f"the error does not name layer.w: {error}"
    assert fingerprint(into) == before, "something was copied before the error"


@pytest.mark.judges("_state_dict_utils._copy_state_dict")
class TestCopyToOtherMeshes:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("make", CASES)
    @every_second(CASES)
    @pytest.mark.thorough(but=["shape", "ranks", "ranks-in-another-order"])
    def test_parts_that_belong_elsewhere(
        self, judged: Any, subject: Any, mesh: Any, make: Any
    ) -> None:
        """A target whose parts are those of other ranks must be refused by name."""
        source, into = _two(make, mesh)
        _assert_refused(lambda: judged(source, into), into, subject)

    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("make", SAME_CASES)
    @every_second(SAME_CASES)
    @pytest.mark.thorough(but=["object"])
    def test_the_same_parts(self, judged: Any, mesh: Any, make: Any) -> None:
        """A target on a mesh of other names, or of another object, must take the values."""
        source, into = _two(make, mesh)
        judged(source, into)
        assert_same(local(into["layer.w"]), local(source["layer.w"]))


@pytest.mark.judges("_state_dict_utils._iterate_state_dict")
class TestIterateToOtherMeshes:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("make", CASES)
    @every_second(CASES, start=1)
    @pytest.mark.thorough(but=["grid-in-another-order"])
    def test_parts_that_belong_elsewhere(
        self, judged: Any, subject: Any, mesh: Any, make: Any
    ) -> None:
        """A companion whose parts are those of other ranks must be refused by name."""
        source, into = _two(make, mesh)
        _assert_refused(
            lambda: judged(source, _same, _same, _same, companion_obj=into), into, subject
        )

    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("make", SAME_CASES)
    @every_second(SAME_CASES, start=1)
    @pytest.mark.thorough(but=["other-names"])
    def test_the_same_parts(self, judged: Any, mesh: Any, make: Any) -> None:
        """A companion on a mesh of other names, or of another object, must take the values."""
        source, into = _two(make, mesh)
        judged(source, _same, _same, _same, companion_obj=into)
        assert_same(local(into["layer.w"]), local(source["layer.w"]))


@pytest.mark.judges("_state_dict_utils._check_state_dict_similarity")
class TestSimilarityOfOtherMeshes:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("make", CASES)
    @every_second(CASES)
    @pytest.mark.thorough(but=["average"])
    def test_parts_that_belong_elsewhere(self, judged: Any, mesh: Any, make: Any) -> None:
        """What could not be copied must not be called similar."""
        source, into = _two(make, mesh)
        assert judged(source, into) is False, "expected False: the parts are those of other ranks"

    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("make", SAME_CASES)
    @every_second(SAME_CASES)
    @pytest.mark.thorough(but=["no-names"])
    def test_the_same_parts(self, judged: Any, mesh: Any, make: Any) -> None:
        """Meshes of other names, or other objects, must be called similar."""
        source, into = _two(make, mesh)
        assert judged(source, into) is True, "expected True: names say nothing of the values"
