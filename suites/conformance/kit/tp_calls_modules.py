"""Calls of the functions that walk modules, for `tp_roads`: one module holds every kind at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from conformance.kit.roads import Road
from conformance.kit.subclasses import assert_holds_pair
from conformance.kit.tensor_parallel import bag, fill
from conformance.kit.tp_calls import DDP, Roads, Trained, assert_local
from conformance.kit.tp_calls_data import trained
from conformance.kit.tp_kinds import Kind, Seat, dtensors, plain, wrapper


class Reader(nn.Module):
    """Its forward gives what it holds: the tensors, as it finds them."""

    def forward(self) -> dict[str, Any]:
        held: dict[str, Any] = dict(self.named_parameters(remove_duplicate=False))
        held |= self.named_buffers(remove_duplicate=False)
        for owner, module in self.named_modules():
            prefix = f"{owner}." if owner else ""
            held |= {prefix + n: t for n, t in module.__dict__.items() if isinstance(t, DTensor)}
        return held


def reader(**entries: Any) -> nn.Module:
    """A `Reader` that holds these."""
    return fill(Reader(), entries)


def _module(full: torch.Tensor, seat: Seat) -> tuple[Any, dict[str, Kind]]:
    """One that holds a tensor of each kind under its name, each tied to a second one; the kinds."""
    found = enumerate((*plain(full, seat), *dtensors(full, seat)))
    kinds = {f"w{number}": kind for number, kind in found}
    leaves = {name: kind.leaf for name, kind in kinds.items()}
    first, last = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    return reader(a=first, **leaves, child=bag(**leaves), z=last), kinds


def leaves(kinds: dict[str, Kind]) -> dict[str, torch.Tensor]:
    return {name: kind.leaf for name, kind in kinds.items()}


def assert_between(module: Any, kinds: dict[str, Kind], whole: torch.Tensor) -> None:
    """Between forwards the module holds local Parameters, tied and flagged as they were."""
    for name, kind in kinds.items():
        held, tied = getattr(module, name), getattr(module.child, name)
        assert_local(held, kind, whole, "between forwards")
        if kind.is_parameter:
            assert not isinstance(held, DTensor), f"{kind.name}: a DTensor between forwards"
            assert isinstance(held, nn.Parameter), f"{kind.name}: a {type(held).__name__}"
            assert held is tied, f"{kind.name}: untied"
            assert held.requires_grad is kind.leaf.requires_grad, f"{kind.name}: requires_grad"


def assert_inside(
    held: Any, kinds: dict[str, Kind], whole: torch.Tensor, *, tied: bool = True
) -> None:
    """What a forward, or a state dict, finds: DTensors where they were, under both names."""
    for name, kind in kinds.items():
        for path in (name, f"child.{name}"):
            sharded = kind.placements is not None
            assert isinstance(held[path], DTensor) is sharded, f"{kind.name}: {path} inside"
            assert_local(held[path], kind, whole, f"{path} inside")
            if sharded:
                assert held[path].placements == kind.placements, f"{kind.name}: {path} placed"
        if tied and kind.is_parameter:
            assert held[name] is held[f"child.{name}"], f"{kind.name}: untied inside"


def localize(full: torch.Tensor, seat: Seat) -> Roads:
    module, kinds = _module(full, seat)
    yield (
        "module",
        Road(
            lambda judged: judged(module),
            leaves(kinds),
            lambda _, whole: assert_between(module, kinds, whole),
        ),
    )
    if full.dtype is torch.float32:
        for trains in (None, False, True):
            yield f"wrapper, trains: {trains}", _wrapper(full, seat, trains)


def _wrapper(full: torch.Tensor, seat: Seat, trains: bool | None) -> Road:
    """A module that holds one as a buffer (None), or as a Parameter."""
    sharded: Any = wrapper(full, seat)
    held = sharded if trains is None else nn.Parameter(sharded, requires_grad=trains)
    owner: Any = bag(w=held)

    def check(_: Any, whole: torch.Tensor) -> None:
        assert_holds_pair(owner.w, type(sharded._local_tensor), whole)

    return Road(lambda judged: judged(owner), {}, check)


def reconstruct(full: torch.Tensor, seat: Seat) -> Roads:
    localize = seat.subject.function(DDP + "_localize_dtensor")
    module, kinds = _module(full, seat)
    localize(module)

    def check(_: Any, whole: torch.Tensor) -> None:
        held = {n: getattr(module, n) for n in kinds}
        inner = {f"child.{n}": getattr(module.child, n) for n in kinds}
        assert_inside(held | inner, kinds, whole)
        localize(module)
        assert_between(module, kinds, whole)

    yield "module", Road(lambda judged: judged(module, ()), leaves(kinds), check)


def transform(full: torch.Tensor, seat: Seat) -> Roads:
    module, kinds = _module(full, seat)

    def check(_: Any, whole: torch.Tensor) -> None:
        for _round in range(2):
            assert_between(module, kinds, whole)
            assert_inside(module(), kinds, whole)
        assert_between(module, kinds, whole)
        assert_inside(module.state_dict(), kinds, whole, tied=False)

    yield "module", Road(lambda judged: judged(module), leaves(kinds), check)


def update(full: torch.Tensor, seat: Seat) -> Roads:
    for kind in (*plain(full, seat), *dtensors(full, seat)):
        yield kind.name, _updated(kind)


def _updated(kind: Kind) -> Road:
    one = nn.Parameter(torch.ones(2))
    owner: Any = bag(a=nn.Parameter(torch.ones(2)), w=one, z=nn.Parameter(torch.ones(2)))

    def check(_: Any, whole: torch.Tensor) -> None:
        assert owner.w is kind.leaf, f"{kind.name}: another tensor"
        assert_local(owner.w, kind, whole, "replaced")

    return Road(lambda judged: judged([(owner, "w", kind.leaf)]), {"w": kind.leaf}, check)


def submodule(full: torch.Tensor, seat: Seat) -> Roads:
    for kind in (*plain(full, seat), *dtensors(full, seat)):
        if kind.is_parameter:
            yield kind.name, _found(kind)


def _found(kind: Kind) -> Road:
    owner = bag(w=kind.leaf)
    module = bag(child=bag(owner=owner))

    def check(got: Any, _: Any) -> None:
        assert got[0] is owner, f"{kind.name}: another owner"
        assert got[1] == "w", f"{kind.name}: {got[1]!r}"

    return Road(lambda judged: judged(module, "child.owner.w"), {"w": kind.leaf}, check)


def _through_module(full: torch.Tensor, seat: Seat, enter: Callable[[Any], Any]) -> Trained:
    kinds = {f"w{number}": kind for number, kind in enumerate(trained(full, seat))}
    module = reader(**leaves(kinds), child=bag(**leaves(kinds)))
    inside = enter(module)
    for name, kind in kinds.items():
        yield kind, getattr(module, name), inside[name]


def through_reconstruct(judged: Any, full: torch.Tensor, seat: Seat) -> Trained:
    localize = seat.subject.function(DDP + "_localize_dtensor")

    def enter(module: Any) -> Any:
        localize(module)
        judged(module, ())
        inside = module.forward()
        localize(module)
        return inside

    return _through_module(full, seat, enter)


def through_localize(judged: Any, full: torch.Tensor, seat: Seat) -> Trained:
    reconstruct = seat.subject.function(DDP + "_reconstruct_dtensor")

    def enter(module: Any) -> Any:
        judged(module)
        reconstruct(module, ())
        inside = module.forward()
        judged(module)
        return inside

    return _through_module(full, seat, enter)


def through_transform(judged: Any, full: torch.Tensor, seat: Seat) -> Trained:
    def enter(module: Any) -> Any:
        judged(module)
        return module()

    return _through_module(full, seat, enter)
