"""Pending reductions whose exact result needs care: signs, widths, NaNs, and what is not defined.

The oracle computes with Python's own numbers, each element by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Partial

from conformance.kit.agree import assert_raises_everywhere
from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.layouts import R, S, dtensor, part

NAN, INF = math.nan, math.inf

# dtype -> what each of four ranks contributes, element by element.
INTEGERS: dict[torch.dtype, list[list[int]]] = {
    torch.int8: [[-3, 0, 0, 0], [-128, -128, -128, -127], [127, 1, 0, 0], [5, -7, 3, 2]],
    torch.int32: [[-3, 0, 0, 0], [2**31 - 1, 1, 0, 0], [-(2**31), -1, 0, 0], [7, -9, 3, 2]],
    torch.int64: [
        [-3, 0, 0, 0],
        [2**63 - 1, 2**63 - 1, 2**63 - 1, 2**63 - 2],
        [-(2**63), -(2**63), -1, 0],
        [2**53 + 1, 0, -7, 2],
    ],
    torch.uint8: [[255, 3, 0, 1], [255, 255, 255, 254], [0, 0, 0, 1], [2, 3, 4, 6]],
    torch.uint32: [[2**32 - 1, 3, 0, 0], [2**31, 2**31, 1, 0], [1, 2, 3, 5]],
    torch.uint64: [[2**63 + 2, 4, 0, 0], [2**64 - 1, 2**64 - 1, 1, 3], [2**63, 1, 2, 3]],
}
FLOATS: dict[torch.dtype, list[list[float]]] = {
    torch.float32: [[1.0, NAN, 2.0, 3.0], [INF, 1.0, -2.0, 0.5], [2.0**24, -1.0, 3.0, 2.0]],
    torch.float64: [
        [2.0**53, 2.0, -4.0, 4.0],  # exact in no smaller dtype
        [1e300, 1.0, -1.0, 0.5],
        [NAN, NAN, NAN, NAN],
        [-0.0, -0.0, -0.0, -0.0],
        [5e-324, 5e-324, 5e-324, 5e-324],  # a quarter of one is zero
    ],
    torch.float16: [[2.0, NAN, 1.0, 0.5], [-1.5, 2.5, -3.5, 4.0]],
    torch.bfloat16: [[-1.5, 2.5, -3.5, 4.0], [NAN, 1.0, 2.0, 3.0]],
}

_FOLDS: dict[str, Callable[[list[int]], int]] = {
    "sum": sum,
    "product": math.prod,
    "min": min,
    "max": max,
    "band": lambda given: given[0] & given[1] & given[2] & given[3],
    "bor": lambda given: given[0] | given[1] | given[2] | given[3],
    "bxor": lambda given: given[0] ^ given[1] ^ given[2] ^ given[3],
    "avg": lambda given: math.trunc(Fraction(sum(given), len(given))),
}


def _wrapped(number: int, dtype: torch.dtype) -> int:
    width = dtype.itemsize * 8
    number %= 1 << width
    return number - (1 << width) if dtype.is_signed and number >> (width - 1) else number


def _folded(op: str, given: list[float]) -> float:
    if any(map(math.isnan, given)):
        return NAN
    if op in ("sum", "avg"):
        total = sum(given, -0.0)
        return total / len(given) if op == "avg" else total
    return {"product": math.prod, "min": min, "max": max}[op](given)  # type: ignore[operator]


def _partial(mine: torch.Tensor, mesh: Any, op: str) -> DTensor:
    return DTensor.from_local(mine, mesh, [Partial(op)], run_check=False)


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherReduces:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("ops", ["sum product min max", "band bor bxor"])
    @pytest.mark.parametrize("sign", ["signed", "unsigned"])
    @pytest.mark.thorough(but=["sum product min max", "unsigned-band bor bxor"])
    def test_integers(self, judged: Any, mesh: Any, rank: int, ops: str, sign: str) -> None:
        """Integers must be reduced exactly, with the sign that their dtype gives them."""
        for op in ops.split():
            self._assert_integers(judged, mesh(4), rank, op, sign == "signed")

    @pytest.mark.law("values")
    @pytest.mark.should("upstream has no average of integers on every backend")
    @pytest.mark.world(4)
    def test_an_average_of_integers(self, judged: Any, mesh: Any, rank: int) -> None:
        """An average of integers must be that of their exact sum, rounded towards zero."""
        self._assert_integers(judged, mesh(4), rank, "avg", True)
        self._assert_integers(judged, mesh(4), rank, "avg", False)

    def _assert_integers(self, judged: Any, line: Any, rank: int, op: str, signed: bool) -> None:
        value, expected = {}, {}
        for dtype, rows in INTEGERS.items():
            if dtype.is_signed == signed:
                key = f"{op} of {dtype}"
                mine = torch.tensor([row[rank] for row in rows], dtype=dtype)
                value[key] = _partial(mine, line, op)
                found = [_wrapped(_FOLDS[op](row), dtype) for row in rows]
                expected[key] = torch.tensor(found, dtype=dtype)
        got = judged(value)
        for key, whole in expected.items():
            assert_same(got[key], whole, key)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("ops", ["sum product min max", "avg"])
    def test_floats(self, judged: Any, mesh: Any, rank: int, ops: str) -> None:
        """A NaN must come out of any reduction that it went into, and -0.0 of -0.0."""
        for op in ops.split():
            self._assert_floats(judged, mesh(4), rank, op)

    def _assert_floats(self, judged: Any, line: Any, rank: int, op: str) -> None:
        value, expected = {}, {}
        for dtype, rows in FLOATS.items():
            key = f"{op} of {dtype}"
            mine = torch.tensor([row[rank] for row in rows], dtype=dtype)
            value[key] = _partial(mine, line, op)
            found = torch.tensor([_folded(op, row) for row in rows], dtype=torch.float64)
            expected[key] = found.to(dtype)
        got = judged(value)
        for key, whole in expected.items():
            have = got[key]
            assert torch.equal(have.isnan(), whole.isnan()), f"{key}: {have}, expected {whole}"
            whole_again = torch.where(whole.isnan(), have, whole)
            if op in ("min", "max", "sum", "avg"):
                assert_same(have, whole_again, key)
            else:
                assert torch.equal(have.nan_to_num(), whole.nan_to_num()), f"{key}: {have}"

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_beside_other_placements(self, judged: Any, mesh: Any, rank: int) -> None:
        """Only ranks along its own mesh dimension must be reduced, whatever the others hold."""
        square = mesh(2, 2)
        value, expected = {}, {}
        for op in ("sum", "avg", "min", "max"):
            for dim, other in product((0, 1), (S(0), S(1), R)):
                key, full = f"{op} over {dim} beside {other}", numbers(4, 6)
                placements: list[Any] = [other, other]
                placements[dim] = Partial(op)
                at = square.get_coordinate()[dim]
                held: list[Any] = [other, other]
                held[dim] = R
                mine = part(full * 4 + 8 * at, square, held)
                value[key] = DTensor.from_local(mine, square, placements, run_check=False)
                given = torch.stack([full * 4, full * 4 + 8])
                expected[key] = {
                    "sum": given.sum(0),
                    "avg": given.mean(0),
                    "min": given[0],
                    "max": given[1],
                }[op]
        got = judged(value)
        for key, whole in expected.items():
            assert torch.equal(got[key], whole), f"{key}: {got[key]}, expected {whole}"

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_over_two_dimensions(self, judged: Any, mesh: Any, rank: int) -> None:
        """What is pending over both dimensions of a mesh must be reduced over all of its ranks."""
        held = torch.stack([(numbers(4, 3).abs() + 1) * by for by in (-3, 5, -7, 13)])
        pairs = {
            ("sum", "sum"): held.sum(0),
            ("avg", "avg"): held.mean(0),
            ("min", "min"): held.amin(0),
            ("max", "max"): held.amax(0),
        }
        for ops, whole in pairs.items():
            for shape in (2, 2), (1, 4), (4, 1):
                placements = [Partial(op) for op in ops]
                leaf = DTensor.from_local(held[rank], mesh(*shape), placements, run_check=False)
                assert_same(judged({"w": leaf})["w"], whole, f"{ops} over {shape}")

    @pytest.mark.law("values")
    @pytest.mark.should("upstream adds in the dtype, in the order of the backend")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_small_beside_large(
        self, judged: Any, mesh: Any, rank: int, dtype: torch.dtype
    ) -> None:
        """What a sum of few bits would lose one by one must be in it: 256 + 1 + 1 + 1."""
        large = {torch.bfloat16: 256.0, torch.float16: 2048.0}[dtype]
        mine = torch.full((5,), large if rank == 1 else 1.0, dtype=dtype)
        got = judged({"w": _partial(mine, mesh(4), "sum")})["w"]
        assert_same(got, torch.full((5,), large + 3, dtype=torch.float64).to(dtype))

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=6, limit=25)
    @pytest.mark.parametrize("takers", [(), (1,)], ids=["all", "one"])
    def test_what_is_not_defined(
        self, judged: Any, mesh: Any, world: Any, takers: tuple[int, ...]
    ) -> None:
        """A reduction that a dtype does not have must be refused on every rank, takers or not."""
        line = mesh(2)
        kinds = (ValueError, TypeError, RuntimeError, NotImplementedError)
        for op, dtype in (
            ("max", torch.complex64),
            ("min", torch.complex128),
            ("band", torch.float32),
            ("bxor", torch.complex64),
        ):
            for turn in ("first", "second"):  # one may hide it from the other
                value = {
                    "fine": dtensor(numbers(4), line, [S(0)]),
                    "odd": _partial(numbers(4, dtype=dtype), line, op),
                }
                call = partial(judged, value, ranks_only=takers)
                assert_raises_everywhere(world, call, kinds=kinds, name=f"{op} {dtype} {turn}")
