"""Leaves that one rank holds otherwise than the others do.

A case is added here, and every gather is asked of it: name -> what most ranks hold, and the last.
`mesh` is the fixture; every rank makes every mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.distributed.tensor import DTensor, Partial

from conformance.kit.data import numbers
from conformance.kit.layouts import SS, R, S, dtensor, rows, sharded_tensor

FULL = (8, 8)


def pending(op: str, mesh: Any) -> DTensor:
    return dtensor(numbers(*FULL), mesh, [Partial(op)], local=numbers(*FULL, salt=1))


def sharded(*counts: int, dim: int = 0, owners: Any = None) -> Any:
    return sharded_tensor(numbers(*FULL), rows(FULL, counts, owners, dim))


ON_TWO: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "rows and columns": lambda mesh: (
        dtensor(numbers(*FULL), mesh(2), [S(0)]),
        dtensor(numbers(*FULL), mesh(2), [S(1)]),
    ),
    "rows and whole": lambda mesh: (
        dtensor(numbers(*FULL), mesh(2), [S(0)]),
        dtensor(numbers(*FULL), mesh(2), [R]),
    ),
    "whole and rows": lambda mesh: (
        dtensor(numbers(*FULL), mesh(2), [R]),
        dtensor(numbers(*FULL), mesh(2), [S(0)]),
    ),
    "rows and rows in turn": lambda mesh: (
        dtensor(numbers(*FULL), mesh(2), [S(0)]),
        dtensor(numbers(*FULL), mesh(2), [SS(0, 2)]),
    ),
    "split by two and by four": lambda mesh: (
        dtensor(numbers(*FULL), mesh(2), [SS(0, 2)]),
        dtensor(numbers(*FULL), mesh(2), [SS(0, 4)]),
    ),
    "sum and maximum": lambda mesh: (pending("sum", mesh(2)), pending("max", mesh(2))),
    "sum and average": lambda mesh: (pending("sum", mesh(2)), pending("avg", mesh(2))),
    "pending and whole": lambda mesh: (
        pending("sum", mesh(2)),
        dtensor(numbers(*FULL), mesh(2), [R]),
    ),
    "pending and columns": lambda mesh: (
        pending("sum", mesh(2)),
        dtensor(numbers(*FULL), mesh(2), [S(1)]),
    ),
    "DTensor and plain": lambda mesh: (dtensor(numbers(*FULL), mesh(2), [S(0)]), numbers(*FULL)),
    "DTensor and plain part": lambda mesh: (
        dtensor(numbers(*FULL), mesh(2), [S(0)]),
        numbers(4, 8),
    ),
    "plain and DTensor": lambda mesh: (numbers(4, 8), dtensor(numbers(*FULL), mesh(2), [S(0)])),
    "DTensor and None": lambda mesh: (dtensor(numbers(*FULL), mesh(2), [S(0)]), None),
    "DTensor and containers": lambda mesh: (
        dtensor(numbers(*FULL), mesh(2), [S(0)]),
        {"inner": dtensor(numbers(*FULL), mesh(2), [S(0)])},
    ),
    "DTensor and ShardedTensor": lambda mesh: (
        dtensor(numbers(*FULL), mesh(2), [S(0)]),
        sharded(4, 4),
    ),
    "ShardedTensor and DTensor": lambda mesh: (
        sharded(4, 4),
        dtensor(numbers(*FULL), mesh(2), [S(0)]),
    ),
    "ShardedTensor and plain": lambda _: (sharded(4, 4), numbers(4, 8)),
    "shards by row and by column": lambda _: (sharded(4, 4), sharded(4, 4, dim=1)),
    "shards of other owners": lambda _: (sharded(4, 4), sharded(4, 4, owners=[1, 0])),
    "shards of other sizes": lambda _: (sharded(4, 4), sharded(3, 5)),
}
ON_FOUR: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "rows and grid": lambda mesh: (
        dtensor(numbers(*FULL), mesh(4), [S(0)]),
        dtensor(numbers(*FULL), mesh(2, 2), [S(0), S(1)]),
    ),
    "grid and turned grid": lambda mesh: (
        dtensor(numbers(*FULL), mesh(2, 2), [S(0), S(1)]),
        dtensor(numbers(*FULL), mesh(2, 2), [S(1), S(0)]),
    ),
    "grid and long grid": lambda mesh: (
        dtensor(numbers(*FULL), mesh(2, 2), [S(0), S(0)]),
        dtensor(numbers(*FULL), mesh(4, 1), [S(0), S(0)]),
    ),
    "FSDP over TP and the other way round": lambda mesh: (
        dtensor(numbers(*FULL), mesh(2, 2), [SS(0, 2), S(0)]),
        dtensor(numbers(*FULL), mesh(2, 2), [S(0), S(0)]),
    ),
    "half and quarter": lambda mesh: (
        dtensor(numbers(*FULL), mesh(2, 2), [R, S(0)]),
        dtensor(numbers(*FULL), mesh(4), [S(0)]),
    ),
    "all and some": lambda mesh: (
        dtensor(numbers(*FULL), mesh(4), [S(0)]),
        dtensor(numbers(*FULL), mesh(2, ranks=[0, 3]), [S(0)]),
    ),
    "some and all": lambda mesh: (
        dtensor(numbers(*FULL), mesh(2, ranks=[0, 3]), [S(0)]),
        dtensor(numbers(*FULL), mesh(4), [S(0)]),
    ),
    "grid of ranks in another order": lambda mesh: (
        dtensor(numbers(*FULL), mesh(2, 2), [S(0), R]),
        dtensor(numbers(*FULL), mesh(2, 2, ranks=[0, 2, 1, 3]), [S(0), R]),
    ),
    "some and others": lambda mesh: (
        dtensor(numbers(*FULL), mesh(2, ranks=[2, 3]), [S(0)]),
        dtensor(numbers(*FULL), mesh(2, ranks=[1, 3]), [S(0)]),
    ),
}
TURNED: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "ranks in another order": lambda mesh: (
        dtensor(numbers(*FULL), mesh(2), [S(0)]),
        dtensor(numbers(*FULL), mesh(2, ranks=[1, 0]), [S(0)]),
    ),
}
