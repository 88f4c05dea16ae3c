"""What lies inside a tensor: the tensors that a wrapper subclass holds."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

Parts = dict[str, Any]


def inner_tensors(value: Any) -> Parts | None:
    """Name to tensor for what a wrapper subclass holds; None for a tensor with its own bytes."""
    if isinstance(value, DTensor):
        return {"local": value._local_tensor}
    if hasattr(value, "local_shards"):  # LocalShardsWrapper: torch has one, torchrec another
        offsets = value.local_offsets()
        # A rank without a shard has an offset all the same.
        return {str(at): shard for at, shard in zip(offsets, value.local_shards(), strict=False)}
    if not hasattr(value, "__tensor_flatten__"):
        return None
    names, context = value.__tensor_flatten__()
    return {"context": repr(context), **{name: getattr(value, name) for name in names}}


def copied(value: Any) -> Any:
    """A copy, part by part, for a wrapper subclass may lack clone; of a DTensor its local part."""
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    parts = inner_tensors(value) if isinstance(value, torch.Tensor) else None
    if parts is None:
        return value.detach().clone() if isinstance(value, torch.Tensor) else value
    return {name: copied(part) for name, part in parts.items()}
