"""What a call came to on a rank, told in plain data: its result, its inputs, its process.

Each script that repeats a failure holds a copy: it needs torch alone.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from generated.data import digest, name_of, said, strides


def rank_of(shard: Any) -> Any:
    """The rank that the metadata of a shard name."""
    return shard.placement.rank()


def process_state() -> dict[str, Any]:
    """What a call may leave changed in the process."""
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "torch's random numbers": hash(bytes(torch.get_rng_state().tolist()[:64])),
        "Python's random numbers": hash(random.getstate()),
        "warning filters": list(map(repr, warnings.filters)),
        "environment": dict(os.environ),
        "threads": threading.active_count(),
        "groups": sorted(_names_of_groups()),
        "determinism": torch.are_deterministic_algorithms_enabled(),
    }


def _names_of_groups() -> list[str]:
    return list(dist.distributed_c10d._world.pg_names.values())


class Teller:
    """Says of values in plain data all that a caller may notice of them.

    Objects and memories are numbered as they are met, over all that one teller tells.
    """

    def __init__(self) -> None:
        self._objects: dict[int, int] = {}
        self._memories: dict[int, int] = {}
        self._kept: list[Any] = []

    def tell(self, value: Any) -> Any:
        """A tree of literals: containers as (type, items, more), leaves as dicts."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, Mapping):
            items = [(repr(key), self.tell(item)) for key, item in value.items()]
            return (type(value).__name__, items, repr(getattr(value, "_metadata", None)))
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            return (type(value).__name__, [(str(n), self.tell(v)) for n, v in enumerate(value)], "")
        return {"kind": type(value).__name__, "value": said(value)}

    def _tensor(self, value: torch.Tensor) -> dict[str, Any]:
        self._kept.append(value)
        told: dict[str, Any] = {
            "object": self._objects.setdefault(id(value), len(self._objects)),
            "grad": value.requires_grad,
        }
        if isinstance(value, ShardedTensor):
            meta = value.metadata()
            shards = [
                (tuple(s.metadata.shard_offsets), self._memory(s.tensor))
                for s in value.local_shards()
            ]
            boxes = [
                (tuple(s.shard_offsets), tuple(s.shard_sizes), rank_of(s))
                for s in meta.shards_metadata
            ]
            return told | {
                "kind": "ShardedTensor",
                "grad": meta.tensor_properties.requires_grad,
                "size": tuple(meta.size),
                "dtype": name_of(meta.tensor_properties.dtype),
                "boxes": boxes,
                "shards": shards,
            }
        parameter = isinstance(value, nn.Parameter)
        if isinstance(value, DTensor):
            spec = value._spec
            return told | {
                "kind": "DTensor Parameter" if parameter else "DTensor",
                "size": tuple(value.shape),
                "dtype": name_of(value.dtype),
                "placements": tuple(map(placed, spec.placements)),
                "mesh": (tuple(spec.mesh.shape), tuple(spec.mesh.mesh.flatten().tolist())),
                "local": self._memory(value._local_tensor),
            }
        plain = type(value) in (torch.Tensor, nn.Parameter)
        return told | {
            "kind": "Parameter" if parameter else "Tensor" if plain else type(value).__name__,
            **self._memory(value),
        }

    def _memory(self, tensor: torch.Tensor) -> dict[str, Any]:
        told: dict[str, Any] = {
            "dtype": name_of(tensor.dtype),
            "size": tuple(tensor.shape),
            "device": tensor.device.type,
            "stride": strides(tensor),
            "memory": None,
            "bits": "",
        }
        if not tensor.is_meta and tensor.numel():
            storage = tensor.untyped_storage()
            self._kept.append(storage)
            told["memory"] = self._memories.setdefault(storage.data_ptr(), len(self._memories))
            told["bits"] = digest(tensor)
            told["shared"] = tensor.is_shared()
        return told


def placed(placement: Placement) -> str:
    if isinstance(placement, _StridedShard):
        return f"SS{placement.dim}x{placement.split_factor}"
    if isinstance(placement, Shard):
        return f"S{placement.dim}"
    if isinstance(placement, Partial):
        return "P-" + placement.reduce_op
    return "R" if isinstance(placement, Replicate) else repr(placement)


def attempt(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, Any, list[str]]:
    """("returned", value) or ("raised", exception), and what of the process was left changed."""
    before = process_state()
    try:
        word, value = "returned", call(*args, **kwargs)
    except Exception as error:
        word, value = "raised", error
    after = process_state()
    return word, value, [name for name in before if before[name] != after[name]]


def outcome(
    teller: Teller, word: str, value: Any, changed: list[str], given: Mapping[str, Any]
) -> dict[str, Any]:
    """What a call on this rank came to, in plain data: its result, and the inputs after it."""
    told: dict[str, Any] = {"word": word}
    told["given"] = {name: teller.tell(item) for name, item in given.items()}
    if word == "raised":
        told["error"] = (_public_type(value), f"{value}")
    else:
        told["result"] = teller.tell(value)
    return told | {"changed": changed}


def _public_type(error: BaseException) -> str:
    return type(error).__name__


class Watch:
    """Weak references to tensors, to tell which outlive the call."""

    def __init__(self) -> None:
        self._watched: list[tuple[str, Any]] = []

    def on(self, name: str, tensor: Any) -> None:
        """Watch a tensor, and what it is a view of."""
        self._watched.append((name, weakref.ref(tensor)))

    def living(self) -> list[str]:
        """The names of those that are alive, though nobody should hold them."""
        if any(reference() is not None for _, reference in self._watched):
            gc.collect()
        return [name for name, reference in self._watched if reference() is not None]
