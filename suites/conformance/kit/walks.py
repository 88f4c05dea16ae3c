"""Leaves for the walk over a state dict, and functions that change nothing."""

from __future__ import annotations

from typing import Any

from conformance.kit.data import numbers
from conformance.kit.layouts import S, dtensor, rows, sharded_tensor


class Opaque:
    """A value that no checkpoint can hold."""

    def __init__(self, inside: Any = 1) -> None:
        self.inside = inside


def same(tensor: Any, pg: Any, device: Any, companion: Any) -> Any:
    """A function for each kind that changes nothing."""
    return tensor


SAME = (same, same, same)


def three_kinds(mesh: Any, size: int, salt: int = 0) -> dict[str, Any]:
    """A tensor of each kind over all ranks."""
    full = numbers(5, 2, salt=salt)
    return {
        "dtensor": dtensor(full, mesh(size), [S(0)]),
        "sharded": sharded_tensor(full, rows(full.shape, [2, 3], [size - 1, 0])),
        "tensor": numbers(3, salt=salt),
    }
