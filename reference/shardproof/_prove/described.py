"""What a proof is about: the job in a sentence, and its tensors as a list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from shardproof._prove.claims import Claim


def describe(
    models: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    ranks: int,
    snapshot: str,
    tensors: int,
) -> dict[str, Any]:
    """Names, versions and sizes."""
    kinds = [type(optimizer).__name__ for optimizer in optimizers]
    name = ", ".join(dict.fromkeys(type(model).__name__ for model in models))
    inside = [type(module).__name__ for model in models for module in model.modules()]
    summary = (
        f"{name} with {', '.join(kinds) or 'no optimizer'} on {ranks} "
        f"rank{'s' if ranks > 1 else ''}, {tensors} tensors, torch {torch.__version__}"
    )
    return {
        "summary": summary,
        "model": name,
        "optimizers": kinds,
        "wrappers": sorted({one for one in inside if "FSDP" in one}),
        "ranks": ranks,
        "torch": str(torch.__version__),
        "snapshot": snapshot,
    }


def listed(claims: dict[str, Claim]) -> list[dict[str, Any]]:
    """Each tensor once, with the ranks that hold each of its parts."""
    found = []
    for key, claim in claims.items():
        parts: dict[str, dict[str, Any]] = {}
        for rank, told in claim.holders.items():
            one = parts.setdefault(
                str((told["part"], told["digest"])),
                {"part": told["part"], "digest": told["digest"], "ranks": []},
            )
            one["ranks"].append(rank)
        told = claim.any
        found.append(
            {
                "key": key,
                **{name: told[name] for name in ("kind", "layout", "dtype")},
                "parts": list(parts.values()),
            }
        )
    return found
