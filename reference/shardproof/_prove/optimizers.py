"""The optimizers of a job, and what lies beside their state in wrappers and attributes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from shardproof._prove.reach import reach

_IN_STATE_DICTS = ("param_groups", "state", "defaults")


class Optimizers(list[torch.optim.Optimizer]):
    """The optimizers that torch's functions take, and the objects that wrap them."""

    def __init__(self, asked: Any = None) -> None:
        super().__init__()
        self.wrappers: list[Any] = []
        self._add(asked)

    def reached(self) -> Iterator[tuple[str, Any]]:
        """(path, thing) of all that they lead to."""
        seen: set[int] = set()
        for holder in [*self, *self.wrappers]:
            objects = 1 if isinstance(holder, torch.optim.Optimizer) else 0
            for key, value in vars(holder).items():
                yield from reach(value, key, self._ids(), seen, objects=objects)

    def attributes(self) -> Iterator[tuple[str, torch.Tensor, bool]]:
        """(label, tensor, whether it is state of an inner optimizer) of what no state dict has."""
        known = {id(tensor) for tensor in self._saved()}
        seen: set[int] = set()
        for number, holder in enumerate([*self, *self.wrappers]):
            which = type(holder).__name__ + (f" {number}" if len(self) > 1 else "")
            objects = 1 if isinstance(holder, torch.optim.Optimizer) else 0
            inner: set[int] = set()
            for key, value in vars(holder).items():
                if key in _IN_STATE_DICTS:
                    continue
                for path, thing in reach(value, key, self._ids(), seen, objects=objects):
                    if isinstance(thing, torch.optim.Optimizer):
                        inner |= {id(t) for _, t in reach(thing.state, "")}
                    elif isinstance(thing, torch.Tensor) and id(thing) not in known:
                        yield f"{path} of {which}", thing, id(thing) in inner
        for number, optimizer in enumerate(self):
            which = type(optimizer).__name__ + (f" {number}" if len(self) > 1 else "")
            for key, value in optimizer.state.items():
                if not isinstance(key, torch.Tensor):
                    for path, thing in reach(value, f"state[{key!r}]"):
                        if isinstance(thing, torch.Tensor):
                            yield f"{path} of {which}", thing, False

    def _saved(self) -> Iterator[torch.Tensor]:
        for optimizer in self:
            for group in optimizer.param_groups:
                yield from group["params"]
                yield from (value for value in group.values() if isinstance(value, torch.Tensor))
            for _, thing in reach(optimizer.state, ""):
                if isinstance(thing, torch.Tensor):
                    yield thing

    def _ids(self) -> frozenset[int]:
        return frozenset(map(id, self))

    def _add(self, asked: Any) -> None:
        if asked is None:
            return
        inner = getattr(asked, "optimizers", None)
        if isinstance(inner, Sequence) and inner:
            self.wrappers.append(asked)
            for one in inner:
                self._add(one)
            return
        wrapped = getattr(asked, "optimizer", None)
        if isinstance(wrapped, torch.optim.Optimizer):
            self.wrappers.append(asked)
            asked = wrapped
        if isinstance(asked, torch.optim.Optimizer):
            if all(one is not asked for one in self):
                self.append(asked)
        elif isinstance(asked, Sequence) and not isinstance(asked, str):
            for one in asked:
                self._add(one)
        else:
            raise TypeError(
                f"prove takes an optimizer, a sequence of them, or None: got {type(asked).__name__}"
            )
