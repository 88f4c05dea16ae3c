"""A device module whose one stream says when it is current, and what was waited for on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

STREAM = object()
"""The compute stream of every `Handle`."""


class Handle:
    """Stands in for torch.cuda: `handle.stream(STREAM)` makes the stream current."""

    def __init__(self) -> None:
        self.current: Any = None
        self.entered = 0

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        """Make the stream current for a while."""
        self.entered += 1
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


class Waits(TorchDispatchMode):
    """Notes, for each collective that is waited for, which stream was current."""

    def __init__(self, handle: Handle) -> None:
        super().__init__()
        self.handle = handle
        self.streams: list[Any] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if "wait_tensor" in func.name():
            self.streams.append(self.handle.current)
        return func(*args, **(kwargs or {}))
