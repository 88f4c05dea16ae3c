"""What a rank must tell, of simulated values; and where what it told differs from that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from generated import rig
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
    """Nothing is said of this call on this rank, but that it ends."""
    may_raise: bool = False
    """Either the result, or a refusal on all ranks alike."""
    given: dict[str, Any] = field(default_factory=dict)
    loose_given: bool = False
    """Nothing is said of the inputs after it."""


REFUSALS = ("ValueError", "TypeError", "RuntimeError", "CompanionMismatch", "KeyError")


class Comparison:
    """Holds what one rank told of one case against what it must tell, step by step."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, Any], Any] = {}
        self._kept: list[Any] = []

    def differences(self, expected: Outcome, told: dict[str, Any]) -> str:
        """The first difference in words; empty when there is none."""
        if changed := told["changed"]:
            return f"the call left changed: {', '.join(changed)}"
        if told["word"] == "raised" and expected.raises is None and not expected.open:
            kind, text = told["error"]
            if not (expected.may_raise and kind in REFUSALS):
                return f"it raised {kind}: {text[:300]}"
            return ""
        if not expected.loose_given:
            for name, value in expected.given.items():
                if found := self._tree(value, told["given"][name], name):
                    return f"after the call, {found}"
        if expected.open:
            return ""
        if told["word"] == "raised":
            kind, text = told["error"]
            said = f"it raised {kind}: {text[:300]}"
            assert expected.raises is not None
            if kind not in (expected.kinds or REFUSALS):
                return f"{said} (expected {' or '.join(expected.kinds or REFUSALS)})"
            # The text of a KeyError is the repr of its message.
            plain = text.replace("\\", "")
            if expected.raises and not any(w.replace("\\", "") in plain for w in expected.raises):
                return f"{said} (expected a message with {' or '.join(map(repr, expected.raises))})"
            return ""
        if expected.raises is not None:
            return f"it returned, and must raise and name {' or '.join(expected.raises)}"
        return self._tree(expected.result, told["result"], "the result")

    def _tree(self, expected: Any, told: Any, path: str) -> str:
        if isinstance(expected, Sim):
            return self._leaf(expected, told, path)
        if isinstance(expected, (Mapping, list, tuple)):
            if not isinstance(told, tuple):
                return f"{path} is {_short(told)}, expected a {type(expected).__name__}"
            kind, items, more = told
            if kind != type(expected).__name__:
                return f"{path} is a {kind}, expected a {type(expected).__name__}"
            named = isinstance(expected, Mapping)
            pairs = list(expected.items()) if named else list(enumerate(expected))
            keys = [repr(key) for key, _ in pairs]
            if [key for key, _ in items] != keys:
                return f"{path} has the keys {[k for k, _ in items]}, expected {keys}"
            if named and more != repr(getattr(expected, "_metadata", None)):
                return f"{path} has _metadata {more}"
            for (key, value), (_, item) in zip(pairs, items, strict=True):
                if found := self._tree(value, item, f"{path}[{key!r}]"):
                    return found
            return ""
        mine = {"kind": type(expected).__name__, "value": rig._said(expected)}
        if told != mine:
            return f"{path} is {_short(told)}, expected {_short(mine)}"
        return ""

    def _leaf(self, sim: Sim, told: Any, path: str) -> str:
        if sim.kind == "any":
            return ""
        if not isinstance(told, dict) or "object" not in told:
            return f"{path} is {_short(told)}, expected a {sim.kind}"
        for name, value in (("kind", sim.kind), ("grad", sim.grad)):
            if name not in sim.open and told[name] != value:
                return f"{path} has {name} {told[name]!r}, expected {value!r}"
        if "object" not in sim.open:
            self._kept.append(sim)
            if found := self._same("object", id(sim), told["object"]):
                return f"{path} {found}"
        if sim.kind == "ShardedTensor":
            return self._sharded(sim, told, path)
        if sim.wrong:
            return ""
        if sim.mesh is not None:
            whole = {"size": sim.size, "dtype": sim.dtype, "placements": _full(sim.placements),
                     "mesh": sim.mesh}
            for name, value in whole.items():
                if told[name] != value:
                    return f"{path} has {name} {told[name]!r}, expected {value!r}"
            return self._memory(sim, sim.local, told["local"], f"{path}'s local tensor")
        return self._memory(sim, sim.local, told, path)

    def _sharded(self, sim: Sim, told: dict[str, Any], path: str) -> str:
        mine = {"size": sim.size, "dtype": sim.dtype, "boxes": list(sim.boxes)}
        for name, value in mine.items():
            if told[name] != value:
                return f"{path} has {name} {told[name]!r}, expected {value!r}"
        if [at for at, _ in told["shards"]] != [at for at, _ in sim.shards]:
            return f"{path} has other shards on this rank"
        for (at, tensor), (_, item) in zip(sim.shards, told["shards"], strict=True):
            if not sim.wrong and (found := self._memory(sim, tensor, item, f"{path}'s shard {at}")):
                return found
        return ""

    def _memory(
        self, sim: Sim, tensor: torch.Tensor | None, told: dict[str, Any], path: str
    ) -> str:
        if tensor is None or sim.wrong:
            return ""
        mine: dict[str, Any] = {
            "dtype": rig._name(tensor.dtype),
            "size": tuple(tensor.shape),
            "device": tensor.device.type,
        }
        if "stride" not in sim.open:
            mine["stride"] = rig.strides(tensor)
        for name, value in mine.items():
            if told[name] != value:
                return f"{path} has {name} {told[name]!r}, expected {value!r}"
        if tensor.is_meta or not tensor.numel():
            return ""
        if "bits" not in sim.open and told["bits"] != (bits := rig.digest(tensor)):
            return f"{path} has the bits {told['bits']}, expected {bits}"
        if "shared" not in sim.open and told["shared"] != tensor.is_shared():
            return f"{path} {'is' if told['shared'] else 'is not'} in shared memory"
        if "memory" not in sim.open:
            storage = tensor.untyped_storage()
            self._kept.append(storage)
            if found := self._same("memory", storage.data_ptr(), told["memory"]):
                return f"{path} {found}"
        return ""

    def _same(self, what: str, mine: Any, theirs: Any) -> str:
        known = self._numbers.setdefault((what, mine), theirs)
        other = self._numbers.setdefault((what + " as told", theirs), mine)
        if known != theirs:
            shares = "is another object than" if what == "object" else "does not share memory with"
            return f"{shares} something that it is tied to"
        if other != mine:
            shares = "is the same object as" if what == "object" else "shares memory with"
            return f"{shares} something that it must be apart from"
        return ""


def _full(placements: tuple[str, ...]) -> tuple[str, ...]:
    return tuple("P-sum" if name == "P" else name for name in placements)


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a {value[0]}"
    if "object" in value:
        return f"a {value['kind']}"
    return f"{value['value'][:60]} (a {value['kind']})"
