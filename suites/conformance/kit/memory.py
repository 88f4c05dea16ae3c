"""Memory that a call touches."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

MIB = 1 << 20


def peak_growth(call: Callable[[], Any]) -> int:
    """Bytes by which the call raises this process's peak of resident memory.

    The peak counts touched pages, so memory that is only allocated costs nothing. On a rank that
    was just forked the peak is what it holds now; earlier peaks of the same rank would hide some.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = call()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del kept
    return (after - before) * 1024
