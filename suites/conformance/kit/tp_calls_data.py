"""Calls of the functions between a DTensor and its local tensor, for `tp_roads`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from conformance.kit.compare import assert_same, local
from conformance.kit.layouts import R
from conformance.kit.roads import Road
from conformance.kit.tp_calls import CPU, Roads, Trained, assert_local, each
from conformance.kit.tp_kinds import Kind, Seat, cut, dtensors, laid, plain


def sync_grad_hook(full: torch.Tensor, seat: Seat) -> Roads:
    def road(grad: Any) -> Road:
        return Road(
            lambda judged: judged(grad),
            {"grad": grad},
            lambda got, whole: assert_same(local(got).detach(), whole),
        )

    yield "plain", road(cut(full, seat.line(), None))
    yield "DTensor", road(laid(full, seat.line(), [R]))
    pending: Any = AsyncCollectiveTensor(cut(full, seat.line(), None))
    yield "pending", Road(lambda judged: judged(pending), {"grad": pending.elem}, assert_same)


def flatten_tensor(full: torch.Tensor, seat: Seat) -> Roads:
    def check(got: Any, whole: torch.Tensor, kind: Kind) -> None:
        assert_local(got[0], kind, whole, "the tensor")
        spec = kind.leaf._spec if isinstance(kind.leaf, DTensor) else None
        assert got[1] is spec, f"{kind.name}: another spec"

    kinds = (*plain(full, seat), *dtensors(full, seat))
    return each(kinds, lambda judged, kind: judged(kind.leaf), check)


def unflatten_tensor(full: torch.Tensor, seat: Seat) -> Roads:
    for kind in dtensors(full, seat):
        piece = kind.local(full).requires_grad_(kind.leaf.requires_grad)
        if kind.is_parameter:
            piece = nn.Parameter(piece, requires_grad=piece.requires_grad)
        yield kind.name, _unflattened(kind, piece)


def _unflattened(kind: Kind, piece: torch.Tensor) -> Road:
    def check(got: Any, whole: torch.Tensor) -> None:
        assert got.placements == kind.placements, f"{kind.name}: {got.placements}"
        assert_local(got, kind, whole, "the DTensor")

    return Road(lambda judged: judged(piece, kind.spec), {"local": piece}, check)


def extensions(full: torch.Tensor, seat: Seat) -> Roads:
    def call(judged: Any, kind: Kind) -> Any:
        made = judged(CPU)
        flattened, extension = made.pre_flatten_transform(kind.leaf)
        if extension is None:
            return flattened, flattened
        return flattened, made.post_unflatten_transform(flattened, extension)

    def check(got: Any, whole: torch.Tensor, kind: Kind) -> None:
        assert_local(got[0], kind, whole, "flattened")
        if kind.is_parameter:
            assert isinstance(got[0], nn.Parameter), f"{kind.name}: a {type(got[0]).__name__}"
            assert got[0].requires_grad is kind.leaf.requires_grad, f"{kind.name}: requires_grad"
        assert_local(got[1], kind, whole, "unflattened")

    return each((*plain(full, seat), *dtensors(full, seat)), call, check)


def trained(full: torch.Tensor, seat: Seat) -> Iterator[Kind]:
    """The Parameters that are DTensors, all of which train."""
    for kind in dtensors(full, seat, partial=False):
        if kind.is_parameter:
            kind.leaf.requires_grad_()
            yield kind


def through_unflatten(judged: Any, full: torch.Tensor, seat: Seat) -> Trained:
    for kind in trained(full, seat):
        piece = nn.Parameter(kind.local(full))
        yield kind, piece, judged(piece, kind.spec)


def through_extensions(judged: Any, full: torch.Tensor, seat: Seat) -> Trained:
    made = judged(CPU)
    for kind in trained(full, seat):
        piece, extension = made.pre_flatten_transform(kind.leaf)
        yield kind, piece, made.post_unflatten_transform(piece, extension)
