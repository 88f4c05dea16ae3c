"""The operations of a call, each once: what counts and peaks are told of them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Sees each operation while it is active; one that a kind of tensor passes on, once.

    A DTensor makes operations of its own of one that is for it. They come to a mode only where it
    leaves this one to that kind.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        plain = torch.Tensor.__torch_dispatch__
        if any(getattr(kind, "__torch_dispatch__", plain) != plain for kind in types):
            return NotImplemented
        self.before()
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        self.after(namespace, name, args, result)
        return result

    def before(self) -> None:
        """An operation is about to run."""

    def after(self, namespace: str, name: str, args: tuple[Any, ...], result: Any) -> None:
        """`namespace::name` has run."""
