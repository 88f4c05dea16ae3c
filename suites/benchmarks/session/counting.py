"""Collectives, bytes and memory of one call, without noise."""

from __future__ import annotations

import gc
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
    _resolve_process_group,
)
from torch.utils._python_dispatch import TorchDispatchMode

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


class Traffic(TorchDispatchMode):
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

    @property
    def collectives(self) -> int:
        return self.names.total()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        if namespace in {"c10d", "_c10d_functional"} and not any(s in name for s in _SILENT):
            self.names[name] += 1
            group = next(g for g in map(_group, reversed(args)) if g is not None)
            self.received += _received(name.rstrip("_"), args, result, group)
        return result


class _Settled(TorchDispatchMode):
    """Waits after each collective until the transport's threads have dropped its buffers."""

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
        result = func(*args, **(kwargs or {}))
        if func.name().partition("::")[0] in {"c10d", "_c10d_functional"}:
            time.sleep(self._seconds)
        return result


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


def _received(name: str, args: tuple[Any, ...], result: Any, group: dist.ProcessGroup) -> int:
    size, me = group.size(), group.rank()
    if name in {"allgather", "_allgather_base", "allgather_coalesced"} | _GATHERS:
        return _from_others(args[0], size)
    if name in {"all_gather_into_tensor", "all_gather_into_tensor_coalesced"}:
        return _from_others(result, size)
    if name == "broadcast":
        return 0 if args[2] == me else _size(args[0])
    if name == "scatter":
        return 0 if args[3] == me else _size(args[0])
    if name == "gather":
        return _from_others(args[0], size)  # empty but on the root
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
        f"the collective {name} is not known to benchmarks/session/counting.py: state there how "
        "many of its bytes come from other ranks"
    )


_GATHERS = {"allgather_into_tensor_coalesced", "_allgather_into_tensor_coalesced"}


@dataclass(frozen=True)
class Counts:
    """What one call did on this rank."""

    collectives: int
    received: int
    """Bytes that came from other ranks."""
    peak: int
    """Bytes by which the memory that torch allocates rose at its highest."""
    calls: int
    """Python functions called: work on the CPU that no clock disturbs."""


def count(
    call: Callable[[], Any], reset: Callable[[], None], device: torch.device, *, exact: bool
) -> Counts:
    """Run the call under `Traffic`, then measured once or more, then under a counter of calls.

    All ranks call it. What the call gives is freed before the next one. Where the peak need not be
    `exact` it is measured once, which saves seconds.
    """
    reset()
    with Traffic() as seen:
        call()
    exact = exact and seen.collectives <= MANY
    peaks, settled = (PEAKS, SETTLED) if exact else (1, SETTLED_ONCE)
    found = []
    for _ in range(peaks):
        reset()
        with _Settled(settled):
            found.append(peak_bytes(call, device))
    peak = min(found)
    reset()
    return Counts(seen.collectives, seen.received, peak, python_calls(call))


PEAKS, SETTLED = 3, 0.01
"""Times that a peak is measured, and seconds after each of its collectives: a thread of Gloo's may
free its buffers late."""
MANY, SETTLED_ONCE = 150, 0.002
"""Collectives from which one time has to do, and seconds after each: torch's calls have 2000 where
the reference's have two."""
SMALLEST = 1024
"""Bytes of the smallest allocation that counts; smaller ones are bookkeeping, freed at any time."""


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes by which the call raises what torch's allocator has handed out, at its highest.

    Sizes as asked for, so the same from run to run; on the CPU from the profiler's record of
    allocations, which sees every thread.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return int(torch.cuda.max_memory_allocated() - before)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        kept = call()
    del kept
    record = profile.kineto_results
    assert record is not None
    events = [e for e in record.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if abs(event.nbytes()) >= SMALLEST:
            live += event.nbytes()
        peak = max(peak, live)
    return peak


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
