"""Copying the tensors of one state dict into those of another."""

from __future__ import annotations

import copy
import re
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import nn

from conformance.kit.agree import attempt
from conformance.kit.cases import each
from conformance.kit.compare import assert_same, assert_unchanged, bits, fingerprint
from conformance.kit.containers import CONTAINERS, KINDS, PLACEMENTS, dashed
from conformance.kit.data import EACH_DTYPE, SHAPES, VIEWS, numbers
from conformance.kit.generated import examples, state_dicts
from conformance.kit.layouts import (
    ONE_D,
    TWO_D,
    R,
    dtensor,
    part,
    placement_id,
    rows,
    sharded_tensor,
)
from conformance.kit.levels import WORDS
from conformance.kit.nested import (
    assert_apart,
    assert_same_structure,
    blank,
    sample,
    spoil,
    tensors,
)
from conformance.kit.refusals import MISSING, assert_refusal, refused

SEEN = [
    "one element for four",
    "float for int",
    "four elements for one",
    "tensor for DTensor",
    "DTensor of other placements",
    "ShardedTensor in other shards",
]
"""Cases that deserve a check of their own: those that pass in silence do harm."""


@pytest.mark.judges("_state_dict_utils._copy_state_dict")
class TestCopyStateDict:
    @pytest.mark.law("values")
    @pytest.mark.world(1)
    @EACH_DTYPE
    @pytest.mark.thorough(but=["float8_e4m3fn"])
    def test_every_dtype_and_memory_layout(self, judged: Any, dtype: torch.dtype) -> None:
        """Every dtype is copied bit for bit, whatever the strides on either side."""
        source, expected, target = {}, {}, {}
        for shape in SHAPES:
            for view, make in VIEWS.items():
                for into in ("contiguous", "transposed", "sliced", "offset"):
                    name = f"{shape} {view} into {into}"
                    source[name] = make(numbers(*shape, dtype=dtype))
                    expected[name] = source[name].contiguous().clone()
                    target[name] = VIEWS[into](numbers(*shape, dtype=dtype, salt=5))
        judged(source, target)
        for name, tensor in expected.items():
            assert_same(target[name], tensor, f"{dtype} {name}")

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_bits_that_compare_equal_are_told_apart(self, judged: Any) -> None:
        """NaN payloads, negative zeros, lazily conjugated and negated views arrive as they are."""
        pattern = torch.tensor([0x7FC00001, -0x80000000, 0x7F800001, 0], dtype=torch.int32)
        odd, pair = pattern.view(torch.float32), numbers(3, dtype=torch.complex64)
        source = {"odd": odd, "conj": pair.conj(), "neg": pair.conj().imag}
        target = {"odd": numbers(4), "conj": numbers(3, dtype=torch.complex64), "neg": numbers(3)}
        judged(source, target)
        assert_same(target["odd"], odd, "NaN and -0.0")
        assert torch.equal(target["conj"].real, pair.real)
        assert torch.equal(target["conj"].imag, -pair.imag)
        assert torch.equal(bits(target["neg"]), bits(-pair.imag))

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("placements", ONE_D, ids=placement_id)
    @pytest.mark.thorough(but=["R", "S1"])
    def test_dtensors(self, judged: Any, mesh: Any, placements: Any) -> None:
        """The local tensor of a DTensor takes the values, even, uneven or empty."""
        line = mesh(2)
        for shape in [(4, 6), (5, 3), (1, 1), (0, 3), (3, 0)]:
            full = numbers(*shape)
            ours, theirs = dtensor(full, line, placements), dtensor(full * 0, line, placements)
            got = judged({"x": [ours]}, {"x": [theirs]})
            assert got["x"][0] is theirs, f"{shape}: not the target's DTensor"
            assert_same(theirs._local_tensor, part(full, line, placements), str(shape))

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_dtensors_over_two_dimensions(self, judged: Any, mesh: Any) -> None:
        """On a 2-D mesh the local tensor must take the values, whatever the placements."""
        square = mesh(2, 2)
        for placements in TWO_D:
            full = numbers(7, 5)
            theirs = dtensor(full * 0, square, placements)
            judged({"x": dtensor(full, square, placements)}, {"x": theirs})
            expected = part(full, square, placements)
            assert_same(theirs._local_tensor, expected, placement_id(placements))

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_sharded_tensors(self, judged: Any) -> None:
        """Every shard of a ShardedTensor takes its values: several a rank, none, empty ones."""
        full = numbers(7, 2)
        for counts, owners in (
            ([3, 4], [0, 1]), ([3, 4], [1, 0]), ([1, 2, 4], [1, 0, 1]), ([7], [1]),
            ([0, 3, 4], [0, 1, 0]),
        ):  # fmt: skip
            boxes = rows(full.shape, counts, owners)
            theirs = sharded_tensor(full * 0, boxes)
            got = judged({"x": sharded_tensor(full, boxes)}, {"x": theirs})
            assert got["x"] is theirs, f"{counts}: not the target's tensor"
            for shard in theirs.local_shards():
                (start, _), (count, _) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
                where = f"{counts} on {owners}"
                assert_same(shard.tensor, full[start : start + count], where)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_returns_a_dict_over_the_targets_tensors(self, judged: Any) -> None:
        """The result has the structure of the source, over the very tensors of the target."""
        source = sample()
        target = blank(source)
        kept, keys = tensors(target), list(target)
        got = judged(source, target)
        assert_same_structure(got, source)
        for path, tensor in tensors(got).items():
            assert tensor is kept[path], f"{path}: not the target's tensor"
        got["new"] = 1
        got["model"].clear()
        got["optimizer"]["param_groups"].append(1)
        assert list(target) == keys, "an edit of the result reaches the target"
        assert len(target["model"]) == len(source["model"])
        assert len(target["optimizer"]["param_groups"]) == 2

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_every_container(self, judged: Any) -> None:
        """Tensors in every container are copied, and the result has its type."""

        def copy(name: str) -> None:
            make = CONTAINERS[name]
            target = {"x": make(numbers(2, 3), numbers(3))}
            source = {"x": make(numbers(2, 3, salt=1), numbers(3, salt=2))}
            assert_same_structure(judged(source, target, type_check=False), source)
            assert_same_structure(target, source, "the target")

        each(CONTAINERS, copy)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_plain_values_are_those_of_the_source(self, judged: Any) -> None:
        """Leaves that are no tensors come from the source; those of the target stay."""
        target = {"a": 1, "b": ["old", 0.0], "x": numbers(3)}
        got = judged({"a": 2, "b": ["new", 0.5], "x": numbers(3, salt=1)}, target)
        assert got["a"] == 2
        assert got["b"] == ["new", 0.5]
        assert target["a"] == 1
        assert target["b"] == ["old", 0.0]

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_generated_state_dicts(self, judged: Any, world: Any) -> None:
        """Generated state dicts arrive whole: containers, order, ties, bits; the source stays."""

        @examples(world.seed)
        @given(state_dicts())
        def copy(value: Any) -> None:
            before, target = fingerprint(value), blank(value)
            got = judged(value, target)
            assert fingerprint(value) == before, "the source was changed"
            assert_same_structure(got, value)
            assert_apart(got, value)

        copy()

    @pytest.mark.law("symmetry")
    @pytest.mark.world(1)
    def test_keys_in_another_order(self, judged: Any) -> None:
        """A target with its keys in another order receives each tensor under its key."""
        target = {"b": numbers(4), "a": numbers(4)}
        got = judged({"a": numbers(4, salt=1), "b": numbers(4, salt=2)}, target)
        assert_same(target["a"], numbers(4, salt=1), "a")
        assert_same(target["b"], numbers(4, salt=2), "b")
        assert list(got) == ["a", "b"]

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("name", SEEN, ids=dashed)
    def test_a_target_that_does_not_fit(self, judged: Any, mesh: Any, name: str) -> None:
        """Kinds, shapes, dtypes and placements are checked first: what does not fit is an error."""
        source, target = (KINDS | PLACEMENTS)[name](mesh(1))
        value, into = {"deep": [{"odd": source}]}, {"deep": [{"odd": target}]}
        refused(lambda: judged(value, into), what=name)

    @pytest.mark.law("symmetry")
    @pytest.mark.should(WORDS)
    @pytest.mark.world(1)
    def test_the_error_names_the_path(self, judged: Any, mesh: Any) -> None:
        """The error for a leaf that does not fit names its path."""

        def refuse(name: str) -> None:
            source, target = (KINDS | PLACEMENTS)[name](mesh(1))
            value, into = {"deep": [{"odd": source}]}, {"deep": [{"odd": target}]}
            refused(lambda: judged(value, into), "deep", "odd", what=name)

        each(KINDS | PLACEMENTS, refuse)

    @pytest.mark.law("symmetry")
    @pytest.mark.should(WORDS)
    @pytest.mark.world(1)
    def test_the_error_names_the_kind(self, judged: Any, mesh: Any) -> None:
        """The error for a tensor in the place of a DTensor, or the other way, says DTensor."""
        full = numbers(3)
        pair = full, dtensor(full, mesh(1), [R])
        for value, into in (pair, pair[::-1]):
            refused(partial(judged, {"w": value}, {"w": into}), re.compile(r"\bDTensor\b"))

    @pytest.mark.law("symmetry")
    @pytest.mark.world(1)
    def test_the_error_names_the_key(self, judged: Any) -> None:
        """A key that only one side has is an error that names it, in either direction."""
        x = numbers(3)
        for name, value, into in (
            ("missing", {"a": x, "odd": x}, {"a": x}),
            ("extra", {"a": x}, {"a": x, "odd": x}),
            ("missing below", {"a": [{"odd": x}]}, {"a": [{}]}),
        ):
            refused(partial(judged, value, into), "odd", kinds=MISSING, what=name)

    @pytest.mark.law("all-or-nothing")
    @pytest.mark.world(1)
    def test_after_an_error_the_target_is_as_it_was(self, judged: Any, mesh: Any) -> None:
        """After an error no tensor of the target was changed, those before the bad one included."""

        def refuse(name: str) -> None:
            source, target = (KINDS | PLACEMENTS)[name](mesh(1))
            into = {"fine": numbers(3, salt=1), "odd": target, "last": numbers(2, salt=1)}
            before = fingerprint(into)
            value = {"fine": numbers(3), "odd": source, "last": numbers(2)}
            error = attempt(lambda: judged(value, into))
            assert fingerprint(into) == before, f"{name}: changed, error {error!r}"
            assert_refusal(error, what=name)

        each(KINDS | PLACEMENTS, refuse)

    @pytest.mark.law("all-or-nothing")
    @pytest.mark.world(1)
    def test_after_an_impossible_copy_the_target_is_as_it_was(self, judged: Any) -> None:
        """Where shapes fit but a tensor has or holds no data, all must stay as it was."""
        impossible = {
            "source on meta": (torch.empty(4, device="meta"), numbers(4)),
            "target expanded": (numbers(4), numbers(1).expand(4)),
            "leaf of no known type": (object(), object()),
        }

        def refuse(name: str) -> None:
            source, target = impossible[name]
            into = {"fine": numbers(3, salt=1), "odd": target}
            before = fingerprint(into)
            error = attempt(lambda: judged({"fine": numbers(3), "odd": source}, into))
            assert fingerprint(into) == before, f"{name}: changed, error {error!r}"
            assert_refusal(error, what=name)

        each(impossible, refuse)

    @pytest.mark.law("symmetry")
    @pytest.mark.should(WORDS)
    @pytest.mark.world(1)
    def test_an_error_names_its_own_key(self, judged: Any) -> None:
        """Of all that a state dict holds the error must name the leaf that does not fit."""
        rest = {"step": 3, "name": "x", "none": None, "more": [1.5, {"size": numbers(2)}]}
        for place in range(len(rest) + 1):
            for said, target in {
                "another shape": numbers(4),
                "a target on meta": numbers(3).to("meta"),
            }.items():
                value = dict([*rest.items()][:place])
                value |= {"odd": numbers(3)} | dict([*rest.items()][place:])
                into = copy.deepcopy(value) | {"odd": target}
                refused(lambda: judged(value, into), "odd", what=f"{said}, {place}")  # noqa: B023

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_a_target_on_meta_is_refused(self, judged: Any) -> None:
        """A target that cannot hold values is an error: they would be lost in silence."""
        into = {"layer.odd": torch.empty(4, device="meta")}
        error = attempt(lambda: judged({"layer.odd": numbers(4)}, into))
        if error is None:
            assert not into["layer.odd"].is_meta, "accepted, and the values are nowhere"
        else:
            assert_refusal(error, re.compile("layer.odd|(?i:meta)"))

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_the_source_stays_as_it_was(self, judged: Any) -> None:
        """The source is not changed, nothing aliases it, and a second call gives the same."""
        source = sample()
        before, target = fingerprint(source), blank(source)
        got = judged(source, target)
        assert_unchanged(source, before)
        assert_apart(got, source)
        spoil(got)
        assert fingerprint(source) == before, "the result lies in the source's memory"
        assert_same_structure(judged(source, target), source, "second call")

    @pytest.mark.law("autograd")
    @pytest.mark.world(1)
    def test_no_graph_is_built(self, judged: Any) -> None:
        """Parameters are copied without a graph, results of a forward are as well; flags stay."""
        trained = nn.Parameter(numbers(3, salt=1))
        source = {"a": trained, "b": trained * 2, "c": nn.Parameter(numbers(3))}
        target = {"a": nn.Parameter(numbers(3)), "b": numbers(3), "c": numbers(3)}
        judged(source, target)
        for name, tensor in target.items():
            assert tensor.grad_fn is None, f"{name} is part of a graph"
            assert tensor.requires_grad == (name == "a"), f"{name}: requires_grad changed"
        assert_same(target["b"], numbers(3, salt=1) * 2)
