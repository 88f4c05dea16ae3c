"""What a distributed leaf says of itself, and its local data contradict.

A lie is told by changing a sound leaf; it is added here, and each function that relies on what
leaves say is asked of it, on one rank and on all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.testing._internal.two_tensor import TwoTensor

from conformance.kit.layouts import R, S, dtensor, rows, sharded_tensor

FULL = (8, 6)

Lie = Callable[[Any], None]


def _local(change: Callable[[torch.Tensor], torch.Tensor]) -> Lie:
    """Another local tensor in a DTensor."""

    def tell(leaf: DTensor) -> None:
        leaf._local_tensor = change(leaf._local_tensor)

    return tell


def _swapped(tensor: torch.Tensor) -> torch.Tensor:
    """The same number of elements, in another shape."""
    return tensor.reshape(-1).view(*reversed(tensor.shape)).clone()


OF_DTENSORS: dict[str, Lie] = {
    "a row more": _local(lambda t: torch.cat([t, t[:1]])),
    "a row less": _local(lambda t: t[1:].clone()),
    "as many elements in another shape": _local(_swapped),
    "one dimension": _local(lambda t: t.reshape(-1).clone()),
    "a dimension more": _local(lambda t: t[None].clone()),
    "no rows": _local(lambda t: t[:0].clone()),
    "integers of the same width": _local(lambda t: t.to(torch.int32)),
    "half the width": _local(lambda t: t.to(torch.bfloat16)),
    "twice the width": _local(lambda t: t.to(torch.float64)),
}
"""Of DTensors of float32, sharded by row or replicated."""

PLACEMENTS: dict[str, Any] = {"rows": [S(0)], "columns": [S(1)], "replica": [R]}


def sound(mesh: Any, placements: Any, value: float = 1.0) -> DTensor:
    """A leaf to tell lies of."""
    return dtensor(torch.full(FULL, value), mesh, placements)


def _metadata(change: Callable[[Any], None], *, local: bool = False) -> Lie:
    """Another description of the last shard; `local`: in the shard itself, too, where it is."""

    def tell(tensor: Any) -> None:
        last = tensor.metadata().shards_metadata[-1]
        before = list(last.shard_offsets)
        change(last)
        for shard in tensor.local_shards() if local else ():
            if shard.metadata is not last and list(shard.metadata.shard_offsets) == before:
                change(shard.metadata)

    return tell


def _offsets(*offsets: int) -> Callable[[Any], None]:
    def change(meta: Any) -> None:
        meta.shard_offsets = list(offsets)

    return change


def _shard(change: Callable[[torch.Tensor], torch.Tensor]) -> Lie:
    def tell(tensor: Any) -> None:
        for shard in tensor.local_shards():
            shard.tensor = change(shard.tensor)

    return tell


def _nowhere(meta: Any) -> None:
    meta.placement = None


def _lost(tensor: Any) -> None:
    """The shards of this rank are gone."""
    tensor._local_shards = []


def _size(tensor: Any) -> None:
    tensor.metadata().size = torch.Size((FULL[0] + 1, FULL[1]))


OF_SHARDS: dict[str, Lie] = {
    "a gap": _metadata(_offsets(5, 0), local=True),
    "an overlap": _metadata(_offsets(3, 0), local=True),
    "the place of another": _metadata(_offsets(0, 0), local=True),
    "before the tensor": _metadata(_offsets(-1, 0), local=True),
    "a row more": _shard(lambda t: torch.cat([t, t[:1]])),
    "as many elements in another shape": _shard(lambda t: t.reshape(2, -1)),
    "one dimension": _shard(lambda t: t.reshape(-1)),
    "integers of the same width": _shard(lambda t: t.to(torch.int32)),
    "half the width": _shard(lambda t: t.to(torch.bfloat16)),
    "a longer tensor": _size,
    "a shard of no rank": _metadata(_nowhere, local=True),
    "a shard that is gone": _lost,
    "a wrapper of several tensors": _shard(lambda t: TwoTensor(t, t)),
}
"""Of ShardedTensors of float32 in two shards of four rows."""


def sound_shards() -> Any:
    """A ShardedTensor to tell lies of."""
    return sharded_tensor(torch.ones(FULL), rows(FULL, [4, 4]))
