"""Leaves whose memory overlaps, and whether a copy of them still does.

The relation that is compared: for each pair of leaves, which bytes of the one are which bytes of
the other. It does not depend on values, nor on strides.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from conformance.kit.compare import local
from conformance.kit.containers import dashed
from conformance.kit.data import numbers
from conformance.kit.layouts import R, S
from conformance.kit.nested import assert_apart, storages
from conformance.kit.nested import tensors as tensors_of

Value = dict[str, Any]


def _flat(n: int = 12) -> torch.Tensor:
    return numbers(n)


def _parameter() -> nn.Parameter:
    return nn.Parameter(numbers(4, 3))


# Name -> a state dict of plain leaves whose memory overlaps.
VIEWS: dict[str, Callable[[], Value]] = {
    "a parameter and its detached twin": lambda: (
        lambda w: {"weight": w, "twin": w.detach(), "data": w.data}
    )(_parameter()),
    "a detached twin and its parameter": lambda: (lambda w: {"twin": w.detach(), "weight": w})(
        _parameter()
    ),
    "a matrix and its transpose": lambda: (lambda w: {"w": w, "t": w.t()})(numbers(4, 3)),
    "a matrix and its rows as one": lambda: (lambda w: {"w": w, "flat": w.view(-1)})(numbers(4, 3)),
    "a matrix and one of its columns": lambda: (lambda w: {"w": w, "column": w[:, 1]})(
        numbers(4, 3)
    ),
    "a column and its matrix": lambda: (lambda w: {"column": w[:, 1], "w": w})(numbers(4, 3)),
    "slices that overlap": lambda: (lambda m: {"a": m[:6], "b": m[4:9], "c": m[8:]})(_flat()),
    "slices around a third": lambda: (lambda m: {"a": m[:3], "b": m[9:], "all": m})(_flat()),
    "columns in turn": lambda: (lambda m: {"even": m[::2], "third": m[::3]})(_flat()),
    "a row and that row expanded": lambda: (lambda r: {"row": r, "rows": r.expand(3, 4)})(
        numbers(1, 4)
    ),
    "numbers and their bits": lambda: (lambda m: {"m": m, "bits": m.view(torch.int32)})(_flat()),
    "complex numbers and their parts": lambda: (
        lambda z: {"z": z, "parts": torch.view_as_real(z), "real": z.real}
    )(numbers(6, dtype=torch.complex64)),
    "in a list, a dict and a tuple": lambda: (
        lambda w: {"list": [w, 1], "dict": {"x": [w.detach()]}, "tuple": (w.data.t(), w.data[1])}
    )(_parameter()),
    "bfloat16": lambda: (lambda w: {"w": w, "t": w.t()})(numbers(4, 3, dtype=torch.bfloat16)),
    "unsigned": lambda: (lambda w: {"w": w, "t": w.t()})(numbers(4, 3, dtype=torch.uint16)),
    "fp8": lambda: (lambda w: {"w": w, "t": w.t()})(numbers(4, 3, dtype=torch.float8_e5m2)),
    "a scalar of a vector": lambda: (lambda m: {"m": m, "scalar": m[3]})(_flat()),
}


def _around(make: Callable[[torch.Tensor, Any], DTensor]) -> Callable[[Any], Value]:
    def made(line: Any) -> Value:
        memory = numbers(4, 3)
        return {"distributed": make(memory, line), "plain": memory, "t": memory.t()}

    return made


def _dt(memory: torch.Tensor, line: Any, placement: Any) -> DTensor:
    return DTensor.from_local(memory, line, [placement], run_check=False)


# The same with DTensors over a mesh of one dimension.
DISTRIBUTED: dict[str, Callable[[Any], Value]] = {
    "a shard and a plain tensor": _around(lambda m, line: _dt(m, line, S(0))),
    "a replica and a plain tensor": _around(lambda m, line: _dt(m, line, R)),
    "two shards that overlap": lambda line: (
        lambda m: {"a": _dt(m[:8], line, S(0)), "b": _dt(m[6:], line, S(0))}
    )(_flat()),
    "a shard and its transpose": lambda line: (
        lambda m: {"a": _dt(m, line, S(0)), "b": _dt(m.t(), line, S(1))}
    )(numbers(4, 3)),
    "a trained DTensor and its detached twin": lambda line: (
        lambda w: {"weight": w, "twin": w.detach(), "inside": local(w).detach()}
    )(nn.Parameter(_dt(numbers(4, 3), line, S(0)))),
    "a shard and a replica": lambda line: (
        lambda m: {"shard": _dt(m, line, S(0)), "replica": _dt(m, line, R)}
    )(numbers(4, 3)),
}
REPLICAS = ["a replica and a plain tensor"]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The address of each byte of each element, in logical order."""
    at = torch.zeros((), dtype=torch.int64)
    for size, step in zip(tensor.shape, tensor.stride(), strict=True):
        at = at.unsqueeze(-1) + torch.arange(size) * step
    width = tensor.element_size()
    first = local(tensor).data_ptr() + at.reshape(-1, 1) * width
    return (first + torch.arange(width)).reshape(-1)


def _shared(value: Any) -> dict[tuple[str, str], list[list[int]]]:
    """Per pair of leaves that overlap, which bytes of the one are which of the other."""
    held = {
        ".".join(map(str, path)): _bytes_of(storages(t)[0]) for path, t in tensors_of(value).items()
    }
    pairs = {}
    for (one, ours), (other, theirs) in itertools.combinations(held.items(), 2):
        same = (ours[:, None] == theirs[None, :]).nonzero().tolist()
        if same:
            pairs[one, other] = same
    return pairs


def _held(value: Any) -> int:
    """Bytes of all storages under the tensors."""
    found = {
        plain.untyped_storage().data_ptr(): plain.untyped_storage().nbytes()
        for tensor in tensors_of(value).values()
        for plain in storages(tensor)
    }
    return sum(found.values())


def assert_kept(got: Any, value: Any) -> None:
    """`got` is a copy of `value` in memory of its own, in which the same leaves overlap."""
    assert_apart(got, value)
    expected, have = _shared(value), _shared(got)
    lost = [pair for pair in expected if have.get(pair) != expected[pair]]
    assert not lost, f"writing to one of {lost} is no longer seen in the other"
    new = [pair for pair in have if pair not in expected]
    assert not new, f"{new} share memory now, and did not before"
    room, limit = _held(got), _held(value)
    assert room <= limit, f"the copy holds {room} bytes, the original {limit}"


# torch itself does not copy into an expanded tensor.
_COPIED = {name: make for name, make in VIEWS.items() if "expanded" not in name}
COPIED_CASES = [pytest.param(make, id=dashed(name)) for name, make in _COPIED.items()]
PLAIN_CASES = [pytest.param(make, id=dashed(name)) for name, make in VIEWS.items()]
DISTRIBUTED_CASES = [pytest.param(make, id=dashed(name)) for name, make in DISTRIBUTED.items()]
REPLICA_CASES = [pytest.param(DISTRIBUTED[name], id=dashed(name)) for name in REPLICAS]


def pieces() -> Value:
    """Pieces of one large storage, of which most is in none of them; two of them overlap."""
    memory = torch.zeros(1 << 20)
    return {
        "a": memory[:8].view(2, 4),
        "b": memory[8:12],
        "c": memory[1 << 16 : (1 << 16) + 8],
        "d": memory[(1 << 16) + 4 : (1 << 16) + 12],
        "e": memory[-4:],
    }


def assert_pieces_alone(got: Any) -> None:
    room = _held(got)
    assert room <= 4096, f"a copy of 112 bytes out of a storage of 4 MiB holds {room} bytes"
