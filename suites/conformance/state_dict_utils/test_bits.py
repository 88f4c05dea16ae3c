"""Bits that compare equal, or that some dtype on the way cannot hold, through every function.

A gather by a sum with zeros turns -0.0 into 0.0, a detour through float64 rounds large integers,
and arithmetic makes every NaN the same one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from conformance.kit.roads import ROADS, Make

# test_every_bit sweeps the same over every function and kind, many dtypes in one world.
pytestmark = pytest.mark.thorough


def _viewed(integer: torch.dtype, dtype: torch.dtype, *bits: int) -> torch.Tensor:
    return torch.tensor(bits, dtype=integer).view(dtype)


_FLOATS = (-(2**31), 0x7FC00001, 0x7F800001, -0x3EDCBB, 1, 0x7F7FFFFF, -0x7F800001, 0x3F800000)
_HALVES = (-(2**15), 0x7FC1, 0x7F81, -0x3E, 1, 0x7F7F, -0x7F81, 0x3F80)

# Name -> eight elements: a negative zero, NaNs of several payloads, subnormals, extremes.
BITS: dict[str, Callable[[], torch.Tensor]] = {
    "float32": lambda: _viewed(torch.int32, torch.float32, *_FLOATS),
    "float64": lambda: _viewed(
        torch.int64,
        torch.float64,
        *(-(2**63), 0x7FF8000000000001, 0x7FF0000000000001, -0xF, 1, 2**62, -(2**52), 3),
    ),
    "float16": lambda: _viewed(torch.int16, torch.float16, *_HALVES),
    "bfloat16": lambda: _viewed(torch.int16, torch.bfloat16, *_HALVES),
    "float8_e5m2": lambda: _viewed(
        torch.int8, torch.float8_e5m2, -128, 0x7D, 0x7E, -1, 1, 0x7B, -2, 3
    ),
    "int64": lambda: torch.tensor(
        [2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63), 2**62 + 1, -1, 0, 2**24 + 1]
    ),
    "int32": lambda: torch.tensor(
        [2**24 + 1, -(2**24) - 1, 2**31 - 1, -(2**31), 7, -1, 0, 3], dtype=torch.int32
    ),
    "uint64": lambda: torch.tensor(
        [2**53 + 1, 2**64 - 1, 2**63, 2**63 + 1, 7, 1, 0, 3], dtype=torch.uint64
    ),
    "complex64": lambda: _viewed(torch.int32, torch.complex64, *_FLOATS, *_FLOATS[::-1]),
    "conjugated": lambda: _viewed(
        torch.int32, torch.complex64, *(n & 0x7F7FFFFF for n in (*_FLOATS, *_FLOATS[::-1]))
    ).conj(),
    "negated": lambda: (
        torch.tensor([1 + 2j, 3 - 4j, -5 + 6j, 7, 8j, -9j, 0.5 + 1j, 2], dtype=torch.complex64)
        .conj()
        .imag
    ),
}
SIZES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "small": lambda row: row,
    "uneven": lambda row: row[:-1],
    "large": lambda row: _repeated(row, 1 << 16),
}
"""Name -> that many of the elements: a shard each, unequal shards, more than goes together."""


class _Bits:
    """What each function is asked; its class says which."""

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("kind", BITS)
    def test_every_bit_arrives(
        self,
        judged: Any,
        mesh: Any,
        world: Any,
        device: torch.device,
        request: pytest.FixtureRequest,
        kind: str,
    ) -> None:
        """Negative zeros, NaN payloads, subnormals and large integers must arrive as they left."""
        marker = request.node.get_closest_marker("judges")
        for (name, make), size in itertools.product(_roads(marker.args[0]).items(), SIZES):
            full = SIZES[size](BITS[kind]()).to(device)
            road = make(full, mesh(2), world)
            try:
                road.check(road.call(judged), full)
            except AssertionError as error:
                raise AssertionError(f"{name} {kind}, {size}: {error}") from None


def _roads(judged: str) -> dict[str, Make]:
    return ROADS[judged.rpartition(".")[2]]


def _repeated(row: torch.Tensor, times: int) -> torch.Tensor:
    """The elements again and again, lazily conjugated or negated if they were."""
    if row.is_conj():
        return _repeated(row.conj(), times).conj()
    if row.is_neg():
        return torch._neg_view(_repeated(torch._neg_view(row), times))
    # As bytes: torch cannot repeat every dtype.
    return row.clone().view(torch.uint8).repeat(times).view(row.dtype)


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherBits(_Bits):
    """Sharded by row and column, whole, plain, as ShardedTensor, many at once."""


@pytest.mark.judges("_state_dict_utils._all_gather_sharded_tensor")
class TestAllGatherShardedTensorBits(_Bits):
    """One ShardedTensor."""


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastBits(_Bits):
    """Into shards, replicas, plain tensors and meta targets, one and many."""


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistributeBits(_Bits):
    """The same, from full tensors on every rank."""


@pytest.mark.judges("_state_dict_utils._offload_state_dict_to_cpu")
class TestOffloadBits(_Bits):
    """DTensors and plain tensors."""


@pytest.mark.judges("_state_dict_utils._copy_state_dict")
class TestCopyBits(_Bits):
    """DTensors and plain tensors."""


@pytest.mark.judges("_state_dict_utils._iterate_state_dict")
class TestIterateBits(_Bits):
    """DTensors and plain tensors, to the CPU."""
