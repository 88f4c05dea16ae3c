"""Copies and walks within a process that callers make today, and get a right answer for."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from conformance.kit.compare import assert_same, shares_memory
from conformance.kit.data import numbers
from conformance.kit.layouts import S, dtensor


@pytest.mark.judges("_state_dict_utils._copy_state_dict")
class TestCopyWithout:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_a_place_that_holds_nothing_yet(self, judged: Any) -> None:
        """A tensor where the other state dict has None must be in the result, and share no memory.

        An optimizer makes some of its state with its first step, after the buffers were made.
        """
        moment = numbers(4, 2)
        got = judged({"moment": moment, "w": numbers(3)}, {"moment": None, "w": numbers(3, salt=1)})
        assert_same(got["moment"], moment, "moment")
        assert not shares_memory(got["moment"], moment), "the result is the live tensor"
        assert_same(got["w"], numbers(3), "w")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_what_is_no_tensor_is_taken_over(self, judged: Any) -> None:
        """A value that is no tensor must be in the result, whatever held its place before."""
        got = judged(
            {"step": 3, "none": None, "w": numbers(3)},
            {"step": numbers(), "none": numbers(2), "w": numbers(3, salt=1)},
        )
        assert (got["step"], got["none"]) == (3, None), f"got {got}"


@pytest.mark.judges("_state_dict_utils._iterate_state_dict")
class TestIterateResults:
    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_results_that_nobody_else_holds(self, judged: Any) -> None:
        """Each new tensor that a function returns must be offloaded with its own values.

        It is gone when the next one is made, and that one may lie in the same memory.
        """
        value = {f"w{n}": torch.full((1000,), float(n)) for n in range(50)}

        def doubled(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
            return tensor * 2

        got = judged(value, doubled, doubled, doubled, cpu_offload=True)
        for n, (name, tensor) in enumerate(got.items()):
            assert_same(tensor, torch.full((1000,), 2.0 * n), name)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_mappings_whose_items_are_attributes(self, judged: Any) -> None:
        """A mapping that has its items as attributes as well must hold the same in both places."""

        class Attributes(dict[str, Any]):
            def __setitem__(self, key: str, value: Any) -> None:
                super().__setitem__(key, value)
                setattr(self, key, value)

        held = Attributes()
        held["w"] = numbers(3)
        got = judged({"held": held}, *(lambda tensor, *_: tensor * 2,) * 3)["held"]
        assert_same(got["w"], numbers(3) * 2, "item")
        assert_same(getattr(got, "w", got["w"]), numbers(3) * 2, "attribute")

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_mappings_with_methods_of_their_own(self, judged: Any) -> None:
        """A mapping whose class overrides `update` must be rebuilt item by item."""
        same = (lambda tensor, *_: tensor,) * 3
        got = judged({"seen": Counter({"a": 3, ("b", 1): 2})}, *same)
        assert dict(got["seen"]) == {"a": 3, ("b", 1): 2}, f"got {got['seen']}"


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestWithoutValues:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_parameters_that_are_not_initialized(self, judged: Any, mesh: Any) -> None:
        """A lazy module's uninitialized parameters must come back as such."""
        lazy = nn.LazyLinear(3)
        value = {"w": dtensor(numbers(4, 2), mesh(2), [S(0)]), **lazy.state_dict(keep_vars=True)}
        got = judged(value)
        assert isinstance(got["weight"], nn.UninitializedParameter), f"a {type(got['weight'])}"
        assert_same(got["w"], numbers(4, 2), "w")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_values_of_other_kinds(self, judged: Any) -> None:
        """What a checkpoint may hold beside tensors must come back equal."""
        value = {"io": io.BytesIO(b"x"), "n": 3, "c": 1 + 2j, "b": b"y", "s": "z", "none": None}
        got = judged(value)
        assert got["io"].getvalue() == b"x", "the bytes differ"
        assert {k: got[k] for k in value if k != "io"} == {k: value[k] for k in value if k != "io"}


@pytest.mark.judges("_state_dict_utils._offload_state_dict_to_cpu")
class TestOffloadWithoutValues:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_parameters_that_are_not_initialized(self, judged: Any) -> None:
        """A lazy module's uninitialized parameters must come back as such."""
        lazy = nn.LazyLinear(3)
        for value in (lazy.state_dict(keep_vars=True), {"weight": lazy.weight, "w": numbers(2)}):
            got = judged({**value, "tied": lazy.weight})
            for key in ("weight", "tied"):
                assert isinstance(got[key], nn.UninitializedParameter), f"a {type(got[key])}"
