"""Spoil every live value, so that a load which keeps one cannot be taken for a load that worked."""

from __future__ import annotations

from typing import Any

import torch

from shardproof._prove import extra
from shardproof._prove.digests import bits_of, buckets
from shardproof._prove.inventory import Inventory
from shardproof._prove.modules import Modules
from shardproof._prove.snapshot import Snapshot


def spoil(
    inventory: Inventory,
    snapshot: Snapshot,
    modules: Modules,
    optimizers: list[torch.optim.Optimizer],
    side: str,
) -> dict[str, str]:
    """Turn all bits of what a state dict of this side holds, and change the optimizer's numbers.

    From the snapshot's bits, and not from the live ones: tied tensors would be turned twice.
    Returns the extra states that could not be changed, with the reason.
    """
    kinds = ("optimizer",) if side == "optimizer" else ("parameter", "buffer")
    with torch.no_grad():
        for item in inventory.items.values():
            if item.kind in kinds:
                _turn(item.tensor, snapshot.of(item.tensor))
    if side == "model":
        said = {name: extra.spoil(module) for name, module in modules.extra_states()}
        return {name: why for name, why in said.items() if why}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for key, value in group.items():
                if key != "params":
                    group[key] = _other(value)
        for state in optimizer.state.values():
            _count_on(state)
    return {}


def _count_on(state: Any) -> None:
    """Other counters and factors in the state of one parameter, in nested containers, too."""
    pairs = state.items() if isinstance(state, dict) else enumerate(state)
    for key, value in list(pairs) if isinstance(state, (dict, list)) else ():
        if isinstance(value, (dict, list)):
            _count_on(value)
        elif type(value) is int:
            state[key] = value + 1
        elif not isinstance(value, torch.Tensor):
            state[key] = _other(value)


def _turn(live: torch.Tensor, was: torch.Tensor) -> None:
    live, was = _physical(live), _physical(was)
    target, source = bits_of(live), bits_of(was)
    flip = torch.logical_not if live.dtype is torch.bool else torch.bitwise_not
    if live.dtype is torch.bool:
        target, source = live.detach(), was
    if _overlaps(live):
        target, source = _line(target), _line(source)
        at = _offsets(live)
        target[at] = flip(source[at])
    elif target.is_contiguous() and source.is_contiguous():
        flat = target.view(-1)
        for start, piece in buckets(source):
            flat[start : start + piece.numel()].copy_(flip(piece))
    else:
        target.copy_(flip(source))


def _physical(tensor: torch.Tensor) -> torch.Tensor:
    """Without a pending conjugation or negation: the memory itself."""
    tensor = tensor.conj() if tensor.is_conj() else tensor
    return torch._neg_view(tensor) if tensor.is_neg() else tensor


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether elements may share memory, as in an expanded tensor."""
    reached = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reached:
            return tensor.numel() > 0
        reached = max(reached, stride * (size - 1) + 1)
    return False


def _line(tensor: torch.Tensor) -> torch.Tensor:
    """The memory from the first to the last element."""
    span = 1 + sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.as_strided((span,), (1,))


def _offsets(tensor: torch.Tensor) -> torch.Tensor:
    """Where in it the elements lie, each place once."""
    found = torch.zeros(1, dtype=torch.int64, device=tensor.device)
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        steps = torch.arange(size, device=tensor.device) * stride
        found = torch.unique(found[:, None] + steps)
    return found


def _other(value: Any) -> Any:
    """Another number; flags and modes stay, since an optimizer chooses its code by them."""
    if isinstance(value, float):
        return value + 0.25
    if isinstance(value, tuple) and value and all(isinstance(one, float) for one in value):
        return tuple(one / 2 for one in value)
    return value
