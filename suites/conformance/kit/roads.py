"""One small call of each function that moves tensors, with what must come of it.

For checks that ask the same of all of them. A `Road` is made anew for each call; every rank makes
the same. Over a world of any size, on a mesh of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from conformance.kit.compare import assert_same, local
from conformance.kit.layouts import R, S, dtensor, part, rows, sharded_tensor


@dataclass
class Road:
    """A call and its outcome.

    Attributes:
        call: takes the function under test, returns what it returns.
        inputs: what the caller hands in and the call may only read.
        check: takes what the call returned, and what should be whole there; raises where values are
            wrong.

    """

    call: Callable[[Any], Any]
    inputs: dict[str, Any]
    check: Callable[[Any, torch.Tensor], None]


Make = Callable[[torch.Tensor, Any, Any], Road]
"""(a tensor with at least one dimension, the mesh of all ranks, this rank's world) -> a road."""


def _count(world: Any, full: torch.Tensor) -> list[int]:
    even, more = divmod(len(full), world.size)
    return [even + (rank < more) for rank in range(world.size)]


def _again(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that is lazily conjugated or negated where the tensor is: clone() carries that out."""
    if tensor.is_conj():
        return _again(tensor.conj()).conj()
    if tensor.is_neg():
        return torch._neg_view(_again(torch._neg_view(tensor)))
    return tensor.clone()


def _rows(full: torch.Tensor, mesh: Any) -> Any:
    return dtensor(full, mesh, [S(0)], local=_again(part(full, mesh, [S(0)])))


def _spread(full: torch.Tensor) -> torch.Tensor:
    """The same values in every second place of memory."""
    room = torch.empty(*full.shape, 2, dtype=full.dtype, device=full.device)
    return room[..., 0].copy_(full)


def _gather(full: torch.Tensor, mesh: Any, world: Any) -> Road:
    value = {
        "rows": _rows(full, mesh),
        "last": dtensor(full, mesh, [S(full.dim() - 1)]),
        "whole": dtensor(full, mesh, [R]),
        "plain": _again(full),
        "st": sharded_tensor(full, rows(full.shape, _count(world, full))),
        "wide": dtensor(full, mesh, [S(0)], local=_spread(part(full, mesh, [S(0)]))),
        **{f"many{n}": dtensor(full, mesh, [S(0)]) for n in range(6)},
    }

    def check(got: Any, whole: torch.Tensor) -> None:
        for key in value:
            assert_same(got[key], whole, key)

    return Road(lambda judged: judged(value), value, check)


def _gather_to_the_cpu(full: torch.Tensor, mesh: Any, world: Any) -> Road:
    road = _gather(full, mesh, world)

    def check(got: Any, whole: torch.Tensor) -> None:
        away = [key for key, tensor in got.items() if tensor.device.type != "cpu"]
        assert not away, f"{away} are not on the CPU"
        road.check(got, whole)

    return Road(lambda judged: judged(road.inputs, cpu_offload=True), road.inputs, check)


def _gather_to_the_last(full: torch.Tensor, mesh: Any, world: Any) -> Road:
    road = _gather(full, mesh, world)
    last = world.size - 1

    def check(got: Any, whole: torch.Tensor) -> None:
        if world.rank == last:
            road.check(got, whole)
        else:
            assert got == {}, f"rank {world.rank} got {list(got)}"

    return Road(lambda judged: judged(road.inputs, ranks_only=(last,)), road.inputs, check)


def _all_gather_sharded_tensor(full: torch.Tensor, mesh: Any, world: Any) -> Road:
    tensor = sharded_tensor(full, rows(full.shape, _count(world, full)))
    return Road(lambda judged: judged(tensor), {"st": tensor}, assert_same)


def _places(full: torch.Tensor, mesh: Any) -> dict[str, Any]:
    return {
        "rows": dtensor(torch.zeros_like(full), mesh, [S(0)]),
        "last": dtensor(torch.zeros_like(full), mesh, [S(full.dim() - 1)]),
        "whole": dtensor(torch.zeros_like(full), mesh, [R]),
        "plain": torch.zeros_like(full),
        "meta": dtensor(full.to("meta"), mesh, [S(0)]),
        "wide": dtensor(
            full, mesh, [S(0)], local=_spread(torch.zeros_like(part(full, mesh, [S(0)])))
        ),
        **{f"many{n}": dtensor(torch.zeros_like(full), mesh, [S(0)]) for n in range(9)},
        **{f"plain{n}": torch.zeros_like(full) for n in range(9)},
    }


def _check_landed(into: dict[str, Any], full: torch.Tensor, mesh: Any) -> None:
    for key, got in into.items():
        placement = R if key == "whole" or key.startswith("plain") else S(0)
        if key == "last":
            placement = S(full.dim() - 1)
        assert_same(local(got), part(full, mesh, [placement]), key)


def _broadcast(full: torch.Tensor, mesh: Any, world: Any) -> Road:
    into = _places(full, mesh)
    source = {key: _again(full) for key in into} if world.rank == 0 else {}
    return Road(
        lambda judged: judged(source, into, full.device),
        source,
        lambda _, whole: _check_landed(into, whole, mesh),
    )


def _distribute(full: torch.Tensor, mesh: Any, world: Any) -> Road:
    into = _places(full, mesh)
    source = {key: _again(full) for key in into}
    return Road(
        lambda judged: judged(source, into, full.device),
        source,
        lambda _, whole: _check_landed(into, whole, mesh),
    )


def _leaves(full: torch.Tensor, mesh: Any) -> dict[str, Any]:
    return {
        "rows": _rows(full, mesh),
        "wide": _spread(full),
        "plain": [_again(full), {"t": _again(full).t() if full.dim() == 2 else _again(full)}],
        **{f"many{n}": _again(full) for n in range(6)},
    }


def _check_leaves(got: Any, full: torch.Tensor, mesh: Any) -> None:
    assert_same(local(got["rows"]), part(full, mesh, [S(0)]), "rows")
    assert_same(got["wide"], full, "wide")
    assert_same(got["plain"][0], full, "plain")
    assert_same(got["plain"][1]["t"], full.t() if full.dim() == 2 else full, "t")
    for n in range(6):
        assert_same(got[f"many{n}"], full, f"many{n}")


def _offload(full: torch.Tensor, mesh: Any, world: Any) -> Road:
    value = _leaves(full, mesh)
    return Road(
        lambda judged: judged(value), value, lambda got, whole: _check_leaves(got, whole, mesh)
    )


def _copy(full: torch.Tensor, mesh: Any, world: Any) -> Road:
    value, into = _leaves(full, mesh), _leaves(torch.zeros_like(full), mesh)
    return Road(
        lambda judged: judged(value, into), value, lambda _, whole: _check_leaves(into, whole, mesh)
    )


def _iterate(full: torch.Tensor, mesh: Any, world: Any) -> Road:
    value = _leaves(full, mesh)
    functions = [lambda tensor, *_: tensor] * 3
    return Road(
        lambda judged: judged(value, *functions, cpu_offload=True),
        value,
        lambda got, whole: _check_leaves(got, whole, mesh),
    )


GATHER: dict[str, Make] = {
    "to all": _gather,
    "to the CPU": _gather_to_the_cpu,
    "to the last rank": _gather_to_the_last,
}
ROADS: dict[str, dict[str, Make]] = {
    "_gather_state_dict": GATHER,
    "_all_gather_sharded_tensor": {"": _all_gather_sharded_tensor},
    "_broadcast_state_dict": {"": _broadcast},
    "_distribute_state_dict": {"": _distribute},
    "_offload_state_dict_to_cpu": {"": _offload},
    "_copy_state_dict": {"": _copy},
    "_iterate_state_dict": {"": _iterate},
}
"""Function -> its roads by name."""
