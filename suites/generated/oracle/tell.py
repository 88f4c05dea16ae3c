"""What a call must come to on one rank, and that in the plain data in which ranks tell of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from generated import data
from generated.oracle.sims import Sim


@dataclass
class Outcome:
    """What a call must come to on one rank."""

    result: Any = None
    raises: tuple[str, ...] | None = None
    """The words of which the message must have one, where the call must raise."""
    kinds: tuple[str, ...] = ()
    """Names of the types that may be raised; none: any but an accident."""
    open: bool = False
    """Nothing is said of the result on this rank, but that the call ends."""
    may_raise: bool = False
    """Either the result, or a refusal."""
    given: dict[str, Any] = field(default_factory=dict)
    """The inputs after the call."""


class Expecting:
    """Says of simulated values what a rank must tell of the real ones, over all calls of a case."""

    def __init__(self) -> None:
        self._objects: dict[int, int] = {}
        self._memories: dict[int, int] = {}
        self._kept: list[Any] = []

    def call(self, outcome: Outcome) -> dict[str, Any]:
        """A call in plain data."""
        given = {name: self.tell(value) for name, value in outcome.given.items()}
        done = outcome.raises is None and not outcome.open
        return {
            "raises": outcome.raises,
            "kinds": outcome.kinds,
            "open": outcome.open,
            "may_raise": outcome.may_raise,
            "given": given,
            "result": self.tell(outcome.result) if done else "any",
        }

    def tell(self, value: Any) -> Any:
        """A value in plain data; what nothing is said of is left out, or is "any"."""
        if isinstance(value, Sim):
            return self._leaf(value)
        if isinstance(value, Mapping):
            items = [(repr(key), self.tell(item)) for key, item in value.items()]
            return (type(value).__name__, items, repr(getattr(value, "_metadata", None)))
        if isinstance(value, (list, tuple)):
            return (type(value).__name__, [(str(n), self.tell(v)) for n, v in enumerate(value)], "")
        return {"kind": type(value).__name__, "value": data.said(value)}

    def _leaf(self, sim: Sim) -> Any:
        if sim.kind == "any":
            return "any"
        self._kept.append(sim)
        told: dict[str, Any] = {"kind": sim.kind, "grad": sim.grad}
        told["object"] = self._objects.setdefault(id(sim), len(self._objects))
        told = {name: value for name, value in told.items() if name not in sim.open}
        if sim.wrong:
            return {"object": told["object"]}
        if sim.kind == "ShardedTensor":
            shards = [(at, self._memory(sim, tensor)) for at, tensor in sim.shards]
            told |= {"size": sim.size, "dtype": sim.dtype, "boxes": list(sim.boxes)}
            return told | {"shards": shards}
        if sim.mesh is not None:
            names = tuple("P-sum" if name == "P" else name for name in sim.placements)
            told |= {"size": sim.size, "dtype": sim.dtype, "placements": names, "mesh": sim.mesh}
            if sim.outside:
                return told
            return told | {"local": self._memory(sim, sim.local)}
        return told | self._memory(sim, sim.local)

    def _memory(self, sim: Sim, tensor: torch.Tensor | None) -> dict[str, Any]:
        if tensor is None:
            return {}
        told: dict[str, Any] = {
            "dtype": data.name_of(tensor.dtype),
            "size": tuple(tensor.shape),
            "device": tensor.device.type,
            "stride": data.strides(tensor),
        }
        if not tensor.is_meta and tensor.numel():
            storage = tensor.untyped_storage()
            self._kept.append(storage)
            told["bits"] = data.digest(tensor)
            told["shared"] = tensor.is_shared()
            place = storage.data_ptr()
            told["memory"] = self._memories.setdefault(place, len(self._memories))
        return {name: value for name, value in told.items() if name not in sim.open}
