"""What a failed check says: what was expected, what came, and for which input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conformance.kit.cases import each
from conformance.kit.compare import assert_type, assert_unchanged, fingerprint
from harness.rank.reporter import assertion_of


def test_what_was_changed_is_told_by_its_path() -> None:
    value = {"model": {"weight": torch.ones(2), "bias": torch.ones(1)}, "step": 1}
    before = fingerprint(value)
    assert_unchanged(value, before)
    value["model"]["bias"].add_(1)  # type: ignore[index]
    with pytest.raises(AssertionError, match="the input was changed at 'model' at 'bias', part 7"):
        assert_unchanged(value, before)
    value["extra"] = 2
    with pytest.raises(AssertionError, match="source was changed: 3 entries, 2 before"):
        assert_unchanged(value, before, "source")


def test_another_type_is_told_with_the_expected_one() -> None:
    assert_type(torch.ones(1), torch.Tensor)
    with pytest.raises(AssertionError, match="w: a Tensor, expected a Parameter"):
        assert_type(torch.ones(1), torch.nn.Parameter, "w")


def raised(body: Any, *arguments: Any) -> AssertionError:
    with pytest.raises(AssertionError) as found:
        body(*arguments)
    return found.value


def same_list(case: str) -> None:
    inside = [1]
    assert inside is not inside


def told(case: str) -> None:
    assert case == "b", f"{case} for b"


def test_an_assert_without_words_is_told_by_its_source() -> None:
    assert assertion_of(raised(same_list, "")) == ", asserted 'inside is not inside'"
    assert assertion_of(raised(told, "a")) == ""
    assert assertion_of(ValueError("assert x")) == ""


def test_cases_that_fail_are_told_so_too() -> None:
    text = str(raised(each, ["a", "b"], same_list))
    assert "a: AssertionError: assert [1] is not [1], asserted 'inside is not inside'" in text
    text = str(raised(each, ["a", "b"], told))
    assert "1 of 2 cases fail: a: AssertionError: a for b" in text
