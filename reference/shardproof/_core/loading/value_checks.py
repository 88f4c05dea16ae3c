"""Whether a value of the full state dict can take the place of a local one."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from shardproof._core.tensors.properties import kind_of
from shardproof._core.tensors.subclasses import is_custom, memory_of, wait_for_pending


def plain_full_tensor(key: Any, value: torch.Tensor) -> torch.Tensor:
    """The detached full tensor of a state dict's entry.

    Raises:
        TypeError: it is distributed itself.
        ValueError: it has no data.

    """
    if type(value) is not torch.Tensor:
        if isinstance(value, (DTensor, ShardedTensor)):
            raise TypeError(
                f"{key!r}: the full state dict has a {kind_of(value)}, expected a full tensor"
            )
        value = memory_of(wait_for_pending(value))
    if value.is_meta:
        raise ValueError(f"{key!r}: the full tensor is on the meta device, expected values")
    return value.detach() if value.requires_grad and not is_custom(type(value)) else value


_NUMBERS = (bool, int, float, complex, str)


def check_kinds(key: Any, held: Any, offered: str, dim: int) -> None:
    """Refuse a number for a tensor, and a tensor for a number, but for a tensor of one element.

    Optimizers keep their step in either, and a module's extra state is its own matter.

    Args:
        key: for the message.
        held: what the local state dict has.
        offered: the kind of what the full state dict has: ``Tensor``, or the type's name.
        dim: its dimensions, if it is a tensor.

    Raises:
        TypeError: names the key, and both kinds.

    """
    if str(key).endswith(_EXTRA_STATE_KEY_SUFFIX):
        return
    numbers = [kind.__name__ for kind in _NUMBERS]
    if offered == "Tensor":
        wrong = dim > 0 and isinstance(held, _NUMBERS)
    else:
        wrong = offered in numbers and isinstance(held, torch.Tensor) and held.dim() > 0
    if wrong:
        raise TypeError(
            f"{key!r}: the target is a {kind_of(held)}, the full state dict has a {offered}; "
            "expected the same kind of value"
        )
