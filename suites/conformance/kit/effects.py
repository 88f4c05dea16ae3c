"""What a call may leave behind: in the process, on what it was given, and in memory.

What is not its business is listed here, and each function is asked whether it is as it was.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from conformance.kit.nested import leaves


def of_the_process() -> dict[str, Any]:
    """What the process holds that a call might change."""
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "print options": str(torch._tensor_str.PRINT_OPTS),
        "random numbers of torch": torch.random.get_rng_state().tolist(),
        "random numbers of NumPy": str(np.random.get_state()),
        "random numbers of Python": random.getstate(),
        "threads of torch": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warnings filters": list(warnings.filters),
        "how warnings are shown": warnings.showwarning,
        "process groups": sorted(map(str, dist.distributed_c10d._world.pg_names.values())),
        "threads of Python": sorted(str(thread.ident) for thread in threading.enumerate()),
        "environment": dict(os.environ),
        "open files": _files(),
        "working directory": os.getcwd(),
        "signal handlers": [str(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGINT)],
        "recursion limit": sys.getrecursionlimit(),
        "garbage collection": (gc.isenabled(), gc.get_threshold()),
        "hooks on saved tensors": torch._C._autograd._top_saved_tensors_default_hooks(False),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "path for modules": list(sys.path),
    }


def _files() -> list[str]:
    """What is open, but for what a backend opens for its connections."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # the listing's own
            continue
    return sorted(
        each for each in found if not each.startswith(("socket:", "anon_inode:", "pipe:"))
    )


def parts_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor and the tensors in it that the caller gave it."""
    yield tensor
    if isinstance(tensor, ShardedTensor):
        for shard in tensor.local_shards():
            yield from parts_of(shard.tensor)
    elif isinstance(tensor, DTensor):
        yield from parts_of(tensor._local_tensor)
    elif hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from parts_of(getattr(tensor, name))


def mark(value: Any) -> None:
    """Give the parameters in a state dict what owners put on theirs: attributes, hooks, grads."""
    for _, leaf in leaves(value):
        if isinstance(leaf, nn.Parameter):
            leaf.owner = ["somebody"]  # type: ignore[attr-defined]
            if leaf.requires_grad:
                leaf.grad = torch.ones_like(leaf.detach())
                leaf.register_hook(lambda grad: grad)


_OF_TORCH = {"_local_tensor", "_spec"}
"""Attributes in which a tensor of torch holds itself: what they hold is looked at by itself."""


def on_what_was_given(value: Any) -> dict[str, Any]:
    """What a caller may notice of containers, and of tensors besides their values."""
    found: dict[str, Any] = {"containers": outline(value)}
    for path, leaf in leaves(value):
        if not isinstance(leaf, torch.Tensor):
            continue
        for number, tensor in enumerate(parts_of(leaf)):
            plain = not isinstance(tensor, ShardedTensor)
            found[f"{'.'.join(map(str, path))}, {number}"] = {
                "object": id(tensor),
                "type": type(tensor),
                "requires_grad": plain and tensor.requires_grad,
                "grad_fn": plain and tensor.grad_fn,
                "grad": id(tensor.grad) if plain and tensor.is_leaf else None,
                "version": tensor._version if plain and type(tensor) is torch.Tensor else 0,
                "attributes": sorted(
                    (name, id(held)) for name, held in vars(tensor).items() if name not in _OF_TORCH
                ),
                "hooks": len(tensor._backward_hooks or ()) if plain else 0,
                "strides": plain and tensor.layout is torch.strided and tensor.stride(),
            }
    return found


def outline(value: Any) -> Any:
    """Which containers and leaves there are, and where."""
    if isinstance(value, Mapping):
        metadata = repr(getattr(value, "_metadata", None))
        return id(value), metadata, [(repr(key), outline(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return id(value), [outline(item) for item in value]
    return id(value)


def empty(value: Any) -> None:
    """Take all out of the containers, as their owner may."""
    if isinstance(value, (Mapping, list, tuple)):
        items = list(value.values() if isinstance(value, Mapping) else value)
        for item in (*items, getattr(value, "_metadata", None)):
            empty(item)
        if isinstance(value, (MutableMapping, list)):
            value.clear()


def finish(value: Any) -> None:
    """Wait for what collectives still write of a state dict."""
    for _, leaf in leaves(value):
        for tensor in parts_of(leaf) if isinstance(leaf, torch.Tensor) else ():
            if isinstance(tensor, AsyncCollectiveTensor):
                tensor.wait()


def differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is not as it was, in words."""
    names = [name for name in before if name not in after or before[name] != after[name]]
    return names + [f"{name} is new" for name in after if name not in before]


class Watched:
    """Whether tensors are gone once nobody but their owner held them.

    Attributes:
        events: a name for each, and the event of its end.

    """

    def __init__(self, value: Any) -> None:
        self.events: dict[str, threading.Event] = {}
        for path, leaf in leaves(value):
            if isinstance(leaf, torch.Tensor):
                for number, tensor in enumerate(parts_of(leaf)):
                    name = f"{'.'.join(map(str, path))}, {number}"
                    self.events[name] = threading.Event()
                    weakref.finalize(tensor, self.events[name].set)

    def kept(self, patience: float = 3.0, *, collect: bool = True) -> list[str]:
        """Those that are there still. A backend's thread may let go of what it sent a bit later."""
        if collect:
            gc.collect()
        for event in self.events.values():
            if not event.wait(patience):
                break
        return [name for name, event in self.events.items() if not event.is_set()]
