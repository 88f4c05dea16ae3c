"""Ranks that one process plays: torch's LocalTensorMode, and tensors without values.

Under that mode a tensor stands for one tensor a rank, and a mesh coordinate is a SymInt that
stands for one number a rank. What depends on the rank has to be computed once for each.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = ["for_each_rank", "plays_all_ranks", "simulates_ranks", "with_real_ranks"]

P = ParamSpec("P")
R = TypeVar("R")

_mode: Any
try:
    # Private, and not in every torch.
    import torch.distributed._local_tensor as _mode
except ImportError:
    _mode = None


def plays_all_ranks() -> bool:
    """Whether this process plays all ranks just now."""
    return _mode is not None and _mode.enabled_local_tensor_mode() is not None


def for_each_rank(function: Callable[P, R]) -> Callable[P, R]:
    """``function``; where one process plays all ranks, called once for each with what is its own.

    It may return a tensor, a number, or a tuple of these, and must not communicate.
    """
    # Not reached with torch 2.13: it has the mode.
    if _mode is None:
        return function
    made: Callable[P, R] = _mode.maybe_run_for_local_tensor(function)
    return made


def with_real_ranks() -> AbstractContextManager[Any]:
    """In it this process is but the one rank that its process groups know."""
    # Not reached with torch 2.13: it has the mode.
    if _mode is None:
        return nullcontext()
    found: AbstractContextManager[Any] = _mode.maybe_disable_local_tensor_mode()
    return found


def simulates_ranks() -> bool:
    """Whether a mode is active under which ranks or values are made up."""
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return True
    return plays_all_ranks()
