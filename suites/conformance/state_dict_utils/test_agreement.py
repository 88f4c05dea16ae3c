"""What one rank's leaf says otherwise than the others' do: refused where values would be wrong.

A leaf is one tensor spread over ranks. Where ranks hold other things under its key, a gather mixes
parts that do not belong together: in silence, if their shapes happen to fit. What says nothing of
the values may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from conformance.kit.agree import assert_raises_everywhere, attempt, exchange
from conformance.kit.cases import every_second
from conformance.kit.compare import assert_same
from conformance.kit.containers import dashed
from conformance.kit.data import numbers
from conformance.kit.disagreements import FULL, ON_FOUR, ON_TWO, TURNED, pending
from conformance.kit.groups import UNSORTED
from conformance.kit.landing import assert_landed, target
from conformance.kit.layouts import SS, R, S, dtensor, part
from conformance.kit.refusals import MISFIT, MISSING

KEY = "layer.odd"


# What `pg` alone lets the ranks find out, and one of what they find out anyhow.
_ALONE = {
    name: make
    for name, make in ON_TWO.items()
    if "plain" in name or "None" in name or name == "rows and columns"
}


_EACH_RUN = {
    "rows and columns",
    "sum and maximum",
    "DTensor and plain",
    "DTensor and ShardedTensor",
    "shards by row and by column",
    "grid and turned grid",
    "all and some",
    "some and others",
    "ranks in another order",
}
"""One example of each kind. The others are thorough: torch hangs in nearly each of them."""


def _cases(
    made: dict[str, Callable[[Any], tuple[Any, Any]]], *marks: pytest.MarkDecorator
) -> list[Any]:
    return [
        pytest.param(
            make,
            id=dashed(name),
            marks=marks if name in _EACH_RUN else [*marks, pytest.mark.thorough],
        )
        for name, make in made.items()
    ]


def _kinds(make: Callable[[Any], tuple[Any, Any]]) -> tuple[type[Exception], ...]:
    """What the error may be: where one rank has other leaves, the key that it lacks is missing."""
    return MISSING if make is ON_TWO["DTensor and containers"] else MISFIT


def _mine(make: Callable[[Any], tuple[Any, Any]], mesh: Any, world: Any) -> Any:
    most, last = make(mesh)
    return last if world.rank == world.size - 1 else most


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherAgrees:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=6, limit=25)
    @pytest.mark.parametrize("make", [*_cases(ON_TWO), *_cases(TURNED, UNSORTED)])
    def test_a_leaf_that_the_last_rank_holds_otherwise(
        self, judged: Any, mesh: Any, world: Any, make: Any
    ) -> None:
        """Placements, meshes, reductions or kinds that differ must be refused by name everywhere.

        Another leaf brings the ranks together, so that each can learn of the other.
        """
        value = {"fine": dtensor(numbers(4), mesh(2), [S(0)]), KEY: _mine(make, mesh, world)}
        assert_raises_everywhere(world, lambda: judged(value), KEY, kinds=_kinds(make))

    @pytest.mark.law("symmetry")
    @pytest.mark.world(4, collective=6, limit=25)
    @pytest.mark.parametrize("make", _cases(ON_FOUR))
    @pytest.mark.thorough(but=["others"])
    def test_over_four_ranks(self, judged: Any, mesh: Any, world: Any, make: Any) -> None:
        """The same must hold for meshes of other shapes over the same ranks."""
        value = {"fine": dtensor(numbers(4), mesh(4), [S(0)]), KEY: _mine(make, mesh, world)}
        assert_raises_everywhere(world, lambda: judged(value), KEY, kinds=_kinds(make))

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=6, limit=25)
    @pytest.mark.parametrize("make", [*_cases(_ALONE), *_cases(TURNED, UNSORTED)])
    @pytest.mark.thorough(but=["order"])
    def test_with_a_group_to_agree_over(
        self, judged: Any, mesh: Any, world: Any, make: Any
    ) -> None:
        """With `pg` the ranks must find out though nothing but the odd leaf is there."""
        value = {KEY: _mine(make, mesh, world)}
        pg = torch.distributed.group.WORLD
        assert_raises_everywhere(world, lambda: judged(value, pg=pg), KEY, kinds=_kinds(make))

    @pytest.mark.law("symmetry")
    @pytest.mark.world(4, collective=6, limit=25)
    @pytest.mark.parametrize("make", _cases(ON_FOUR))
    @pytest.mark.thorough(but=["grid-and-turned-grid"])
    def test_over_four_ranks_with_a_group(
        self, judged: Any, mesh: Any, world: Any, make: Any
    ) -> None:
        """The same must hold for meshes of other shapes, with nothing else but a `pg`."""
        value = {KEY: _mine(make, mesh, world)}
        pg = torch.distributed.group.WORLD
        assert_raises_everywhere(world, lambda: judged(value, pg=pg), KEY, kinds=_kinds(make))

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2)
    @pytest.mark.parametrize(
        "what", ["requires_grad", "Parameter", "strides", "global strides", "tie", "mesh names"]
    )
    @pytest.mark.thorough(but=["global strides"])
    def test_what_says_nothing_of_the_values_may_differ(
        self, judged: Any, mesh: Any, world: Any, what: str
    ) -> None:
        """Flags, strides, ties and names on one rank must be no error, and values are right."""
        full, other = numbers(6, 4), numbers(6, 4, salt=1)
        line, last = mesh(2), world.rank == 1
        named = mesh(2, names=("other",))
        leaf: Any = dtensor(full, line, [S(0)])
        twin: Any = dtensor(other, line, [S(0)])
        if last and what == "requires_grad":
            leaf = leaf.requires_grad_()
        elif last and what == "Parameter":
            leaf = nn.Parameter(leaf)
        elif last and what == "strides":
            here = part(full, line, [S(0)])
            leaf = dtensor(full, line, [S(0)], local=here.t().contiguous().t())
        elif last and what == "global strides":
            leaf = DTensor.from_local(
                part(full, line, [S(0)]).t().contiguous().t(),
                line,
                [S(0)],
                run_check=False,
                shape=full.shape,
                stride=(1, 6),
            )
        elif last and what == "mesh names":
            leaf = dtensor(full, named, [S(0)])
        elif last and what == "tie":
            value = {"a": leaf, "b": leaf, "c": twin}
        if not (last and what == "tie"):
            value = {"a": leaf, "b": dtensor(full, line, [S(0)]), "c": twin}
        got = judged(value)
        for key, expected in (("a", full), ("b", full), ("c", other)):
            assert_same(got[key], expected, f"{what}: {key}")


_SHARDS = {name: make for name, make in ON_TWO.items() if name.startswith("shards")}


@pytest.mark.judges("_state_dict_utils._all_gather_sharded_tensor")
class TestAllGatherShardedTensorAgrees:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=6, limit=25)
    @pytest.mark.parametrize("make", _cases(_SHARDS))
    def test_metadata_that_differ(self, judged: Any, mesh: Any, world: Any, make: Any) -> None:
        """Shards that one rank's metadata tell of otherwise must be refused on every rank."""
        tensor = _mine(make, mesh, world)
        assert_raises_everywhere(world, lambda: judged(tensor), "shards")


def _plain(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


# Targets of one key on rank 0 and on rank 1. Each says by itself which part it takes.
_TARGETS: dict[str, Callable[[Any, torch.Tensor], tuple[Any, Any]]] = {
    "rows and columns": lambda mesh, full: (
        target(full, mesh(2), [S(0)]),
        target(full, mesh(2), [S(1)]),
    ),
    "rows and whole": lambda mesh, full: (
        target(full, mesh(2), [S(0)]),
        target(full, mesh(2), [R]),
    ),
    "rows and rows in turn": lambda mesh, full: (
        target(full, mesh(2), [S(0)]),
        target(full, mesh(2), [SS(0, 2)]),
    ),
    "DTensor and plain": lambda mesh, full: (target(full, mesh(2), [S(0)]), _plain(full * 0)),
    "plain and DTensor": lambda mesh, full: (_plain(full * 0), target(full, mesh(2), [S(0)])),
    "memory and meta": lambda mesh, full: (
        target(full, mesh(2), [S(0)]),
        target(full, mesh(2), [S(0)], meta=True),
    ),
    "ranks in another order": lambda mesh, full: (
        target(full, mesh(2), [S(0)]),
        target(full, mesh(2, ranks=[1, 0]), [S(0)]),
    ),
}
_TARGET_CASES = [
    pytest.param(
        make, id=dashed(name), marks=[UNSORTED] if name == "ranks in another order" else []
    )
    for name, make in _TARGETS.items()
]


def _assert_right_or_refused(
    world: Any, call: Callable[[], Any], local: dict[str, Any], full: torch.Tensor
) -> None:
    """Each rank's target holds its part of `full`, or all ranks got one error that names it."""
    wanted = local[KEY]
    error = attempt(call)
    told = exchange(world, None if error is None else [type(error).__name__, str(error)])
    if any(told):
        kinds = {said and said[0] for said in told}
        assert len(kinds) == 1, f"the ranks end otherwise: {told}"
        assert all(KEY in said[1] for said in told), f"not named: {told}"
    elif isinstance(wanted, DTensor):
        assert_landed(local[KEY], full, wanted.device_mesh, wanted.placements, KEY)
    else:
        assert_same(local[KEY], full, KEY)


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastAgrees:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=6, limit=25)
    @pytest.mark.parametrize("make", _TARGET_CASES)
    @every_second(_TARGET_CASES)
    @pytest.mark.thorough(but=["DTensor"])
    def test_targets_that_differ(
        self, judged: Any, mesh: Any, world: Any, device: torch.device, make: Any
    ) -> None:
        """Targets that differ by rank must each take their own part, or be refused everywhere."""
        full = numbers(*FULL)
        local = {KEY: make(mesh, full)[world.rank], "fine": numbers(4, salt=2)}
        source = {KEY: full, "fine": numbers(4)} if world.rank == 0 else {}
        _assert_right_or_refused(world, lambda: judged(source, local, device), local, full)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=6, limit=25)
    @pytest.mark.parametrize("at", [0, 1])
    def test_a_pending_target_on_one_rank(
        self, judged: Any, mesh: Any, world: Any, device: torch.device, at: int
    ) -> None:
        """A target whose reduction is pending on one rank must be refused everywhere by name."""
        full = numbers(*FULL)
        mine = pending("sum", mesh(2)) if world.rank == at else target(full, mesh(2), [R])
        local = {KEY: mine}
        source = {KEY: full} if world.rank == 0 else {}
        assert_raises_everywhere(world, lambda: judged(source, local, device), KEY)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=6, limit=25)
    @pytest.mark.parametrize("size", [FULL, (1024, 1024)], ids=["small", "large"])
    @pytest.mark.thorough(but=["small"])
    def test_a_local_part_of_another_dtype_on_one_rank(
        self, judged: Any, mesh: Any, world: Any, device: torch.device, size: Any
    ) -> None:
        """A local part that is not of its target's dtype must take the values, or be refused."""
        full = numbers(*size)
        mine = target(full, mesh(2), [S(0)])
        if world.rank == 1:
            mine._local_tensor = torch.zeros_like(mine._local_tensor, dtype=torch.int32)
        source = {KEY: full} if world.rank == 0 else {}
        error = attempt(lambda: judged(source, {KEY: mine}, device))
        told = exchange(world, None if error is None else [type(error).__name__, str(error)])
        if any(told):
            assert len({said and said[0] for said in told}) == 1, f"the ranks end otherwise: {told}"
            assert all(KEY in said[1] for said in told), f"not named: {told}"
        else:
            held = mine._local_tensor.to(full.dtype)
            assert_same(held, part(full, mesh(2), [S(0)]), "the local part")


@pytest.mark.judges("_state_dict_utils._broadcast_tensors")
class TestBroadcastTensorsAgree:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=6, limit=25)
    @pytest.mark.parametrize("make", _TARGET_CASES)
    @pytest.mark.thorough(
        but=[
            *("rows-and-whole", "rows-and-rows-in-turn", "DTensor-and-plain", "memory-and-meta"),
            "ranks-in-another-order",
        ]
    )
    def test_targets_that_differ(
        self, judged: Any, mesh: Any, world: Any, subject: Any, device: torch.device, make: Any
    ) -> None:
        """Targets that differ by rank must each take their own part, or be refused everywhere."""
        info = subject.function("_state_dict_utils._TensorInfo")
        full = numbers(*FULL)
        local = {KEY: make(mesh, full)[world.rank]}
        source = {KEY: full if world.rank == 0 else info(full.shape, full.dtype)}
        _assert_right_or_refused(world, lambda: judged(source, local, [KEY], device), local, full)
