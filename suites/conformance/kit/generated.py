"""Generated state dicts, shapes and placements (Hypothesis), the same in each run of one seed.

On one rank a check may use `@given` itself, with `examples(world.seed)` for its settings. On
several ranks it asks `drawn` for its examples up front: each rank draws the same, and no rank
shrinks a failure alone while the others wait for it.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants
from torch import nn
from torch.distributed.tensor import Placement

from conformance.kit.data import DTYPES, VIEWS, numbers
from conformance.kit.layouts import SS, R, S
from conformance.kit.nested import Pair, with_metadata

Value = TypeVar("Value")
Body = TypeVar("Body", bound=Callable[..., None])

KEYS = ["weight", "bias", "a", "b", "a.b", "b.0", "0", "1", "", ".", "a\\.b", "\\int:1"]
"""Names as modules have them, and those that a dotted path may confuse."""

SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(allow_nan=False),
    st.sampled_from(KEYS),
    st.binary(max_size=4),
    st.sets(st.integers(0, 9), max_size=3),
)
"""Leaves that are no tensors, and that a checkpoint can hold."""

_MAPPING_KEYS = st.one_of(st.sampled_from(KEYS), st.integers(-1, 2))


def examples(seed: int, count: int = 30) -> Callable[[Body], Body]:
    """Settings for an inner function under `@given` on one rank: put it above `@given`."""

    def decorate(body: Body) -> Body:
        settings = hypothesis.settings(
            max_examples=count,
            database=None,
            deadline=None,
            # Derandomized runs would ignore the run's seed.
            derandomize=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        test = hypothesis.seed(seed)(settings(body))

        @functools.wraps(body)
        def run() -> None:
            with _no_constants_of_modules():
                test()

        return cast(Body, run)

    return decorate


@contextmanager
def _no_constants_of_modules() -> Iterator[None]:
    """Nothing is drawn from the text of loaded modules, so examples depend on the seed alone.

    Hypothesis reads the constants of each local module that is loaded, and draws one at times. That
    takes a rank half a second, and a rank that has loaded another module draws other examples.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(providers, "_get_local_constants", Constants)
        yield


def drawn(strategy: st.SearchStrategy[Value], count: int, seed: int) -> list[Value]:
    """`count` examples (at most), the same on each rank; nothing is shrunk."""
    found: list[Value] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        phases=[hypothesis.Phase.generate],
        database=None,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def collect(value: Value) -> None:
        found.append(value)

    with _no_constants_of_modules():
        collect()
    return found[:count]


def shapes(least: int = 0, most: int = 3, longest: int = 5) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of `least` to `most` dimensions, empty ones among them."""
    return st.lists(st.integers(0, longest), min_size=least, max_size=most).map(tuple)


@st.composite
def plain_tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any dtype in any memory layout, at times a Parameter."""
    dtype = draw(st.sampled_from(DTYPES))
    tensor = numbers(*draw(shapes()), dtype=dtype, salt=draw(st.integers(0, 9)))
    tensor = VIEWS[draw(st.sampled_from(sorted(VIEWS)))](tensor)
    if draw(st.booleans()):
        # Parameters of eight-bit floats may not require grad in every torch.
        trains = dtype in (torch.float32, torch.bfloat16, torch.complex64) and draw(st.booleans())
        tensor = nn.Parameter(tensor, requires_grad=trains)
    return tensor


@st.composite
def state_dicts(draw: st.DrawFn, *, depth: int = 3) -> dict[Any, Any]:
    """A nested state dict: each container type, each kind of leaf, ties, keys that look alike."""
    # Tensors are taken from a pool, so some are met twice: ties.
    pool = draw(st.lists(plain_tensors(), max_size=4))
    root: dict[Any, Any] = _mapping(draw, pool, depth)
    return root


# Plain functions and no st.recursive: it writes out the names of strategies nested in strategies,
# which costs more than all the rest.
def _value(draw: st.DrawFn, pool: list[torch.Tensor], depth: int) -> Any:
    choice = draw(st.sampled_from(["tensor", "tensor", "scalar", "mapping", "sequence"]))
    if choice == "tensor" and pool:
        return pool[draw(st.integers(0, len(pool) - 1))]
    if choice == "mapping" and depth > 0:
        return _mapping(draw, pool, depth - 1)
    if choice == "sequence" and depth > 0:
        return _sequence(draw, pool, depth - 1)
    return draw(SCALARS)


def _mapping(draw: st.DrawFn, pool: list[torch.Tensor], depth: int) -> dict[Any, Any]:
    keys = draw(st.lists(_MAPPING_KEYS, max_size=4, unique=True))
    items = [(key, _value(draw, pool, depth)) for key in keys]
    make = draw(st.sampled_from(["dict", "OrderedDict", "with _metadata"]))
    if make == "with _metadata":
        return with_metadata(*items, version=draw(st.integers(1, 3)))
    return OrderedDict(items) if make == "OrderedDict" else dict(items)


def _sequence(draw: st.DrawFn, pool: list[torch.Tensor], depth: int) -> Any:
    make = draw(st.sampled_from(["list", "tuple", "namedtuple"]))
    size = 2 if make == "namedtuple" else draw(st.integers(0, 3))
    items = [_value(draw, pool, depth) for _ in range(size)]
    return Pair(*items) if make == "namedtuple" else tuple(items) if make == "tuple" else items


@st.composite
def layouts(draw: st.DrawFn, *mesh: int) -> tuple[tuple[int, ...], list[Placement]]:
    """(shape, placements) of a tensor over a mesh of that shape."""
    shape = draw(shapes(least=1, longest=9))
    axis = st.integers(0, len(shape) - 1)
    placements: list[Placement] = []
    for _ in mesh:
        choice = draw(st.sampled_from(["replicate", "shard", "shard"]))
        placements.append(R if choice == "replicate" else S(draw(axis)))
    if len(mesh) > 1 and draw(st.booleans()):
        # What FSDP over TP makes of a sharded weight: the outer dimension cuts inside the inner's.
        dim = draw(axis)
        placements[-2:] = [SS(dim, mesh[-1]), S(dim)]
    return shape, placements
