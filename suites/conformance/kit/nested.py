"""Nested state dicts: a sample of all there is, a comparison that sees types, order and ties."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from conformance.kit.compare import bits, local
from conformance.kit.data import numbers


class Pair(NamedTuple):
    """A namedtuple as an optimizer or a trainer may keep one in its state."""

    first: Any
    second: Any


def with_metadata(*items: tuple[Any, Any], version: int = 1) -> OrderedDict[Any, Any]:
    """An OrderedDict with `_metadata`, as `nn.Module.state_dict()` returns it."""
    made: OrderedDict[Any, Any] = OrderedDict(items)
    made._metadata = OrderedDict({"": {"version": version}})  # type: ignore[attr-defined]
    return made


def sample(**tensors: Any) -> dict[str, Any]:
    """A state dict with each kind of container and of plain leaf; `tensors` come on top.

    Its own tensors: a trained, a frozen and an integer Parameter, a tie, a buffer, 0-dim, empty.
    """
    weight = nn.Parameter(numbers(4, 3, salt=1))
    return {
        "model": with_metadata(
            ("weight", weight),
            ("tied", weight),
            ("frozen", nn.Parameter(numbers(5, salt=2), requires_grad=False)),
            ("counts", nn.Parameter(numbers(3, dtype=torch.int64), requires_grad=False)),
            ("buffer", numbers(2, 3, dtype=torch.bfloat16, salt=3)),
            ("empty", numbers(0, 3)),
        ),
        "optimizer": {
            "state": {0: {"step": numbers(salt=4), "exp_avg": numbers(4, 3, salt=5)}, 1: {}},
            "param_groups": [{"lr": 0.5, "betas": (0.5, 0.75), "params": [0, 1]}, {}],
        },
        "pair": Pair(numbers(2, salt=6), [numbers(3, salt=7), ()]),
        "plain": [1, True, 2.5, 1 + 2j, "text", b"bytes", None, {1, 2}, [], (), {}],
        **tensors,
    }


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path of keys and indices, leaf) for each leaf, depth first."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


def tensors(value: Any) -> dict[tuple[Any, ...], torch.Tensor]:
    """Path -> tensor, for the tensors of every kind."""
    return {path: leaf for path, leaf in leaves(value) if isinstance(leaf, torch.Tensor)}


def storages(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors of this rank that hold the tensor's data."""
    if isinstance(tensor, ShardedTensor):
        return [shard.tensor for shard in tensor.local_shards()]
    return [local(tensor)]


def spoil(value: Any) -> None:
    """Flip every bit of every tensor's memory: training goes on, whatever the dtype."""
    done = set()
    for tensor in tensors(value).values():
        for plain in storages(tensor):
            memory = plain.untyped_storage()
            if memory.nbytes() and not plain.is_meta and memory._cdata not in done:
                done.add(memory._cdata)
                torch.empty(0, dtype=torch.uint8, device=plain.device).set_(memory).bitwise_not_()


def blank(value: Any) -> Any:
    """The same structure over plain tensors in memory of its own, every bit another; ties kept."""
    made: dict[int, torch.Tensor] = {}

    def copy(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            if id(item) not in made:
                fresh = torch.empty_like(item.detach()).copy_(item.detach())
                parameter = isinstance(item, nn.Parameter)
                made[id(item)] = nn.Parameter(fresh, item.requires_grad) if parameter else fresh
            return made[id(item)]
        if isinstance(item, dict):
            mapping = type(item)()
            mapping.update({key: copy(inner) for key, inner in item.items()})
            if hasattr(item, "_metadata"):
                mapping._metadata = item._metadata  # type: ignore[attr-defined]
            return mapping
        if isinstance(item, tuple) and hasattr(item, "_make"):
            return item._make([copy(inner) for inner in item])
        return type(item)(map(copy, item)) if isinstance(item, (list, tuple)) else item

    result = copy(value)
    spoil(result)
    return result


def assert_apart(result: Any, source: Any, what: str = "result") -> None:
    """No tensor of `result` lies in memory of a tensor of `source`."""
    held = {}
    for path, tensor in tensors(source).items():
        for plain in storages(tensor):
            if plain.untyped_storage().nbytes():
                held[plain.untyped_storage().data_ptr()] = path
    for path, tensor in tensors(result).items():
        for plain in storages(tensor):
            twin = held.get(plain.untyped_storage().data_ptr())
            assert twin is None, f"{what}: {_name(path)} lies in the memory of {_name(twin)}"


def assert_same_structure(
    got: Any, expected: Any, what: str = "result", *, values: bool = True, flags: bool = True
) -> None:
    """Same container types, keys, order and ties; same kinds, dtypes, shapes and placements.

    `values`: the same bits, too. `flags`: the same `requires_grad` and Parameter-ness, too.
    """
    _compare(got, expected, what, values, flags)
    assert _ties(got) == _ties(expected), (
        f"{what}: tied tensors are {_ties(got)}, expected {_ties(expected)}"
    )


def _name(path: tuple[Any, ...] | None) -> str:
    return ".".join(map(str, path or ())) or "the root"


def _compare(got: Any, expected: Any, what: str, values: bool, flags: bool) -> None:
    if isinstance(expected, torch.Tensor):
        _compare_tensors(got, expected, what, values, flags)
        return
    assert type(got) is type(expected), (
        f"{what}: a {type(got).__name__}, expected a {type(expected).__name__}"
    )
    if isinstance(expected, Mapping):
        keys = [(type(k).__name__, k) for k in got]
        wanted = [(type(k).__name__, k) for k in expected]
        assert keys == wanted, f"{what}: keys {list(got)}, expected {list(expected)}"
        # What it holds besides its items; a UserDict's `data` is its items.
        own = getattr(expected, "__dict__", {}).keys() | {"_metadata", "default_factory"}
        for name in own - {"data"}:
            have, want = (getattr(mapping, name, None) for mapping in (got, expected))
            assert have == want, f"{what}: {name} {have}, expected {want}"
        for key, item in expected.items():
            _compare(got[key], item, f"{what}.{key}", values, flags)
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected), f"{what}: {len(got)} items, expected {len(expected)}"
        for index, item in enumerate(expected):
            _compare(got[index], item, f"{what}.{index}", values, flags)
    elif isinstance(expected, io.BytesIO):
        assert got.getvalue() == expected.getvalue(), f"{what}: other bytes"
    else:
        # NaN equals itself here, and 0.0 is not -0.0.
        assert repr(got) == repr(expected), f"{what}: {got!r}, expected {expected!r}"


def _compare_tensors(
    got: Any, expected: torch.Tensor, what: str, values: bool, flags: bool
) -> None:
    assert kind(got) == kind(expected), f"{what}: a {kind(got)}, expected a {kind(expected)}"
    assert got.dtype == expected.dtype, f"{what}: dtype {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, (
        f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    )
    if flags:
        for flag in ("requires_grad", "is_leaf"):
            have, want = getattr(got, flag), getattr(expected, flag)
            assert have == want, f"{what}: {flag} is {have}, expected {want}"
        have, want = isinstance(got, nn.Parameter), isinstance(expected, nn.Parameter)
        assert have == want, f"{what}: being a Parameter is {have}, expected {want}"
    if isinstance(expected, DTensor):
        assert got.placements == expected.placements, f"{what}: placements {got.placements}"
        assert got.device_mesh == expected.device_mesh, f"{what}: mesh {got.device_mesh}"
    if isinstance(expected, ShardedTensor):
        boxes = [(s.metadata.shard_offsets, s.metadata.shard_sizes) for s in got.local_shards()]
        wanted = [
            (s.metadata.shard_offsets, s.metadata.shard_sizes) for s in expected.local_shards()
        ]
        assert boxes == wanted, f"{what}: shards {boxes}, expected {wanted}"
    for ours, theirs in zip(storages(got), storages(expected), strict=True):
        assert ours.dtype == theirs.dtype, f"{what}: local dtype {ours.dtype}"
        assert ours.shape == theirs.shape, (
            f"{what}: local shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
        )
        if values and not torch.equal(bits(ours), bits(theirs)):
            raise AssertionError(f"{what}: values differ\n  got      {ours}\n  expected {theirs}")


def kind(value: Any) -> str:
    """ShardedTensor, DTensor, Tensor, or the name of another type."""
    for known in (ShardedTensor, DTensor):
        if isinstance(value, known):
            return known.__name__
    plain = isinstance(value, torch.Tensor)
    return (
        "Tensor" if plain and type(value) in (torch.Tensor, nn.Parameter) else type(value).__name__
    )


def _ties(value: Any) -> list[list[str]]:
    """Names of the tensors that are the same view of the same memory, where several are."""
    groups: dict[Any, list[str]] = {}
    for path, tensor in tensors(value).items():
        views = [
            (t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), t.stride())
            for t in storages(tensor)
            if t.numel()
        ]
        if views:
            groups.setdefault(tuple(views), []).append(_name(path))
    return sorted(names for names in groups.values() if len(names) > 1)
