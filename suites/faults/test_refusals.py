"""What passes for an answer to wrong input, and what does not: the suites' own judgement of errors.

Each accident here was, or could be, raised alike on all ranks by an implementation that never
looked at its input.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from conformance.kit.agree import assert_raises_everywhere
from conformance.kit.refusals import MISFIT, MISSING, SHAPE, flaw, refused, shape_of


class OwnError(Exception):
    """A type of an implementation's own, as CompanionMismatch is."""


class OwnWarning(FutureWarning):
    """A warning of an implementation's own."""


ANSWERS = [
    ValueError("layer.odd: expected (4, 3), rank 1 has (5, 3)"),
    TypeError("'layer.odd': expected a tensor"),
    RuntimeError("layer.odd cannot be sent"),
    NotImplementedError("layer.odd is sparse"),
    AssertionError("layer.odd must be a tensor"),
    OwnError("layer.odd: shapes differ"),
]


@pytest.mark.parametrize("error", ANSWERS, ids=lambda e: type(e).__name__)
def test_an_error_that_names_its_input_is_an_answer(error: Exception) -> None:
    assert flaw(error, ("layer.odd",)) == ""


ACCIDENTS = [
    (None, "no error: it is accepted"),
    (FutureWarning("layer.odd: please use another function"), "an accident"),
    (OwnWarning("layer.odd"), "an accident"),
    (RuntimeError("failed"), "'layer.odd' is not named"),
    (RuntimeError(), "says nothing"),
    (AssertionError(), "says nothing"),
    (OwnError("went wrong"), "'layer.odd' is not named"),
    (AttributeError("'NoneType' object has no attribute 'shape'"), "an accident"),
    (TypeError("'NoneType' object is not subscriptable"), "'layer.odd' is not named"),
    (KeyError("layer.odd"), "an accident"),  # a look-up that nobody expected to fail
    (IndexError("list index out of range"), "an accident"),
    (NameError("name 'layer.odd' is not defined"), "an accident"),
    (ZeroDivisionError("layer.odd"), "an accident"),
    (RecursionError("layer.odd"), "an accident"),
    (OSError("layer.odd"), "an accident"),
    (dist.DistBackendError("layer.odd: Connection closed by peer"), "a collective that a peer"),
    (RuntimeError("[gloo/transport/pair.cc:5] Timed out waiting: layer.odd"), "a collective that"),
]


@pytest.mark.parametrize(("error", "said"), ACCIDENTS, ids=lambda v: repr(v)[:40])
def test_an_accident_is_none(error: Exception | None, said: str) -> None:
    assert said in flaw(error, ("layer.odd",))


def test_what_is_not_there_may_be_told_as_python_does() -> None:
    for error in (KeyError("layer.odd"), AttributeError("no parameter layer.odd")):
        assert flaw(error, ("layer.odd",), MISSING) == ""
        assert "an accident" in flaw(error, ("layer.odd",), MISFIT)


def test_the_kind_that_is_documented_may_be_demanded() -> None:
    assert flaw(ValueError("type of x"), ("x",), (ValueError,)) == ""
    assert "expected ValueError" in flaw(TypeError("type of x"), ("x",), (ValueError,))


@pytest.mark.parametrize("said", ["(4, 3)", "[4, 3]", "torch.Size([4, 3])", "4x3", "4 x 3"])
def test_shapes_are_read_as_people_write_them(said: str) -> None:
    pattern = re.compile(shape_of(4, 3))
    assert flaw(ValueError(f"got {said} here"), (pattern,)) == ""
    for other in ("(14, 3)", "(4, 31)", "(3, 4)"):
        assert flaw(ValueError(f"got {other} here"), (pattern,))
    assert flaw(ValueError("the sizes differ"), (SHAPE,)) == ""


def test_what_raised_is_told_with_the_case() -> None:
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(AssertionError, match=r"two for one: an accident.*KeyError"):
        refused(fail, "x", what="two for one")


class Pair:
    """A world of two ranks, in threads."""

    size = 2

    def __init__(self, rank: int, board: dict[tuple[str, int], str]) -> None:
        self.rank, self._board = rank, board

    def post(self, name: str, text: str) -> None:
        self._board[name, self.rank] = text

    def read(self, name: str, rank: int) -> str | None:
        return self._board.get((name, rank))


def everywhere(*errors: Exception | None) -> list[str]:
    """What each of two ranks says of the error that each of them raises."""
    board: dict[tuple[str, int], str] = {}

    def body(rank: int) -> str:
        def call() -> None:
            if (error := errors[rank]) is not None:
                raise error

        try:
            assert_raises_everywhere(Pair(rank, board), call, "layer.odd")
        except AssertionError as found:
            return str(found)
        return ""

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(body, range(2)))


def test_all_ranks_answer_alike() -> None:
    good: Callable[[], Exception] = lambda: ValueError("layer.odd: of another shape")  # noqa: E731
    assert everywhere(good(), good()) == ["", ""]
    for found in everywhere(good(), None):
        assert "no error on rank 1" in found
    for found in everywhere(good(), TypeError("layer.odd")):
        assert "different errors: ['ValueError', 'TypeError']" in found
    for found in everywhere(good(), ValueError("failed")):
        assert "rank 1: 'layer.odd' is not named: ValueError: failed" in found
    for found in everywhere(FutureWarning("layer.odd"), FutureWarning("layer.odd")):
        assert "rank 0: an accident" in found
