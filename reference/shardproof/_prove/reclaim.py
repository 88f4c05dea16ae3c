"""Plain tensors that a state dict tells of as DTensors: what they claim is taken from there.

Tensor parallelism under data parallelism keeps local tensors in the module between forwards. Plain
tensors of one name that differ between ranks are then shards, not replicas. A claim of a state dict
is believed where its local tensor has the bits of the live one; the round trips judge the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from shardproof._prove.claims import Claim
from shardproof._prove.digests import digest
from shardproof._prove.inventory import Inventory
from shardproof._prove.leaves import leaves_of


def plain_and_different(claims: dict[str, Claim]) -> bool:
    """Whether ranks have plain parameters of one name and other data."""
    return any(
        claim.any["kind"] == "parameter"
        and len({told["digest"] for told in claim.holders.values()}) > 1
        and all(told["layout"] == "plain" for told in claim.holders.values())
        for claim in claims.values()
    )


def reclaim(inventory: Inventory, state: dict[str, Any], rank: int) -> None:
    """Take over the claims of a model's state dict, for its parameters and the state of these."""
    for name, value in state.items():
        if not isinstance(value, DTensor):
            continue
        for leaf in leaves_of(value, rank):
            item = inventory.items.get(name)
            if item is None or item.layout != "plain" or leaf.contradiction:
                continue
            if item.tensor.shape == leaf.tensor.shape and _same(item.tensor, leaf.tensor):
                for one in inventory.items.values():
                    # Of the optimizer's entries those of the same shape: a step is none.
                    if one.name == name and one.tensor.shape == leaf.tensor.shape:
                        one.part, one.layout, one.ranks = leaf.part, leaf.layout, leaf.ranks
                        one.reclaimed = True


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and digest(one) == digest(other)
