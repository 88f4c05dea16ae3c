"""Tensors of classes that implement the operations that upstream asks of them, and no others.

Quantised weights, 8-bit optimizer state and float8 weights are such classes. Which operations a
function of torch's asks for is measured with a class that has all, so the class under test has
these. What torch does right with it, every subject must do right.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import _state_dict_utils as upstream
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.layouts import R, S, dtensor, part
from conformance.kit.subclasses import (
    Pair,
    assert_holds_pair,
    inside,
    like_upstream,
    subclass_with,
)

KINDS = pytest.mark.parametrize("flatten", [True, False], ids=["traceable", "closed"])
"""With `__tensor_flatten__`, and without."""

SAME = (upstream._identity_func,) * 3


def leaves(kind: type[Pair], mesh: Any, salt: int = 0) -> dict[str, Any]:
    """A plain leaf, a Parameter and DTensors around the class, beside plain tensors."""
    full = numbers(6, 4, salt=salt)
    plain, line = kind.of(numbers(3, 2, salt=salt)), mesh(2)
    local = kind.of(part(full, line, [S(0)]).clone())
    return {
        "plain": plain,
        "parameter": nn.Parameter(kind.of(numbers(2, salt=salt)), requires_grad=False),
        "sharded": inside(local, full, line, [S(0)]),
        "replicated": inside(kind.of(full.clone()), full, line, [R]),
        "usual": dtensor(full, line, [S(0)]),
        "step": numbers(salt=salt),
    }


def assert_kept(got: dict[str, Any], kind: type[Pair], mesh: Any) -> None:
    """Every leaf of `leaves` is there as it was, whatever object holds it."""
    full, line = numbers(6, 4), mesh(2)
    assert_holds_pair(got["plain"], kind, numbers(3, 2), "plain")
    assert_holds_pair(got["parameter"], kind, numbers(2), "parameter")
    assert_holds_pair(got["sharded"]._local_tensor, kind, part(full, line, [S(0)]), "sharded")
    assert_holds_pair(got["replicated"]._local_tensor, kind, full, "replicated")
    assert_same(got["usual"]._local_tensor, part(full, line, [S(0)]), "usual")
    assert_same(got["step"], numbers(), "step")


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGather:
    @KINDS
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    @pytest.mark.needs("functional gathers")
    @pytest.mark.parametrize(
        "options", [{}, {"cpu_offload": True}, {"cpu_offload": True, "ranks_only": (0,)}], ids=str
    )
    @pytest.mark.thorough(
        but=[
            "{}-traceable",
            "{'cpu_offload': True}-closed",
            "{'cpu_offload': True, 'ranks_only': (0,)}-traceable",
        ]
    )
    def test_all_of_it_is_gathered(
        self, judged: Any, mesh: Any, rank: int, flatten: bool, options: Any
    ) -> None:
        """A leaf of the class, and a DTensor around it, must come back whole and finished."""
        kind, _ = like_upstream(
            lambda k: upstream._gather_state_dict(leaves(k, mesh), **options), flatten
        )
        got = judged(leaves(kind, mesh), **options)
        if rank and "ranks_only" in options:
            assert got == {}, f"keys {list(got)}, expected none"
            return
        for name in ("sharded", "replicated"):
            assert_holds_pair(got[name], kind, numbers(6, 4), name)
        assert_holds_pair(got["plain"], kind, numbers(3, 2), "plain")
        assert_holds_pair(got["parameter"], kind, numbers(2), "parameter")
        assert_same(got["usual"], numbers(6, 4), "usual")

    @KINDS
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.needs("functional gathers")
    def test_what_is_pending_inside_is_waited_for(
        self, judged: Any, mesh: Any, flatten: bool
    ) -> None:
        """Parts that the class's own collectives leave unfinished must come back finished."""
        kind, full = subclass_with(None, flatten, pending=True), numbers(64, 256)
        for _ in range(3):
            local = kind.of(part(full, mesh(2), [S(0)]).clone())
            got = judged({"w": inside(local, full, mesh(2), [S(0)])})["w"]
            assert_holds_pair(got, kind, full, "w")

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_a_leaf_that_holds_a_pending_part(self, judged: Any, mesh: Any) -> None:
        """A plain leaf whose part is still on its way must come back with the finished values."""
        kind, full = subclass_with(None, True), numbers(64, 256)
        pending = torch.ops._c10d_functional.all_gather_into_tensor(
            part(full, mesh(2), [S(0)]), 2, mesh(2).get_group().group_name
        )
        got = judged({"w": kind(AsyncCollectiveTensor(pending), full.neg())})["w"]
        parts = [p.wait() if isinstance(p, AsyncCollectiveTensor) else p for p in got.parts]
        assert_same(parts[0], full, "the pending part")


@pytest.mark.judges("_state_dict_utils._offload_state_dict_to_cpu")
class TestOffload:
    @KINDS
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    @pytest.mark.thorough(but=["closed"])
    def test_all_of_it_is_kept(self, judged: Any, mesh: Any, flatten: bool) -> None:
        """A leaf of the class, and a DTensor around it, must be in the snapshot, whole."""
        kind, _ = like_upstream(
            lambda k: upstream._offload_state_dict_to_cpu(leaves(k, mesh)), flatten
        )
        assert_kept(judged(leaves(kind, mesh)), kind, mesh)


@pytest.mark.judges("_state_dict_utils._iterate_state_dict")
class TestIterate:
    @KINDS
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("cpu_offload", [False, True], ids=["as-it-is", "cpu"])
    @pytest.mark.thorough(but=["as-it-is-closed", "cpu-traceable"])
    def test_all_of_it_is_kept(
        self, judged: Any, mesh: Any, flatten: bool, cpu_offload: bool
    ) -> None:
        """A leaf of the class, and a DTensor around it, must be in the result, whole."""
        kind, _ = like_upstream(
            lambda k: upstream._iterate_state_dict(leaves(k, mesh), *SAME, cpu_offload=cpu_offload),
            flatten,
        )
        assert_kept(judged(leaves(kind, mesh), *SAME, cpu_offload=cpu_offload), kind, mesh)


@pytest.mark.judges("_state_dict_utils._copy_state_dict")
class TestCopy:
    @KINDS
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    @pytest.mark.thorough(but=["closed"])
    def test_all_of_it_is_copied(self, judged: Any, mesh: Any, flatten: bool) -> None:
        """Targets of the class, and DTensors around it, must take all that the sources hold."""
        kind, _ = like_upstream(
            lambda k: upstream._copy_state_dict(leaves(k, mesh), leaves(k, mesh, salt=1)), flatten
        )
        into = leaves(kind, mesh, salt=1)
        judged(leaves(kind, mesh), into)
        assert_kept(into, kind, mesh)

    @KINDS
    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_the_class_converts(self, judged: Any, flatten: bool) -> None:
        """A target of the class must take a plain tensor as the class's own `copy_` does."""

        def copied(copy: Any, kind: type[Pair]) -> Pair:
            into = kind.of(numbers(3, 2, salt=1))
            copy({"w": numbers(3, 2)}, {"w": into})
            return into

        kind, _ = like_upstream(lambda k: copied(upstream._copy_state_dict, k), flatten)
        got = copied(judged, kind)
        for name, mine in zip(("first", "second"), got.parts, strict=True):
            assert_same(mine, numbers(3, 2), name)

    @pytest.mark.law("all-or-nothing")
    @pytest.mark.world(1)
    def test_a_class_that_cannot_convert(self, judged: Any) -> None:
        """A target whose class has no such copy is refused by its path, and nothing is copied."""
        kind, fine = subclass_with(["aten.detach.default"], True), numbers(3, salt=1)
        into = {"fine": fine, "deep": [{"odd": kind.of(numbers(3, 2))}], "last": numbers(2, salt=1)}
        value = {"fine": numbers(3), "deep": [{"odd": numbers(3, 2)}], "last": numbers(2)}
        with pytest.raises(Exception, match="odd"):
            judged(value, into)
        assert_same(fine, numbers(3, salt=1), "what was copied before the error")


@pytest.mark.judges("_state_dict_utils._create_cpu_state_dict")
class TestCreate:
    @KINDS
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    @pytest.mark.thorough(but=["closed"])
    def test_buffers_take_what_they_were_made_for(
        self, judged: Any, subject: Any, mesh: Any, flatten: bool
    ) -> None:
        """Buffers for leaves of the class must take a copy of these: that is staging."""

        def staged(create: Any, copy: Any, kind: type[Pair]) -> Any:
            value = leaves(kind, mesh)
            # Torch's own buffer of a DTensor is a plain tensor, and takes no copy.
            kept = {k: v for k, v in value.items() if not isinstance(v, DTensor) or k == "usual"}
            return copy(kept, create(kept))

        kind, _ = like_upstream(
            lambda k: staged(upstream._create_cpu_state_dict, upstream._copy_state_dict, k), flatten
        )
        got = staged(judged, subject.function("_state_dict_utils._copy_state_dict"), kind)
        assert_holds_pair(got["plain"], kind, numbers(3, 2), "plain")
        assert_holds_pair(got["parameter"], kind, numbers(2), "parameter")


@pytest.mark.judges("_state_dict_utils._check_state_dict_similarity")
class TestSimilarity:
    @KINDS
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    @pytest.mark.thorough(but=["traceable"])
    def test_leaves_of_one_class_are_similar(self, judged: Any, mesh: Any, flatten: bool) -> None:
        """State dicts with leaves of the class, of equal shapes, must be found similar."""
        kind, _ = like_upstream(
            lambda k: upstream._check_state_dict_similarity(
                leaves(k, mesh), leaves(k, mesh, salt=1)
            ),
            flatten,
        )
        assert judged(leaves(kind, mesh), leaves(kind, mesh, salt=1)) is True


def landed(load: Any, kind: type[Pair], mesh: Any, *, sharded: bool) -> dict[str, Any]:
    """What `load(full, local)` makes of targets of the class."""
    full = numbers(6, 4, salt=3)
    local: dict[str, Any] = {"plain": kind.of(numbers(3, 2)), "usual": numbers(2)}
    whole = {"plain": numbers(3, 2, salt=3), "usual": numbers(2, salt=3)}
    if sharded:
        local["sharded"] = inside(
            kind.of(part(numbers(6, 4), mesh(2), [S(0)]).clone()), full, mesh(2), [S(0)]
        )
        whole["sharded"] = full
    load(whole, local)
    return local


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcast:
    @KINDS
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    @pytest.mark.thorough(but=["traceable"])
    def test_it_lands(
        self, judged: Any, mesh: Any, rank: int, device: torch.device, flatten: bool
    ) -> None:
        """A plain target of the class must give way, a DTensor around it must take its part."""

        def load(function: Any) -> Any:
            return lambda full, local: function(full if rank == 0 else {}, local, device)

        kind, _ = like_upstream(
            lambda k: landed(load(upstream._broadcast_state_dict), k, mesh, sharded=True), flatten
        )
        got = landed(load(judged), kind, mesh, sharded=True)
        assert_same(got["plain"], numbers(3, 2, salt=3), "plain")
        mine = part(numbers(6, 4, salt=3), mesh(2), [S(0)])
        assert isinstance(got["sharded"]._local_tensor, kind), "the local tensor was replaced"
        for name, held in zip(("first", "second"), got["sharded"]._local_tensor.parts, strict=True):
            assert_same(held, mine, f"sharded.{name}")


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistribute:
    @KINDS
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_it_lands(self, judged: Any, mesh: Any, device: torch.device, flatten: bool) -> None:
        """A plain target of the class is given the full tensor as it came."""

        def load(function: Any) -> Any:
            return lambda full, local: function(full, local, device)

        kind, _ = like_upstream(
            lambda k: landed(load(upstream._distribute_state_dict), k, mesh, sharded=True), flatten
        )
        got = landed(load(judged), kind, mesh, sharded=True)
        assert_same(got["plain"], numbers(3, 2, salt=3), "plain")
        mine = part(numbers(6, 4, salt=3), mesh(2), [S(0)])
        assert_same(got["sharded"]._local_tensor, mine, "sharded")

    @KINDS
    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("held", ["plain", "class"])
    @pytest.mark.thorough(but=["plain-closed", "class-traceable"])
    def test_a_full_tensor_of_the_class(
        self, judged: Any, device: torch.device, flatten: bool, held: str
    ) -> None:
        """A full tensor of the class must land in a plain target, or one of its class, whole."""

        def loaded(function: Any, kind: type[Pair]) -> Any:
            target = numbers(3, 2, salt=1)
            local = {"w": kind.of(target) if held == "class" else target}
            function({"w": kind.of(numbers(3, 2))}, local, device)
            return local["w"]

        kind, _ = like_upstream(lambda k: loaded(upstream._distribute_state_dict, k), flatten)
        assert_holds_pair(loaded(judged, kind), kind, numbers(3, 2), "w")
