"""State dicts over several meshes: each leaf from its own, and errors heard of beyond it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from conformance.kit.agree import attempt, exchange
from conformance.kit.compare import assert_same, local
from conformance.kit.data import numbers
from conformance.kit.layouts import S, dtensor, part
from conformance.kit.meshes import MESHES, Several, fulls, leaves, spoilt

FEW = {name: several for name, several in MESHES.items() if several.size <= 5}
CUBE = MESHES["each way through a cube"]
"""The one that takes eight ranks: in checks of its own."""

_SMALL, _LARGE = (pytest.mark.world(size, collective=8, limit=30) for size in (5, 8))


def _assert_gathers(judged: Any, mesh: Any, rank: int, several: Several) -> None:
    wholes = fulls(several, mesh)
    value = leaves(several, mesh, rank)
    for _ in range(2):
        got = judged(value)
        assert list(got) == list(value), f"keys {list(got)}, expected {list(value)}"
        for name, tensor in got.items():
            assert_same(tensor, wholes[name], name)


def _assert_hears(judged: Any, mesh: Any, world: Any, several: Several) -> None:
    wholes = fulls(several, mesh)
    for at, name in several.bad:
        value = leaves(several, mesh, world.rank)
        if world.rank == at:
            spoilt(value[name])
        got: dict[str, Any] = {}
        told = _outcomes(world, partial(_into, got, judged, value), several, name, at)
        near = several.near or _heard(several, mesh, at)
        for rank, (kind, said) in enumerate(told):
            if rank in near:
                assert name in said, f"rank {rank} got {kind} {said} of {name} on {at}"
                assert kind == told[at][0], f"rank {rank} raised {kind}, not {told[at][0]}"
            else:
                assert not kind, f"rank {rank} has nothing to do with it, and got {kind}: {said}"
        if world.rank not in near:
            for key, tensor in got.items():
                assert_same(tensor, wholes[key], key)


def _into(got: dict[str, Any], judged: Any, value: Any) -> None:
    got.update(judged(value))


def _outcomes(
    world: Any, call: Callable[[], Any], several: Several, name: str, at: int
) -> list[list[str]]:
    """The type and the text of each rank's error, empty where there was none."""
    error = attempt(call)
    case = next(known for known, other in MESHES.items() if other is several)
    said = [type(error).__name__, str(error)] if error else ["", ""]
    return exchange(world, said, f"{case}, {name} on {at}")


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherFromSeveralMeshes:
    @pytest.mark.law("group")
    @_SMALL
    def test_each_leaf(self, judged: Any, mesh: Any, rank: int) -> None:
        """Each rank must get the leaves of its own meshes, whole."""
        for several in FEW.values():
            _assert_gathers(judged, mesh, rank, several)

    @pytest.mark.law("group")
    @_LARGE
    def test_each_leaf_of_a_cube(self, judged: Any, mesh: Any, rank: int) -> None:
        """Leaves along one dimension of three each must be gathered along theirs."""
        _assert_gathers(judged, mesh, rank, CUBE)

    @pytest.mark.law("symmetry")
    @_SMALL
    def test_a_bad_leaf_is_heard_of(self, judged: Any, mesh: Any, world: Any) -> None:
        """An error must reach each rank that would wait for one that raises, by name."""
        for several in FEW.values():
            _assert_hears(judged, mesh, world, several)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(4, collective=8, limit=30)
    def test_two_bad_leaves_at_once(self, judged: Any, mesh: Any, world: Any) -> None:
        """Of two errors on meshes that a third one connects all ranks must raise the same one."""
        value = {
            name: dtensor(numbers(6, 4), line, [S(0)])
            for name, ranks in (("first", [0, 3]), ("second", [1, 2]), ("third", [2, 3]))
            for line in [mesh(2, ranks=ranks)]
            if world.rank in ranks
        }
        if world.rank in (0, 1):
            spoilt(value["second" if world.rank else "first"])
        error = attempt(lambda: judged(value))
        told = exchange(world, str(error), "what is raised")
        assert len(set(told)) == 1, f"the ranks raise {told}"
        assert "first" in told[0] or "second" in told[0], told[0]

    @pytest.mark.law("symmetry")
    @_LARGE
    def test_a_bad_leaf_in_a_cube_is_heard_of(self, judged: Any, mesh: Any, world: Any) -> None:
        """The same must hold for the rank at the other end of a cube."""
        _assert_hears(judged, mesh, world, CUBE)


def _heard(several: Several, mesh: Any, at: int) -> set[int]:
    """The ranks of the meshes of a rank, of the meshes of these, and so on."""
    groups = [set(over.mesh.flatten().tolist()) for _, over, _ in several.make(mesh)]
    found = {at}
    while True:
        more = found.union(*(group for group in groups if group & found))
        if more == found:
            return found
        found = more


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastToSeveralMeshes:
    @pytest.mark.law("group")
    @_SMALL
    def test_each_target(self, judged: Any, mesh: Any, rank: int, device: torch.device) -> None:
        """Each rank must get its part of each target that it has, on whatever mesh."""
        for several in FEW.values():
            wholes = fulls(several, mesh)
            into = leaves(several, mesh, rank, blank=True)
            judged(wholes if rank == 0 else {}, into, device)
            _assert_parts(into, wholes)

    @pytest.mark.law("symmetry")
    @_SMALL
    def test_a_bad_target_is_heard_of(
        self, judged: Any, mesh: Any, world: Any, device: torch.device
    ) -> None:
        """A target that does not fit on one rank must be refused on all, by name."""
        cases = [(several, *bad) for several in FEW.values() for bad in several.bad]
        for several, at, name in cases:
            wholes = fulls(several, mesh)
            into = leaves(several, mesh, world.rank, blank=True)
            if world.rank == at:
                spoilt(into[name])
            source = wholes if world.rank == 0 else {}
            told = _outcomes(world, partial(judged, source, into, device), several, name, at)
            for rank, (kind, said) in enumerate(told):
                assert name in said, f"rank {rank} got {kind} {said} of {name} on {at}"


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistributeToSeveralMeshes:
    @pytest.mark.law("group")
    @_SMALL
    def test_each_target(self, judged: Any, mesh: Any, rank: int, device: torch.device) -> None:
        """Each rank must take its part for each target that it has, on whatever mesh."""
        for several in FEW.values():
            wholes = fulls(several, mesh)
            into = leaves(several, mesh, rank, blank=True)
            judged(wholes, into, device)
            _assert_parts(into, wholes)


def _assert_parts(into: dict[str, Any], wholes: dict[str, torch.Tensor]) -> None:
    for name, tensor in into.items():
        expected = part(wholes[name], tensor.device_mesh, tensor.placements)
        assert_same(local(tensor), expected, name)
