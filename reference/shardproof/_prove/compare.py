"""What a road brought back, compared with the snapshot: bits, dtypes, ties, flags and numbers."""

from __future__ import annotations

import pickle
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from shardproof._prove.claims import text_of
from shardproof._prove.digests import bits_of, buckets
from shardproof._prove.inventory import Inventory, Item
from shardproof._prove.snapshot import Snapshot


@dataclass
class Difference:
    """One thing that a road did not bring back on this rank."""

    side: str
    kind: str
    key: str
    what: str
    first: str = ""
    count: int = 0
    total: int = 0

    def told(self) -> dict[str, Any]:
        """For the other ranks."""
        return dict(vars(self))


def compare(before: Inventory, after: Inventory, snapshot: Snapshot) -> list[Difference]:
    """All differences on this rank."""
    found = []
    for key, was in before.items.items():
        now = after.items.get(key)
        if now is None:
            found.append(Difference(was.side, "lost", key, f"this {was.kind} is gone"))
            continue
        if difference := _item(was, now, snapshot):
            found.append(difference)
    for key, item in after.items.items():
        if key not in before.items:
            found.append(
                Difference(item.side, "added", key, f"this {item.kind} was not there before")
            )
    if before.ties != after.ties:
        for names in before.ties:
            if names not in after.ties:
                what = f"tied tensors came apart: {', '.join(names)}"
                found.append(Difference("model", "untied", names[0], what))
        for names in after.ties:
            if names not in before.ties:
                what = f"tensors share one memory now: {', '.join(names)}"
                found.append(Difference("model", "tied", names[0], what))
    found += [
        Difference("optimizer", "detached", name, "the optimizer no longer has the model's tensor")
        for name in after.strays
        if name not in before.strays
    ]
    for key, value in before.values.items():
        if key not in after.values:
            found.append(Difference("optimizer", "lost", key, f"was {value!r}, is gone"))
        elif not _same(value, after.values[key]):
            what = f"was {value!r}, is {after.values[key]!r}"
            found.append(Difference("optimizer", "number", key, what))
        elif type(value) is not type(after.values[key]):
            what = f"was a {type(value).__name__}, is a {type(after.values[key]).__name__}"
            found.append(Difference("optimizer", "container", key, what))
    for key, said in before.extra.items():
        is_now = after.extra.get(key, "gone")
        if is_now != said:
            found.append(Difference("model", "extra state", key, f"was {said}, is {is_now}"))
    for key, flag in before.flags.items():
        if key in after.flags and after.flags[key] != flag:
            what = f"requires_grad was {flag}, is {after.flags[key]}"
            found.append(Difference("model", "requires_grad", key, what))
    return found


def _item(was: Item, now: Item, snapshot: Snapshot) -> Difference | None:
    if was.dtype != now.dtype:
        return Difference(was.side, "dtype", was.key, f"was {was.dtype}, is {now.dtype}")
    if was.tensor.shape != now.tensor.shape:
        what = f"has the shape {list(now.tensor.shape)} here, had {list(was.tensor.shape)}"
        return Difference(was.side, "shape", was.key, what)
    if was.part != now.part and not was.reclaimed:
        return Difference(was.side, "placement", was.key, f"holds {now.part}, held {was.part}")
    if was.tensor.device != now.tensor.device:
        what = f"is on {now.tensor.device}, was on {was.tensor.device}"
        return Difference(was.side, "device", was.key, what)
    return _bits(was, now.tensor, snapshot.of(was.tensor))


def _bits(item: Item, live: torch.Tensor, was: torch.Tensor) -> Difference | None:
    per_element = 2 if live.dtype.is_complex and live.element_size() == 16 else 1
    count, first = 0, None
    expected, got = bits_of(was), bits_of(live)
    if expected.is_contiguous() != got.is_contiguous():  # else their buckets are the same
        expected, got = expected.contiguous(), got.contiguous()
    for (start, piece), (_, other) in zip(buckets(got), buckets(expected), strict=True):
        wrong = piece != other.to(piece.device)
        here = int(wrong.sum())
        if here and first is None:
            first = start + int(wrong.nonzero()[0])
        count += here
    if first is None:
        return None
    first //= per_element
    values = f"{_value(was, first)} before, {_value(live, first)} after"
    index = list(item.part.index(first)) if not item.part.own else [first]
    what = f"{count} of {live.numel()} elements differ"
    if not was.is_contiguous():
        what += " of a tensor that is not contiguous"
    return Difference(
        item.side,
        "values",
        item.key,
        what,
        f"element {index}: {values}",
        count,
        live.numel(),
    )


def _value(tensor: torch.Tensor, at: int) -> str:
    return text_of(tensor.reshape(-1)[at])


def _same(one: Any, other: Any) -> bool:
    """Whether two values of a parameter group are equal, or are pickled to the same bytes.

    An array has no single answer to ``==``, a NaN says no to itself, and so does an object without
    ``__eq__`` to its copy.
    """
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if one is other:
        return True
    with suppress(Exception):  # of the values' own code: then the bytes decide
        if one == other:
            return True
    with suppress(Exception):
        return pickle.dumps(one) == pickle.dumps(other)
    return False
