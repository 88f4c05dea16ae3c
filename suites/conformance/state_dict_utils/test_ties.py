"""Leaves that share memory: the same view of it, or views that overlap, of one kind or of several.

A caller who writes into one of them reads that in the other. A copy of the state dict keeps this,
and so takes no more memory than the original: one storage stays one. Disjoint parts of one storage
(FSDP's flat parameter) have nothing in common, and are copied without what lies between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from conformance.kit.cases import every_second
from conformance.kit.compare import assert_same, local, shares_memory
from conformance.kit.containers import dashed
from conformance.kit.data import numbers
from conformance.kit.landing import target
from conformance.kit.layouts import S, dtensor
from conformance.kit.nested import assert_same_structure, leaves, storages
from conformance.kit.nested import tensors as tensors_of
from conformance.kit.overlap import (
    COPIED_CASES,
    DISTRIBUTED_CASES,
    PLAIN_CASES,
    REPLICA_CASES,
    Value,
    assert_kept,
    assert_pieces_alone,
    pieces,
)


def _identity(tensor: Any, *_: Any) -> Any:
    return tensor


@pytest.mark.judges("_state_dict_utils._offload_state_dict_to_cpu")
class TestOffloadKeepsTies:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", PLAIN_CASES)
    @every_second(PLAIN_CASES, start=1)
    def test_views_that_overlap(self, judged: Any, make: Any) -> None:
        """What is written to one leaf of the snapshot must be read in the leaf that overlaps it."""
        value = make()
        got = judged(value)
        assert_same_structure(got, value)
        assert_kept(got, value)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", DISTRIBUTED_CASES)
    @every_second(DISTRIBUTED_CASES)
    def test_across_kinds(self, judged: Any, mesh: Any, make: Any) -> None:
        """The same must hold between the memory of DTensors, and of a DTensor and a tensor."""
        value = make(mesh(1))
        got = judged(value)
        assert_same_structure(got, value)
        assert_kept(got, value)

    @pytest.mark.law("cost")
    @pytest.mark.world(1)
    def test_disjoint_pieces_of_one_storage(self, judged: Any) -> None:
        """The snapshot of pieces of a large storage must not hold what is in none of them."""
        value = pieces()
        got = judged(value)
        assert_same_structure(got, value)
        assert_pieces_alone(got)


@pytest.mark.judges("_state_dict_utils._create_cpu_state_dict")
class TestCreateKeepsTies:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", PLAIN_CASES)
    @every_second(PLAIN_CASES, start=1)
    def test_views_that_overlap(self, judged: Any, make: Any) -> None:
        """Buffers for leaves that overlap must overlap the same way."""
        value = make()
        got = judged(value)
        assert_same_structure(got, value, values=False, flags=False)
        assert_kept(got, value)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", DISTRIBUTED_CASES)
    @every_second(DISTRIBUTED_CASES, start=1)
    def test_across_kinds(self, judged: Any, mesh: Any, make: Any) -> None:
        """The same must hold between the memory of DTensors, and of a DTensor and a tensor."""
        value = make(mesh(1))
        got = judged(value)
        assert_same_structure(got, value, values=False, flags=False)
        assert_kept(got, value)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", PLAIN_CASES)
    @every_second(PLAIN_CASES)
    def test_in_shared_memory(self, judged: Any, make: Any) -> None:
        """Buffers in shared memory must overlap as the leaves do, and all be shared."""
        value = make()
        got = judged(value, share_memory=True)
        assert_kept(got, value)
        apart = [path for path, t in tensors_of(got).items() if not t.is_shared()]
        assert not apart, f"not in shared memory: {apart}"

    @pytest.mark.law("cost")
    @pytest.mark.world(1)
    def test_disjoint_pieces_of_one_storage(self, judged: Any) -> None:
        """Buffers for pieces of a large storage must not hold what is in none of them."""
        assert_pieces_alone(judged(pieces()))


@pytest.mark.judges("_state_dict_utils._iterate_state_dict")
class TestIterateKeepsTies:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", PLAIN_CASES)
    @every_second(PLAIN_CASES)
    def test_views_that_overlap(self, judged: Any, make: Any) -> None:
        """With `cpu_offload` results that overlap must come to the CPU so that they still do."""
        value = make()
        got = judged(value, _identity, _identity, _identity, cpu_offload=True)
        assert_same_structure(got, value)
        assert_kept(got, value)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", DISTRIBUTED_CASES)
    @every_second(DISTRIBUTED_CASES)
    def test_across_kinds(self, judged: Any, mesh: Any, make: Any) -> None:
        """The same must hold between the memory of DTensors, and of a DTensor and a tensor."""
        value = make(mesh(1))
        got = judged(value, _identity, _identity, _identity, cpu_offload=True)
        assert_same_structure(got, value)
        assert_kept(got, value)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", COPIED_CASES)
    @every_second(COPIED_CASES, start=1)
    def test_into_a_companion_that_overlaps(self, judged: Any, make: Any) -> None:
        """A companion whose leaves overlap must hold all values, and be the result."""
        value, companion = make(), make()
        _clear(companion)
        got = judged(value, _identity, _identity, _identity, companion_obj=companion)
        assert_same_structure(got, value, flags=False)
        _assert_is(got, companion)

    @pytest.mark.law("cost")
    @pytest.mark.world(1)
    def test_disjoint_pieces_of_one_storage(self, judged: Any) -> None:
        """Copies of pieces of a large storage must not hold what is in none of them."""
        assert_pieces_alone(judged(pieces(), _identity, _identity, _identity, cpu_offload=True))


@pytest.mark.judges("_state_dict_utils._copy_state_dict")
class TestCopyKeepsTies:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", COPIED_CASES)
    @every_second(COPIED_CASES)
    def test_into_leaves_that_overlap(self, judged: Any, make: Any) -> None:
        """A target whose leaves overlap must hold all values, and be the result."""
        value, into = make(), make()
        _clear(into)
        got = judged(value, into)
        assert_same_structure(got, value, flags=False)
        _assert_is(got, into)

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", COPIED_CASES)
    @every_second(COPIED_CASES, start=1)
    def test_into_itself(self, judged: Any, make: Any) -> None:
        """A state dict that is copied into itself must stay as it is."""
        value, expected = make(), make()
        judged(value, value)
        assert_same_structure(value, expected)


def _clear(value: Any) -> None:
    for tensor in tensors_of(value).values():
        for plain in storages(tensor):
            memory = torch.empty(0, dtype=torch.uint8, device=plain.device)
            memory.set_(plain.untyped_storage()).zero_()


def _assert_is(got: Any, companion: Any) -> None:
    pairs = zip(leaves(got), leaves(companion), strict=True)
    others = [
        path for (path, one), (_, two) in pairs if isinstance(one, torch.Tensor) and one is not two
    ]
    assert not others, f"expected the companion's own tensors at {others}"


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherKeepsTies:
    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("make", PLAIN_CASES)
    @every_second(PLAIN_CASES)
    def test_views_that_overlap(self, judged: Any, mesh: Any, make: Any) -> None:
        """Plain leaves that overlap must still do so in the result, beside a gathered one."""
        full = numbers(4, 2)
        for cpu_offload in (False, True):
            value = {**make(), "gathered": dtensor(full, mesh(2), [S(0)])}
            got = judged(value, cpu_offload=cpu_offload)
            assert_same(got.pop("gathered"), full, "gathered")
            del value["gathered"]
            assert_same_structure(got, value)
            assert_kept(got, value)

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("make", REPLICA_CASES)
    def test_across_kinds(self, judged: Any, mesh: Any, make: Any) -> None:
        """A replica that does not travel must still share memory with a plain leaf."""
        for cpu_offload in (False, True):
            value = make(mesh(2))
            got = judged(value, cpu_offload=cpu_offload)
            whole = {key: local(leaf) for key, leaf in value.items()}
            assert_same_structure(got, whole)
            assert_kept(got, whole)

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("ties", ["parameter", "other DTensor", "list and dict"])
    def test_a_gathered_tensor_under_two_names(self, judged: Any, mesh: Any, ties: str) -> None:
        """Sharded leaves over one memory must be one whole tensor, whatever objects they are."""
        weight = nn.Parameter(dtensor(numbers(4, 3), mesh(2), [S(0)]))
        twin: Any = weight.detach()
        if ties == "other DTensor":
            twin = DTensor.from_local(local(weight).detach(), mesh(2), [S(0)], run_check=False)
        value: Any = {"weight": weight, "twin": twin}
        if ties == "list and dict":
            value = {"list": [weight], "dict": {"x": twin}}
        got = tensors_of(judged(value))
        one, other = got.values()
        assert_same(one, numbers(4, 3))
        assert_same(other, numbers(4, 3))
        assert shares_memory(one, other), f"{list(got)} came apart"

    @pytest.mark.law("cost")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("cpu_offload", [False, True], ids=["device", "cpu"])
    def test_disjoint_pieces_of_one_storage(self, judged: Any, cpu_offload: bool) -> None:
        """Copies of pieces of a large storage must not hold what is in none of them."""
        assert_pieces_alone(judged(pieces(), cpu_offload=cpu_offload))


# Name -> targets under two keys over one memory, in which the values of the last key must be.
TIED: dict[str, Callable[[Any], Value]] = {
    "a parameter and its detached twin": lambda _: (lambda w: {"a": w, "b": w.detach()})(
        nn.Parameter(torch.zeros(4, 3))
    ),
    "a detached twin and its parameter": lambda _: (lambda w: {"a": w.detach(), "b": w})(
        nn.Parameter(torch.zeros(4, 3))
    ),
    "a frozen parameter and its data": lambda _: (lambda w: {"a": w, "b": w.data})(
        nn.Parameter(torch.zeros(4, 3), requires_grad=False)
    ),
    "two parameters of one memory": lambda _: (
        lambda m: {"a": nn.Parameter(m), "b": nn.Parameter(m, requires_grad=False)}
    )(torch.zeros(4, 3)),
    "on meta": lambda _: (lambda w: {"a": w, "b": w.detach()})(
        nn.Parameter(torch.zeros(4, 3, device="meta"))
    ),
    "a trained DTensor and its detached twin": lambda line: (lambda w: {"a": w, "b": w.detach()})(
        nn.Parameter(target(numbers(4, 3), line, [S(0)]))
    ),
    "a DTensor on meta": lambda line: (lambda w: {"a": w, "b": w.detach()})(
        nn.Parameter(target(numbers(4, 3), line, [S(0)], meta=True))
    ),
}
TIED_CASES = [pytest.param(make, id=dashed(name)) for name, make in TIED.items()]


def _assert_still_tied(mine: Value, expected: torch.Tensor) -> None:
    for key in "ab":
        here = local(mine[key])
        rows = expected.chunk(torch.distributed.get_world_size())
        wanted = expected
        if isinstance(mine[key], DTensor):
            wanted = rows[torch.distributed.get_rank()]
        assert_same(here, wanted, key)
    assert shares_memory(mine["a"], mine["b"]), "a and b shared memory, and came apart"


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastKeepsTies:
    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("cpu_offload", [False, True], ids=["device", "cpu"])
    @pytest.mark.parametrize("make", TIED_CASES)
    @pytest.mark.thorough(
        but=[f"{case.id}-{('device', 'cpu')[n % 2]}" for n, case in enumerate(TIED_CASES)]
    )
    def test_targets_over_one_memory(
        self,
        judged: Any,
        mesh: Any,
        rank: int,
        device: torch.device,
        make: Any,
        cpu_offload: bool,
    ) -> None:
        """Targets tied by memory must stay tied, whatever their Parameter-ness."""
        mine, full = make(mesh(2)), numbers(4, 3)
        source = {"a": full, "b": full.clone()} if rank == 0 else {}
        judged(source, mine, device, cpu_offload=cpu_offload)
        _assert_still_tied(mine, full)


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistributeKeepsTies:
    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("make", TIED_CASES)
    @every_second(TIED_CASES)
    def test_targets_over_one_memory(
        self, judged: Any, mesh: Any, device: torch.device, make: Any
    ) -> None:
        """Targets tied by memory must stay tied, whatever their Parameter-ness."""
        mine, full = make(mesh(2)), numbers(4, 3)
        judged({"a": full, "b": full.clone()}, mine, device)
        _assert_still_tied(mine, full)
