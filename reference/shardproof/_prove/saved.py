"""What a road has saved, before it is loaded: keys, shapes and digests against the inventory.

A full tensor is compared without a gather: its digest is the sum of those of its shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from shardproof._prove.claims import Claim
from shardproof._prove.compare import Difference
from shardproof._prove.digests import digest
from shardproof._prove.leaves import leaves_of
from shardproof._prove.placements import Part, product, whole
from shardproof._prove.reach import tensors_in

State = dict[str, Any]


def whole_digests(claims: dict[str, Claim]) -> dict[str, tuple[list[int], str, int]]:
    """Of each tensor whose claims are sound: shape, dtype and digest of the whole."""
    found = {}
    for key, claim in claims.items():
        digests: dict[str, int] = {}
        volume = 0
        for told in claim.holders.values():
            part = told["part"]
            if part["own"] or told["inner"]:
                break
            name = str(part)
            mine = int(told["digest"], 16)
            if digests.setdefault(name, mine) != mine:
                break  # replicas that differ are told of already
            digests[name] = mine
        else:
            shape = claim.any["part"]["shape"]
            volume = sum(Part.of(part).numel for part in _distinct(claim))
            if volume == product(shape):
                total = sum(digests.values()) & ((1 << 64) - 1)
                found[key] = (list(shape), claim.any["dtype"], total)
    return found


def entries(state: State, side: str) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(key as in the inventory, name, tensor) of the tensors of a state dict."""
    if side == "model":
        for name, value in state["model"].items():
            if isinstance(value, torch.Tensor):
                yield str(name), str(name), value
        return
    for name, values in state["optimizer"].get("state", {}).items():
        if isinstance(values, dict):
            for entry, value in values.items():
                for path, tensor in tensors_in(value, str(entry)):
                    yield f"{path} of {name}", str(name), tensor


def check(
    state: State,
    side: str,
    known: dict[str, tuple[list[int], str, int]],
    expected: set[str],
    *,
    full: bool,
) -> list[Difference]:
    """What the saved state lacks, or has other than the job."""
    found = []
    saved = {key: value for key, _, value in entries(state, side)}
    for key in sorted(expected - saved.keys()):
        found.append(Difference(side, "not saved", key, "the saved state lacks it"))
    if not full:
        return found
    for key, value in saved.items():
        if key not in known:
            continue
        shape, dtype, expects = known[key]
        what = _wrong(value, shape, dtype, expects)
        if what:
            found.append(Difference(side, "saved otherwise", key, what))
    return found


def _wrong(value: torch.Tensor, shape: list[int], dtype: str, expects: int) -> str:
    if list(value.shape) != shape:
        return f"was saved as a tensor of the shape {list(value.shape)}, and is one of {shape}"
    saved = str(value.dtype).removeprefix("torch.")
    if saved.startswith("q"):  # its bits are compared after the load
        return ""
    if saved != dtype:
        return f"was saved as {saved}, and is {dtype}"
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided:
        return ""
    if digest(value, whole(shape).places()) != expects:
        return "was saved with other values than the ranks hold"
    return ""


def own_memory(state: Any, live: set[int]) -> tuple[Any, list[str]]:
    """The state with copies of what lies in live memory, and the paths of these."""
    aliased: list[str] = []

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            if any(_lies_in(leaf.tensor, live) for leaf in leaves_of(value, -1)) or _dtensor_in(
                value, live
            ):
                aliased.append(path)
                with torch.no_grad():
                    return value.detach().clone()
            return value
        if isinstance(value, dict):
            copied = type(value)()
            vars(copied).update(vars(value)) if hasattr(value, "__dict__") else None
            for key, item in value.items():
                copied[key] = walk(item, f"{path}.{key}" if path else str(key))
            return copied
        if isinstance(value, list):
            return [walk(item, f"{path}[{at}]") for at, item in enumerate(value)]
        if type(value) is tuple:
            return tuple(walk(item, f"{path}[{at}]") for at, item in enumerate(value))
        return value

    return walk(state, ""), aliased


def _lies_in(tensor: torch.Tensor, live: set[int]) -> bool:
    return tensor.untyped_storage()._cdata in live


def _dtensor_in(value: torch.Tensor, live: set[int]) -> bool:
    local = getattr(value, "_local_tensor", None)
    return local is not None and type(local) is torch.Tensor and _lies_in(local, live)


def _distinct(claim: Claim) -> list[dict[str, Any]]:
    return list({str(told["part"]): told["part"] for told in claim.holders.values()}.values())
