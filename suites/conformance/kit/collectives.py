"""Collectives that a call issues, counted with their bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_NOT_COUNTED = ("wait", "barrier", "_wrap_tensor_autograd")


class Collectives(TorchDispatchMode):
    """Counts what goes through c10d while it is active: `with Collectives() as seen: ...`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.bytes = 0
        """Bytes of all tensors handed to collectives on this rank."""

    @property
    def count(self) -> int:
        return sum(self.names.values())

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        namespace, _, name = func.name().partition("::")
        result = func(*args, **(kwargs or {}))
        if namespace in {"c10d", "_c10d_functional"} and not any(w in name for w in _NOT_COUNTED):
            self.names[name] += 1
            self.bytes += _bytes(args)
            if namespace == "_c10d_functional" and not name.endswith("_"):
                # c10d is handed its output; a functional collective makes it.
                self.bytes += _bytes(result)
        return result


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    return 0
