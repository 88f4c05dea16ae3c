"""A call after others: what an earlier one found out must not answer it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from conformance.kit.agree import attempt
from conformance.kit.compare import assert_same, local
from conformance.kit.data import numbers
from conformance.kit.functions import Function, Place, each
from conformance.kit.groups import group
from conformance.kit.layouts import R, S, dtensor, part
from conformance.kit.sequences import another_world, others, rounds

_all = each()
_talking = each(lambda function: function.talks)
_spread = each(lambda function: function.talks or "distribute" in function.name)

# torch's cache of what an operation on DTensors gives holds the mesh of the first world: a
# Parameter, which is a view of the tensor it is made of, would be on that.
_ON_THE_FIRST_MESH = {"rows that train", "columns on meta that train"}


def _kinds(function: Function) -> list[str]:
    return list(function.kinds(usual=True))


@pytest.mark.law("isolation")
@pytest.mark.world(2, collective=8, limit=30)
@_all
def test_other_tensors_under_the_same_keys(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device
) -> None:
    """Each call must be right, though keys hold other kinds, shapes and dtypes than before."""
    place = Place(world, mesh(2), subject, device)
    for leaves in rounds(_kinds(function)):
        call = function.call(place, leaves)
        call.check(call.run())
        call.check(call.run())  # the same objects once more


@pytest.mark.law("isolation")
@pytest.mark.world(2, collective=8, limit=30)
@_talking
def test_calls_of_other_functions_between(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device
) -> None:
    """A call must be right after calls of every other function on equal keys, and they after it."""
    place = Place(world, mesh(2), subject, device)
    full = numbers(5, 3)
    calls = [
        other.call(place, {"w": (kind, full + n), "v": (kind, full)})
        for n, other in enumerate([*others(function), function])
        for kind in [k for k in ("rows", "plain") if k in other.kinds()] or list(other.kinds())[:1]
    ]
    own = calls.pop()
    for call in calls:
        own.check(own.run())
        call.check(call.run())
    own.check(own.run())


@pytest.mark.law("isolation")
@pytest.mark.world(3, collective=8, limit=30)
@_spread
def test_another_world_between(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device, shared: Path
) -> None:
    """In a second world, where this process is another rank of an equal mesh, it must be right."""
    kinds = [kind for kind in _kinds(function) if kind not in _ON_THE_FIRST_MESH]
    leaves = {kind: (kind, numbers(9, 6, salt=n)) for n, kind in enumerate(kinds)}
    first = function.call(Place(world, mesh(3), subject, device), leaves)
    first.check(first.run())

    def line() -> DeviceMesh:
        return DeviceMesh(device.type, torch.arange(3), mesh_dim_names=("x",))

    place = another_world(Place(world, None, subject, device), shared, line)
    second = function.call(place, leaves)
    second.check(second.run())


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherFormats:
    @pytest.mark.law("structure")
    @pytest.mark.world(2, collective=8, limit=30)
    def test_each_has_its_own(self, judged: Any, mesh: Any) -> None:
        """A tensor must keep its memory format beside and after others of its shape."""
        line = mesh(2)
        fulls = {"rows": numbers(4, 4), "columns": numbers(4, 4, salt=1).t()}
        for names in (["rows", "columns"], ["columns", "rows"], ["columns"], ["rows"]):
            for placement in (S(0), S(1), R):
                value = {}
                for name in names:
                    full = fulls[name]
                    value[name] = DTensor.from_local(
                        part(full, line, [placement]),
                        line,
                        [placement],
                        run_check=False,
                        shape=full.shape,
                        stride=full.stride(),
                    )
                got = judged(value)
                for name in names:
                    what = f"{name} of {names}, {placement}"
                    assert_same(got[name], fulls[name], what)
                    assert got[name].stride() == fulls[name].stride(), f"{what}: turned"


@pytest.mark.law("isolation")
@pytest.mark.world(2, collective=8, limit=30)
@_talking
def test_after_an_error(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device
) -> None:
    """After a call that all ranks refused the same one with what was wrong put right must work."""
    place = Place(world, mesh(2), subject, device)
    for kind in ("shards",) if "rows" not in function.kinds() else ("rows", "columns"):
        leaves = {"odd": (kind, numbers(6, 4)), "w": (kind, numbers(6, 4, salt=1))}
        call = function.call(place, leaves)
        holder = call.inputs if call.outputs is None else call.outputs
        leaf = holder["odd"]
        if world.rank == 1:
            wrong = numbers(1, 7)
            if kind == "shards":
                right, leaf.local_shards()[0].tensor = leaf.local_shards()[0].tensor, wrong
            else:
                right, leaf._local_tensor = leaf._local_tensor, wrong
        for turn in ("first", "second"):
            error = attempt(call.run)
            assert error is not None, f"{turn}: what contradicts its own metadata was taken"
        if world.rank == 1:
            if kind == "shards":
                leaf.local_shards()[0].tensor = right
            else:
                leaf._local_tensor = right
        call.check(call.run())


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastGroups:
    @pytest.mark.law("group")
    @pytest.mark.world(3, collective=8, limit=30)
    def test_another_group_of_as_many(
        self, judged: Any, mesh: Any, rank: int, device: torch.device
    ) -> None:
        """Loads over groups of one size in turn must each be right, whichever ranks they are of."""
        pairs = [(0, 1), (1, 2), (0, 2)]
        groups = [(ranks, group(*ranks), mesh(2, ranks=ranks)) for ranks in pairs]
        full = {key: numbers(8, 6, salt=n) for n, key in enumerate(("rows", "columns", "whole"))}
        placements: dict[str, Any] = dict(zip(full, ([S(0)], [S(1)], [R]), strict=True))
        over_all = [(ranks, pg, mesh(3)) for ranks, pg, _ in groups]
        for turn, (ranks, pg, line) in enumerate([*groups, *over_all] * 2):
            if rank not in ranks:
                continue
            into: dict[str, Any] = {
                key: dtensor(torch.zeros(8, 6), line, placements[key]) for key in full
            }
            judged(full if rank == ranks[0] else {}, into, device, pg=pg)
            for key, got in into.items():
                expected = part(full[key], line, placements[key])
                assert_same(local(got), expected, f"{turn}, {ranks} of {line.size()}: {key}")
