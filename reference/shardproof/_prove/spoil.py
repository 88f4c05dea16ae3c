"""Spoil every live value, so that a load which keeps one cannot be taken for a load that worked."""

from __future__ import annotations

from typing import Any

import torch

from shardproof._prove.digests import bits_of, buckets
from shardproof._prove.inventory import Inventory
from shardproof._prove.snapshot import Snapshot


def spoil(
    inventory: Inventory, snapshot: Snapshot, optimizers: list[torch.optim.Optimizer], side: str
) -> None:
    """Turn all bits of what a state dict of this side holds, and change the optimizer's numbers.

    From the snapshot's bits, and not from the live ones: tied tensors would be turned twice.
    """
    kinds = ("optimizer",) if side == "optimizer" else ("parameter", "buffer")
    with torch.no_grad():
        for item in inventory.items.values():
            if item.kind in kinds:
                _turn(item.tensor, snapshot.of(item.tensor))
    if side == "model":
        return
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for key, value in group.items():
                if key != "params":
                    group[key] = _other(value)
        for state in optimizer.state.values():
            if isinstance(state, dict):
                for key, value in state.items():
                    if not isinstance(value, bool):
                        state[key] = value + 1 if isinstance(value, int) else _other(value)


def _turn(live: torch.Tensor, was: torch.Tensor) -> None:
    target, source = bits_of(live), bits_of(was)
    flip = torch.logical_not if live.dtype is torch.bool else torch.bitwise_not
    if live.dtype is torch.bool:
        target, source = live.detach(), was
    if target.is_contiguous() and source.is_contiguous():
        flat = target.view(-1)
        for start, piece in buckets(source):
            flat[start : start + piece.numel()].copy_(flip(piece))
    else:
        target.copy_(flip(source))


def _other(value: Any) -> Any:
    """Another number; flags and modes stay, since an optimizer chooses its code by them."""
    if isinstance(value, float):
        return value + 0.25
    if isinstance(value, tuple) and value and all(isinstance(one, float) for one in value):
        return tuple(one / 2 for one in value)
    return value
