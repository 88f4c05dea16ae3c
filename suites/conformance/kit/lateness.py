"""Ranks that come late to a collective: to the first of a call, or to each one of them."""

from __future__ import annotations

import time
from typing import Any

from conformance.kit.collectives import Collectives


class Late(Collectives):
    """While it is active each collective of this rank begins late.

    Time is what is tested, so there is no event to wait for: the others have to be in the
    collective, or past it, and nothing tells of that.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.name().startswith(("c10d::", "_c10d_functional::")):
            time.sleep(self._seconds)
        return super().__torch_dispatch__(func, types, args, kwargs)
