"""What belongs to the process, or to the caller's tensors, and must be after a call as before."""

from __future__ import annotations

import gc
import os
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from conformance.kit.compare import fingerprint


@contextmanager
def _set(change: Callable[[Any], Any], value: Any, back: Any) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(back)


@contextmanager
def _ignoring() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="of the caller")
        yield


@contextmanager
def _without_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": torch.enable_grad,
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "default device": lambda: torch.device("meta"),
    "default dtype": lambda: _set(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "deterministic": lambda: _set(torch.use_deterministic_algorithms, True, False),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "one warning is ignored": _ignoring,
    "no garbage collection": _without_collection,
}
"""Name -> a context that callers may be in."""


def process() -> dict[str, Any]:
    """What the process holds that a call might change, by name."""
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "random numbers of torch": torch.random.get_rng_state().numpy().tobytes(),
        "random numbers of Python": random.getstate(),
        "threads of torch": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "warning filters": list(warnings.filters),
        "process groups": len(dist.distributed_c10d._world.pg_map),
        "threads of Python": threading.active_count(),
        "garbage collection": (gc.isenabled(), gc.get_threshold()),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
    }


def flags(tensor: torch.Tensor) -> dict[str, Any]:
    """All that a caller may have hung on a tensor, and its bits."""
    if isinstance(tensor, ShardedTensor):
        return {"value": fingerprint(tensor), "metadata": str(tensor.metadata())}
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return {
        "value": fingerprint(tensor),
        "version": None if tensor.is_inference() else local._version,
        "requires_grad": (tensor.requires_grad, local.requires_grad),
        "grad": id(tensor.grad) if tensor.is_leaf else None,
        "a leaf": tensor.is_leaf,
        "hooks": (
            dict(tensor._backward_hooks or {}),
            dict(tensor._post_accumulate_grad_hooks or {}),
        ),
        "attributes": {name: id(value) for name, value in vars(tensor).items()},
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what differs."""
    return [name for name in before if before[name] != after[name]]
