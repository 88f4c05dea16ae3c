"""What a benchmark gives back on a rank: the call, its check and its reset. Free of torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _nothing() -> None:
    """Reset of a call that leaves no trace."""


@dataclass
class Work:
    """A call, what its result must be, and what makes the next call start as the first did."""

    call: Callable[[], Any]
    check: Callable[[Any], None]
    """Raises AssertionError when the result is not exact; not timed."""
    reset: Callable[[], object] = _nothing
    """Done before every call that is timed, untimed itself."""

    @property
    def resets(self) -> bool:
        return self.reset is not _nothing
