"""Whether two state dicts have the same structure."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conformance.kit.cases import each
from conformance.kit.compare import fingerprint
from conformance.kit.containers import CONTAINERS, GROUPS, KINDS, dashed, group_of
from conformance.kit.data import DTYPES, SHAPES, VIEWS, numbers
from conformance.kit.layouts import S, dtensor, rows, sharded_tensor
from conformance.kit.nested import sample


def distributed(mesh: Any, size: int, salt: int) -> dict[str, Any]:
    """A DTensor and a ShardedTensor of two shards on the first rank."""
    full = numbers(5, 2, salt=salt)
    owners = [0, size - 1]
    return {
        "dtensor": dtensor(full, mesh(size), [S(0)]),
        "sharded": sharded_tensor(full, rows(full.shape, [2, 3], owners)),
    }


@pytest.mark.judges("_state_dict_utils._check_state_dict_similarity")
class TestCheckStateDictSimilarity:
    @pytest.mark.law("values")
    @pytest.mark.world(1, 2)
    def test_other_values_are_similar(self, judged: Any, mesh: Any, world: Any) -> None:
        """State dicts that differ in the values of their tensors alone are similar."""
        ours = sample(**distributed(mesh, world.size, 0))
        theirs = sample(**distributed(mesh, world.size, 1))
        theirs["model"]["buffer"] += 1
        assert judged(ours, theirs) is True

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_every_dtype_and_shape(self, judged: Any) -> None:
        """Equal shapes and dtypes are similar, whatever they are; unequal ones are not."""
        for shape in SHAPES:
            ours = {"x": numbers(*shape)}
            for other in SHAPES:
                got = judged(ours, {"x": numbers(*other, salt=1)})
                assert got is (shape == other), f"{shape} and {other}: {got}"
        for dtype in DTYPES:
            same: Any = {"x": [numbers(3, dtype=dtype)]}
            for other_dtype in DTYPES:
                got = judged(same, {"x": [numbers(3, dtype=other_dtype)]})
                assert got is (dtype == other_dtype), f"{dtype} and {other_dtype}: {got}"

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_memory_layout_does_not_matter(self, judged: Any) -> None:
        """Strides, offsets, meta and `requires_grad` make no difference."""
        ours = {"x": numbers(4, 6)}
        for name, other in {
            "transposed": numbers(6, 4).t(),
            "expanded": numbers(1, 6).expand(4, 6),
            "meta": torch.empty(4, 6, device="meta"),
            "parameter": torch.nn.Parameter(numbers(4, 6)),
        }.items():
            got = judged(ours, {"x": other})
            assert got is True, f"{name}: {got}, expected True"
            assert judged({"x": other}, ours) is True, f"{name}, other way round"

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_a_parameter_is_a_tensor(self, judged: Any, mesh: Any) -> None:
        """A Parameter must be similar to a tensor of its shape and dtype, however both lie."""
        line = mesh(1)
        for dtype in (torch.float32, torch.bfloat16, torch.complex64):
            for view, lay in VIEWS.items():
                plain = lay(numbers(4, 6, dtype=dtype))
                placed = dtensor(plain, line, [S(0)], local=plain)
                for theirs in (plain, placed):
                    what = f"{type(theirs).__name__}, {dtype}, {view}"
                    for trains in (False, True):
                        ours = {"x": torch.nn.Parameter(theirs.detach(), requires_grad=trains)}
                        with torch.no_grad():
                            assert judged(ours, {"x": theirs}) is True, what
                            assert judged({"x": theirs}, ours) is True, f"{what}, other way round"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_every_container_is_compared(self, judged: Any) -> None:
        """The comparison goes into every container, and sees what differs there."""

        def compare(name: str) -> None:
            make = CONTAINERS[name]
            ours = {"here": make(numbers(2, 3), numbers(3))}
            assert judged(ours, {"here": make(numbers(2, 3), numbers(3))}) is True, "equal ones"
            for other in (make(numbers(2, 3), numbers(4)), make(numbers(3, 2), numbers(3))):
                assert judged(ours, {"here": other}) is False, "a shape differs"

        each(CONTAINERS, compare)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("group", GROUPS, ids=dashed)
    def test_kinds_shapes_and_dtypes_have_to_agree(
        self, judged: Any, mesh: Any, group: str
    ) -> None:
        """Where a kind, a shape or a dtype differs, the answer is False, not an error."""

        def compare(name: str) -> None:
            ours, theirs = KINDS[name](mesh(1))
            got = judged({"a": 1, "deep": [{"x": ours}]}, {"a": 1, "deep": [{"x": theirs}]})
            assert got is False, f"the answer is {got}"

        each([name for name in KINDS if group_of(name) == group], compare)

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_leaves_that_are_no_tensors_do_not_matter(self, judged: Any) -> None:
        """Numbers, text and None in each other's place are similar; a tensor there is not."""
        values = [1, 2.5, "text", None, b"raw", {1}]
        for ours in values:
            for theirs in values:
                assert judged({"a": ours}, {"a": theirs}) is True, f"{ours!r} and {theirs!r}"
            assert judged({"a": ours}, {"a": numbers(1)}) is False, f"{ours!r} and a tensor"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_keys_have_to_agree(self, judged: Any) -> None:
        """A missing, an additional or a renamed key makes the answer False, at every depth."""
        x = numbers(3)
        base = {"a": x, "b": {"c": x, "d": [x]}}
        for name, other in {
            "missing": {"b": {"c": x, "d": [x]}},
            "missing below": {"a": x, "b": {"d": [x]}},
            "extra": {"a": x, "b": {"c": x, "d": [x]}, "e": x},
            "extra below": {"a": x, "b": {"c": x, "d": [x], "e": x}},
            "renamed": {"z": x, "b": {"c": x, "d": [x]}},
            "int for str": {"a": x, "b": {"c": x, "d": [x]}, 0: x},
            "empty": {},
            "longer list": {"a": x, "b": {"c": x, "d": [x, x]}},
            "empty list": {"a": x, "b": {"c": x, "d": []}},
        }.items():
            got = judged(base, other)
            assert got is False, f"{name}: {got}, expected False"
            assert judged(other, base) is False, f"{name}, other way round"
        assert judged({}, {}) is True

    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    def test_reads_only(self, judged: Any, mesh: Any, world: Any) -> None:
        """Neither state dict is changed, whatever the answer."""
        ours = sample(**distributed(mesh, world.size, 0))
        theirs = sample(**distributed(mesh, world.size, 1))
        for tensor in ("weight", "buffer", "counts"):
            theirs["model"][tensor].detach().add_(1)
        different = sample(**distributed(mesh, world.size, 2), additional=numbers(1))
        three = [ours, theirs, different]
        before = fingerprint(three)
        judged(ours, theirs)
        assert fingerprint(three) == before, "changed by a comparison"
        judged(ours, different)
        judged(different, theirs)
        assert fingerprint(three) == before, "changed where they differ"

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_reads_only_of_plain_tensors(self, judged: Any) -> None:
        """A comparison of plain tensors that need no gradient changes neither."""
        ours, theirs = {"x": [numbers(3)]}, {"x": [numbers(3, salt=1)]}
        pair = [ours, theirs]
        before = fingerprint(pair)
        assert judged(ours, theirs) is True
        assert fingerprint(pair) == before, f"the state dicts are now {pair}"

    @pytest.mark.law("autograd")
    @pytest.mark.world(1)
    def test_builds_no_graph(self, judged: Any) -> None:
        """No tensor becomes a part of a graph."""
        ours = {"x": torch.nn.Parameter(numbers(3))}
        theirs = {"x": numbers(3, salt=1)}
        assert judged(ours, theirs) is True
        assert theirs["x"].grad_fn is None, "the compared tensor is part of a graph now"
        assert not theirs["x"].requires_grad
