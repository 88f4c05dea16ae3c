"""What a sweep is given of a function: calls by name, one for each kind of tensor it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.distributed.fsdp._common_utils import _FSDPDeviceHandle
from torch.distributed.tensor import DTensor

from conformance.kit.compare import assert_same, local
from conformance.kit.roads import Road
from conformance.kit.tp_kinds import Kind

CPU: Any = _FSDPDeviceHandle.from_device(torch.device("cpu"))
"""What FSDP1 hands over when it trains on the CPU."""

UTILS = "tensor.parallel._data_parallel_utils."
DDP = "tensor.parallel.ddp."
FSDP = "tensor.parallel.fsdp."

Roads = Iterator[tuple[str, Road]]
Trained = Iterator[tuple[Kind, torch.Tensor, DTensor]]


def each(
    kinds: Iterable[Kind],
    call: Callable[[Any, Kind], Any],
    check: Callable[[Any, torch.Tensor, Kind], None],
) -> Roads:
    """A road for each kind: what calls the function with it, and what looks at the result."""
    return ((kind.name, _road(kind, call, check)) for kind in kinds)


def _road(kind: Kind, call: Any, check: Any) -> Road:
    return Road(
        lambda judged: call(judged, kind),
        {"w": kind.leaf},
        lambda got, whole: check(got, whole, kind),
    )


def assert_local(got: torch.Tensor, kind: Kind, full: torch.Tensor, what: str) -> None:
    """What this rank holds of it is what it must, to the bit."""
    assert_same(local(got).detach(), kind.local(full), f"{kind.name}, {what}")
