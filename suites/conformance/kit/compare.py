"""Comparison to the bit, and fingerprints that show what a call has changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's elements as bytes, in logical order."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu()
    # A copy, not contiguous(): one element passes for contiguous whatever its stride.
    return plain.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def assert_same(got: Any, expected: torch.Tensor, what: str = "result") -> None:
    """`got` is a plain tensor with the expected shape, dtype and bits."""
    assert isinstance(got, torch.Tensor), f"{what}: expected a tensor, got {type(got).__name__}"
    assert not isinstance(got, DTensor), f"{what}: expected a plain tensor, got a DTensor"
    assert got.dtype == expected.dtype, f"{what}: dtype {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, (
        f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    )
    assert not got.is_meta, f"{what}: still on meta"
    if not torch.equal(bits(got), bits(expected)):
        raise AssertionError(f"{what}: values differ\n  got      {got}\n  expected {expected}")


def assert_type(got: Any, kind: type, what: str = "result") -> None:
    """`got` is of this very type."""
    assert type(got) is kind, f"{what}: a {type(got).__name__}, expected a {kind.__name__}"


def assert_unchanged(value: Any, before: Any, what: str = "the input") -> None:
    """The value's `fingerprint` is `before` still; where it is not, the message says what changed.

    A fingerprint holds identities and bits, which tell a person nothing.
    """
    after = fingerprint(value)
    assert after == before, (
        f"{what} was changed{_difference(after, before)}; it must stay as it was"
    )


def _difference(after: Any, before: Any, path: str = "") -> str:
    """Where two fingerprints first differ, in words: the path to it, and the two values."""
    if isinstance(after, (list, tuple)) and isinstance(before, (list, tuple)):
        if len(after) != len(before):
            return f"{path}: {len(after)} entries, {len(before)} before"
        for index, (now, then) in enumerate(zip(after, before, strict=True)):
            if now != then:
                named = isinstance(now, tuple) and len(now) == 2 and isinstance(now[0], str)
                step = f" at {now[0]!r}" if named else ""
                inner = (
                    f"{path}{step}" if isinstance(now, (list, tuple)) else f"{path}, part {index}"
                )
                return _difference(now, then, inner)
    return f"{path}: {str(after)[:60]}, before {str(before)[:60]}"


def shares_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors lie in one storage."""
    return local(a).untyped_storage().data_ptr() == local(b).untyped_storage().data_ptr() != 0


def local(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor's local tensor, without autograd; any other tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def fingerprint(value: Any) -> Any:
    """All that a caller may notice of a value: types, keys and their order, identity, bits, flags.

    Equal before and after a call: the call changed nothing that it was given.
    """
    if isinstance(value, ShardedTensor):
        return (id(value), [fingerprint(s.tensor) for s in value.local_shards()])
    if isinstance(value, DTensor):
        return (id(value), value.placements, fingerprint(value._local_tensor), value.requires_grad)
    if isinstance(value, torch.Tensor):
        content = None if value.is_meta else bytes(bits(value).tolist())
        return (
            id(value),
            type(value),
            value.dtype,
            value.shape,
            value.stride(),
            value.requires_grad,
            value.device,
            content,
            fingerprint(value.grad) if value.is_leaf and value.grad is not None else None,
        )
    if isinstance(value, Mapping):
        extra = fingerprint(getattr(value, "_metadata", None))
        return (id(value), type(value), [(k, fingerprint(v)) for k, v in value.items()], extra)
    if isinstance(value, (list, tuple)):
        return (id(value), type(value), [fingerprint(v) for v in value])
    if isinstance(value, (set, frozenset)):
        return (type(value), value)
    return (id(value), type(value), repr(value))
