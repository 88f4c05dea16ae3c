"""The walk with a companion, which receives copies where kinds, shapes and dtypes agree."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

from conformance.kit.agree import attempt
from conformance.kit.cases import each
from conformance.kit.compare import assert_same, fingerprint
from conformance.kit.containers import (
    GROUPS,
    KINDS,
    PLACEMENTS,
    dashed,
    group_of,
)
from conformance.kit.data import DTYPES, numbers
from conformance.kit.levels import WORDS
from conformance.kit.nested import (
    assert_apart,
    assert_same_structure,
)
from conformance.kit.refusals import assert_refusal, refused
from conformance.kit.walks import SAME, Opaque, same, three_kinds

WALK = "_state_dict_utils._iterate_state_dict"
MISMATCH = "_state_dict_utils.CompanionMismatch"
DISAGREE = KINDS | PLACEMENTS


@pytest.mark.judges(WALK)
class TestIterateStateDictWithCompanion:
    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_the_companion_of_a_rank_without_a_result(self, judged: Any, rank: int) -> None:
        """The companion of a rank that `ranks_only` leaves out stays as it was."""
        target = {"w": numbers(3, salt=1)}
        got = judged({"w": numbers(3)}, *SAME, companion_obj=target, ranks_only=(0,))
        assert_same_structure(got, {} if rank else {"w": numbers(3)})
        assert_same(target["w"], numbers(3, salt=rank))

    @pytest.mark.law("values")
    @pytest.mark.world(1, 2)
    def test_the_companion_receives_copies(self, judged: Any, mesh: Any, world: Any) -> None:
        """Tensors of the companion take the values, and they are what the result holds."""
        source, target = three_kinds(mesh, world.size), three_kinds(mesh, world.size, salt=1)
        kept = dict(target)
        got = judged({"x": [source, 1]}, *SAME, companion_obj={"x": [target, 0]})
        assert_same_structure(got, {"x": [source, 1]})
        for name, tensor in kept.items():
            assert got["x"][0][name] is tensor, f"{name}: not the companion's tensor"
            assert target[name] is tensor, f"{name}: the companion holds another object"
        assert_apart(got, source)

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_functions_see_their_companion(self, judged: Any) -> None:
        """Each function meets the companion of its tensor; its result is what is copied."""
        target: dict[str, Any] = {"a": [numbers(3)], "b": numbers(2)}
        seen = []

        def double(tensor: Any, pg: Any, device: Any, companion: Any) -> Any:
            seen.append(companion)
            return tensor * 2

        judged({"a": [numbers(3, salt=1)], "b": numbers(2, salt=2)}, same, same, double,
               companion_obj=target)  # fmt: skip
        assert len(seen) == 2
        assert seen[0] is target["a"][0]
        assert seen[1] is target["b"]
        assert_same(target["a"][0], numbers(3, salt=1) * 2)
        assert_same(target["b"], numbers(2, salt=2) * 2)

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_every_dtype_is_copied_to_the_bit(self, judged: Any) -> None:
        """Every dtype arrives in the companion bit for bit."""
        for dtype in DTYPES:
            target = {"x": numbers(4, 3, dtype=dtype, salt=5).t()}
            judged({"x": numbers(3, 4, dtype=dtype)}, *SAME, companion_obj=target)
            assert_same(target["x"], numbers(3, 4, dtype=dtype), str(dtype))

    @pytest.mark.law("symmetry")
    @pytest.mark.world(1)
    def test_keys_in_another_order_find_each_other(self, judged: Any) -> None:
        """A companion with its keys in another order receives each tensor under its key."""
        target: dict[str, Any] = {"b": {"y": numbers(4), "x": numbers(4)}, "a": numbers(4)}
        source = {"a": numbers(4, salt=1), "b": {"x": numbers(4, salt=2), "y": numbers(4, salt=3)}}
        got = judged(source, *SAME, companion_obj=target)
        assert list(target) == ["b", "a"], "the companion's order changed"
        assert_same_structure(got, source)
        assert_same(target["a"], numbers(4, salt=1), "a")
        assert_same(target["b"]["x"], numbers(4, salt=2), "b.x")
        assert_same(target["b"]["y"], numbers(4, salt=3), "b.y")

    @pytest.mark.law("structure")
    @pytest.mark.should(WORDS)
    @pytest.mark.world(1)
    @pytest.mark.parametrize("group", GROUPS, ids=dashed)
    def test_a_mismatch_names_the_path(
        self, judged: Any, subject: Any, mesh: Any, group: str
    ) -> None:
        """Where kinds, shapes, dtypes or placements differ, CompanionMismatch names the path."""

        def refuse(name: str) -> None:
            source, target = DISAGREE[name](mesh(1))
            companion = {"fine": numbers(3), "deep": [{"odd": target}]}
            value = {"fine": numbers(3), "deep": [{"odd": source}]}
            error = attempt(lambda: judged(value, *SAME, companion_obj=companion))
            assert isinstance(error, subject.function(MISMATCH)), f"{name}: got {error!r}"
            assert_refusal(error, "deep", "odd", what=name)

        each([name for name in DISAGREE if group_of(name) == group], refuse)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_a_key_mismatch_names_the_key(self, judged: Any, subject: Any) -> None:
        """A missing or additional key is a CompanionMismatch that names it, at every depth."""
        x = numbers(3)
        for name, value, other in (
            ("missing", {"a": x, "odd": x}, {"a": x}),
            ("extra", {"a": x}, {"a": x, "odd": x}),
            ("missing below", {"a": [{"odd": x}]}, {"a": [{}]}),
            ("extra below", {"a": [{}]}, {"a": [{"odd": x}]}),
        ):
            error = attempt(lambda v=value, o=other: judged(v, *SAME, companion_obj=o))  # type: ignore[misc]
            assert isinstance(error, subject.function(MISMATCH)), f"{name}: {error!r}"
            assert_refusal(error, "odd", what=name)

    @pytest.mark.law("all-or-nothing")
    @pytest.mark.world(1)
    def test_after_a_mismatch_nothing_was_copied(
        self, judged: Any, subject: Any, mesh: Any
    ) -> None:
        """After a mismatch the companion is as it was, what came before it included."""

        def refuse(name: str) -> None:
            source, target = DISAGREE[name](mesh(1))
            companion = {"fine": numbers(3, salt=1), "odd": target, "last": numbers(2, salt=1)}
            before = fingerprint(companion)
            value = {"fine": numbers(3), "odd": source, "last": numbers(2)}
            error = attempt(lambda: judged(value, *SAME, companion_obj=companion))
            assert isinstance(error, subject.function(MISMATCH)), f"{name}: got {error!r}"
            assert fingerprint(companion) == before, f"changed before {error!r}"

        each(DISAGREE, refuse)

    @pytest.mark.law("all-or-nothing")
    @pytest.mark.world(1)
    def test_after_a_bad_leaf_nothing_was_copied(self, judged: Any, subject: Any) -> None:
        """After an unsupported leaf the companion is as it was."""
        companion = {"fine": numbers(3, salt=1), "odd": Opaque()}
        before = fingerprint(companion)
        value = {"fine": numbers(3), "odd": Opaque()}
        kinds = (ValueError, subject.function(MISMATCH))
        told = re.compile("odd|(?i:type)")
        error = refused(lambda: judged(value, *SAME, companion_obj=companion), told, kinds=kinds)
        assert fingerprint(companion) == before, f"changed before {error!r}"

    @pytest.mark.law("autograd")
    @pytest.mark.world(1)
    def test_no_graph_is_kept(self, judged: Any) -> None:
        """Values of trained parameters are copied without a graph; flags of the companion stay."""
        companion = {"plain": numbers(3, salt=1), "trained": nn.Parameter(numbers(3, salt=2))}
        value = {name: nn.Parameter(numbers(3, salt=3)) for name in companion}
        judged(value, *SAME, companion_obj=companion)
        for name, tensor in companion.items():
            assert tensor.grad_fn is None, f"{name} is part of a graph"
            assert tensor.requires_grad == (name == "trained"), f"{name}: requires_grad changed"
            assert_same(tensor.detach(), numbers(3, salt=3), name)
