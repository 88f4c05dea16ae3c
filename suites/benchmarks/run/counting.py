"""Collectives, bytes, memory and Python calls of one call, without noise."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
    _resolve_process_group,
)

from benchmarks.run.operations import Operations
from benchmarks.run.peaks import PEAKS, Settled, peak_bytes

_SILENT = ("wait_tensor", "barrier", "_wrap_tensor_autograd", "_allgather_base_backward")


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(map(_size, value))
    return 0


def _from_others(value: Any, size: int) -> int:
    """Bytes of an output to which each rank gives the same share."""
    return _size(value) * (size - 1) // size


class Traffic(Operations):
    """Counts what goes through c10d while it is active: `with Traffic() as seen: ...`.

    Bytes are those that this rank needs from others, whatever the algorithm: an all-gather of n
    parts brings n - 1 of them, a broadcast or scatter brings the source nothing, an all-reduce
    twice the share of the others, as a ring does. A collective that is not known here raises
    NotImplementedError, because counting nothing for it would be a lie.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.received = 0

    def after(self, namespace: str, name: str, args: tuple[Any, ...], result: Any) -> None:
        """Count it, if it is a collective."""
        if namespace in {"c10d", "_c10d_functional"} and not any(s in name for s in _SILENT):
            self.names[name] += 1
            group = next(g for g in map(_group, reversed(args)) if g is not None)
            self.received += _received(name.rstrip("_"), args, result, group)


def _group(value: Any) -> dist.ProcessGroup | None:
    if isinstance(value, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(value)
        except (RuntimeError, TypeError):  # another kind of object, such as a reduction
            return None
    if isinstance(value, str) and not value.isalpha():
        found: dist.ProcessGroup = _resolve_process_group(value)  # type: ignore[arg-type]
        return found
    return None


_GATHERS = {
    "allgather",
    "_allgather_base",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "_allgather_into_tensor_coalesced",
    "gather",  # its result is empty but on the root
}


def _received(name: str, args: tuple[Any, ...], result: Any, group: dist.ProcessGroup) -> int:
    size, me = group.size(), group.rank()
    if name in _GATHERS:
        return _from_others(args[0], size)
    if name in {"all_gather_into_tensor", "all_gather_into_tensor_coalesced"}:
        return _from_others(result, size)
    if name in {"broadcast", "scatter"}:
        root = args[2 if name == "broadcast" else 3]
        return 0 if root == me else _size(args[0])
    if name in {"allreduce", "all_reduce", "allreduce_coalesced"}:
        return 2 * _from_others(args[0], size)
    if name in {"alltoall", "alltoall_base", "_reduce_scatter_base", "reduce_scatter"}:
        whole = args[0] if name.startswith("alltoall") else args[1]
        return _from_others(whole, size)
    if name in {"recv", "recv_any_source"}:
        return _size(args[0])
    if name == "send":
        return 0
    raise NotImplementedError(
        f"the collective {name} is not known to benchmarks/run/counting.py: state there how "
        "many of its bytes come from other ranks"
    )


def count(
    call: Callable[[], Any], reset: Callable[[], object], device: torch.device
) -> dict[str, int]:
    """Run the call under `Traffic`, then measured more than once, then under a counter of calls.

    All ranks call it. What the call gives is freed before the next one. The names are those of
    `base.COUNTED`: bytes received are from other ranks, the peak is that of what torch allocates,
    and calls are work on the CPU that no clock disturbs.
    """
    reset()
    with Traffic() as seen:
        call()
    peaks = []
    for _ in range(PEAKS):
        reset()
        with Settled():
            peaks.append(peak_bytes(call, device))
    reset()
    return {
        "collectives": seen.names.total(),
        "received": seen.received,
        "peak": min(peaks),
        "calls": python_calls(call),
    }


def python_calls(call: Callable[[], Any]) -> int:
    """How many Python functions the call enters on this thread."""
    seen = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal seen
        seen += event == "call"

    gc.collect()
    gc.disable()  # finalizers would run at moments of their own
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
        gc.enable()
    return seen
