"""The walk that applies a function to each kind of tensor, with and without a companion."""

from __future__ import annotations

import io
from collections import UserDict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from torch import nn

from conformance.kit.cases import each
from conformance.kit.compare import assert_unchanged, fingerprint, local
from conformance.kit.containers import (
    CONTAINERS,
    Point,
)
from conformance.kit.data import numbers
from conformance.kit.generated import examples, state_dicts
from conformance.kit.layouts import S, dtensor
from conformance.kit.levels import EXOTIC, WORDS
from conformance.kit.nested import (
    assert_apart,
    assert_same_structure,
    sample,
)
from conformance.kit.refusals import refused
from conformance.kit.walks import SAME, Opaque, same, three_kinds

WALK = "_state_dict_utils._iterate_state_dict"
IDENTITY = "_state_dict_utils._identity_func"
MISMATCH = "_state_dict_utils.CompanionMismatch"


@pytest.mark.judges(WALK)
class TestIterateStateDict:
    @pytest.mark.law("values")
    @pytest.mark.world(1, 2)
    def test_each_kind_meets_its_function(self, judged: Any, mesh: Any, world: Any) -> None:
        """ShardedTensor, DTensor and other tensors go to their own function, with pg and device."""
        calls: list[tuple[Any, ...]] = []

        def function(name: str) -> Any:
            def call(*args: Any) -> str:
                calls.append((name, *args))
                return f"{name} was here"

            return call

        kinds = three_kinds(mesh, world.size)
        value = {"a": [kinds["sharded"]], "b": {"c": kinds["dtensor"]}, "d": (kinds["tensor"],)}
        group, device = dist.group.WORLD, torch.device("cpu")
        three = (function("sharded"), function("dtensor"), function("tensor"))
        got = judged(value, *three, pg=group, device=device)
        assert got == {
            "a": ["sharded was here"], "b": {"c": "dtensor was here"}, "d": ("tensor was here",),
        }  # fmt: skip
        assert [name for name, *_ in calls] == ["sharded", "dtensor", "tensor"]
        for name, tensor, pg, where, companion in calls:
            assert tensor is kinds[name], f"{name}: not the leaf itself"
            assert (pg, where, companion) == (group, device, None), f"{name}: other arguments"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_every_container_is_kept(self, judged: Any) -> None:
        """Containers keep type, keys and order around what the functions return."""
        a, b = numbers(2, 3), numbers(3, salt=1)

        def negative(tensor: Any, *_: Any) -> Any:
            return -tensor

        def walk(name: str) -> None:
            make = CONTAINERS[name]
            got = judged({"here": make(a, b), "after": [1]}, same, same, negative)
            assert_same_structure(got, {"here": make(-a, -b), "after": [1]})
            assert_same_structure(judged(make(a, b), same, same, negative), make(-a, -b), "root")

        each(CONTAINERS, walk)

    @pytest.mark.law("structure")
    @pytest.mark.should(EXOTIC)
    @pytest.mark.world(1)
    def test_a_tuple_type_that_cannot_be_made_anew(self, judged: Any) -> None:
        """A tuple type that takes its items one by one comes out as a tuple of them."""
        got = judged({"x": Point(numbers(3), 1)}, same, same, same)
        assert_same_structure(got, {"x": (numbers(3), 1)})

    @pytest.mark.law("structure")
    @pytest.mark.should(EXOTIC)
    @pytest.mark.world(1)
    def test_torch_size_stays_one(self, judged: Any) -> None:
        """A torch.Size comes back as a torch.Size."""
        got = judged({"size": torch.Size([2, 3])}, *SAME)
        assert_same_structure(got, {"size": torch.Size([2, 3])})

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_tensors_in_any_mapping_are_met(self, judged: Any) -> None:
        """Tensors in a Mapping that is no dict go through the functions as well."""
        for type_check in (True, False):
            got = judged(UserDict({"x": numbers(3)}), same, same, lambda *_: "met",
                         type_check=type_check)  # fmt: skip
            assert dict(got) == {"x": "met"}, f"type_check={type_check}"

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    def test_a_whole_state_dict(self, judged: Any, mesh: Any, world: Any) -> None:
        """With functions that change nothing the result holds the very tensors, in new dicts."""
        value = sample(**three_kinds(mesh, world.size))
        before = fingerprint(value)
        got = judged(value, *SAME)
        assert_same_structure(got, value)
        assert got["dtensor"] is value["dtensor"]
        assert got["model"]["weight"] is value["model"]["weight"]
        got["model"].clear()
        got["optimizer"]["param_groups"].append(1)
        assert fingerprint(value) == before, "the input was changed"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_ties_survive_a_copy(self, judged: Any) -> None:
        """Tied tensors are still tied when the function makes copies."""
        shared, view = numbers(3), numbers(4, 2, salt=1)
        value = {"a": shared, "b": [shared], "v": view, "w": view.view(4, 2), "other": numbers(3)}
        got = judged(value, same, same, lambda tensor, *_: tensor.clone())
        assert_same_structure(got, value)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_generated_state_dicts(self, judged: Any, world: Any) -> None:
        """The walk keeps type, order and ties of generated state dicts."""

        @examples(world.seed)
        @given(state_dicts())
        def walk(value: Any) -> None:
            before = fingerprint(value)
            assert_same_structure(judged(value, *SAME), value)
            assert_unchanged(value, before)

        walk()

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    @pytest.mark.parametrize(
        "leaf",
        [1, True, -0.0, float("nan"), 1 + 2j, "text", b"bytes", None, {1, 2}, frozenset({1})],
        ids=lambda leaf: type(leaf).__name__,
    )
    @pytest.mark.thorough(but=["int", "float1", "complex", "str", "NoneType", "set"])
    def test_plain_values_pass_the_type_check(self, judged: Any, leaf: Any) -> None:
        """Numbers, strings, bytes, sets and None come back as they are."""
        assert_same_structure(judged({"x": [leaf]}, *SAME), {"x": [leaf]})

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_byte_streams_pass_the_type_check(self, judged: Any) -> None:
        """A BytesIO comes back with its bytes."""
        got = judged({"x": io.BytesIO(b"bytes")}, *SAME)
        assert got["x"].getvalue() == b"bytes"

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_type_check_refuses_what_no_checkpoint_holds(self, judged: Any) -> None:
        """A leaf of an unsupported type raises ValueError."""
        for value in ({"x": Opaque()}, {"x": [1, {"y": Opaque()}]}, {"x": (object(),)}):
            with pytest.raises(ValueError, match=r"(?i)type"):
                judged(value, *SAME)

    @pytest.mark.law("symmetry")
    @pytest.mark.should(WORDS)
    @pytest.mark.world(1)
    def test_type_check_names_the_leaf(self, judged: Any) -> None:
        """The error for an unsupported leaf names its path."""
        value = {"outer": [{"inner": Opaque()}]}
        refused(lambda: judged(value, *SAME), "outer", "inner", kinds=(ValueError,))

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_without_type_check_leaves_are_deep_copied(self, judged: Any) -> None:
        """Without the type check an unsupported leaf comes back as a deep copy."""
        leaf = Opaque([1])
        got = judged({"x": [leaf]}, *SAME, type_check=False)["x"][0]
        assert type(got) is Opaque
        assert got is not leaf, "the leaf itself came back, expected a deep copy"
        assert got.inside == [1]
        assert got.inside is not leaf.inside, "the copy holds the leaf's own list, not a copy of it"

    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    def test_offloaded_results_are_apart(self, judged: Any, mesh: Any, world: Any) -> None:
        """With cpu_offload no result lies in the memory of the state dict."""
        value = sample(**three_kinds(mesh, world.size))
        got = judged(value, *SAME, cpu_offload=True, type_check=False)
        assert_apart(got, value)

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_offloaded_views_are_apart(self, judged: Any, mesh: Any) -> None:
        """With cpu_offload a view of a leaf that a function returns is copied, too."""
        full = numbers(4, 3)
        value = {"plain": full, "inner": [{"rows": dtensor(full + 1, mesh(1), [S(0)])}]}
        got = judged(value, *[lambda tensor, *_: local(tensor).detach()] * 3, cpu_offload=True)
        assert_apart(got, value)

    @pytest.mark.law("group")
    @pytest.mark.world(3)
    def test_ranks_only_counts_in_the_group(self, judged: Any, mesh: Any, rank: int) -> None:
        """`ranks_only` names ranks in the numbering of pg; elsewhere the result is empty."""
        group = mesh(2, ranks=[1, 2]).get_group() if rank else None
        mesh(2, ranks=[1, 2])
        value = {"x": [numbers(3)], "y": 1}
        if rank:
            got = judged(value, *SAME, pg=group, ranks_only=(1,))
            assert_same_structure(got, value if rank == 2 else {}, f"group, rank {rank}")
        got = judged(value, *SAME, ranks_only=(0, 2))
        assert_same_structure(got, {} if rank == 1 else value, f"default group, rank {rank}")


@pytest.mark.judges(IDENTITY)
class TestIdentityFunc:
    @pytest.mark.law("values")
    @pytest.mark.world(1, 2)
    def test_gives_back_what_it_got(self, judged: Any, mesh: Any, world: Any) -> None:
        """The tensor comes back as the same object, untouched, whatever its kind."""
        kinds: dict[str, Any] = three_kinds(mesh, world.size)
        kinds["parameter"] = nn.Parameter(numbers(2))
        kinds["DTensor parameter"] = nn.Parameter(dtensor(numbers(4, 2), mesh(world.size), [S(0)]))
        companion = numbers(2, salt=1)
        all_of_them = [kinds, companion]
        before = fingerprint(all_of_them)
        for name, tensor in kinds.items():
            for more in (dist.group.WORLD, torch.device("cpu"), companion), (None, None, None):
                got = judged(tensor, *more)
                assert got is tensor, f"{name}: another {type(got).__name__}, expected the same one"
        assert_unchanged(all_of_them, before)


@pytest.mark.judges(MISMATCH)
class TestCompanionMismatch:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_is_an_exception_of_its_own(self, judged: Any) -> None:
        """It is an Exception type that keeps its message and can be told from built-in ones."""
        assert issubclass(judged, Exception)
        assert judged not in (Exception, ValueError, TypeError, KeyError, RuntimeError)
        assert "a.b" in str(judged("a.b: expected a tensor"))
