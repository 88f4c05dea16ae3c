"""Whole tensors land in sharded ones: from rank 0, or from every rank's own copy."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.base import Measured
from benchmarks.work import Work

if TYPE_CHECKING:
    import torch

    from benchmarks.rank_context import RankContext


def _lands(ctx: RankContext, path: str, full: dict[str, Any]) -> Work:
    """Values of `full`, through that function, in the sharded state dict of this rank."""
    load, local = ctx.function(path), ctx.sharded()

    def call() -> dict[str, Any]:
        landed: dict[str, Any] = dict(local)  # torch replaces targets by views of `full`
        load(full.copy(), landed, ctx.device)
        return landed

    return Work(call, ctx.are_sharded, lambda: _blank(ctx, local))


def _blank(ctx: RankContext, local: dict[str, Any]) -> None:
    ctx.blank(tensor._local_tensor for tensor in local.values())


def _from_first(ctx: RankContext) -> Work:
    """Floor: one scatter of what each rank must hold, one broadcast of what all must."""
    same = sum(leaf.nbytes for leaf in ctx.leaves if leaf.parts(ctx.size) == 1)
    return ctx.scatters(ctx.held - same, same)


class BroadcastStateDict(Measured):
    """Rank 0's whole state dict lands in every rank's sharded one; floor: scatter, broadcast."""

    functions = ("_state_dict_utils._broadcast_state_dict",)
    regimes: ClassVar[tuple[str, ...]] = ("many", "model", "large", "mixed")
    sizes: ClassVar[tuple[int, ...]] = (2, 4, 8)

    def work(self, ctx: RankContext) -> Work:
        work = _lands(ctx, self.functions[0], ctx.whole() if ctx.rank == 0 else {})
        if ctx.fake:
            work.check = _shapes(ctx)
        return work

    def floor(self, ctx: RankContext) -> Work:
        return _from_first(ctx)


class BroadcastWholeStateDict(Measured):
    """Rank 0's whole state dict lands in plain targets on meta; floor: one broadcast."""

    functions = ("_state_dict_utils._broadcast_state_dict",)
    regimes: ClassVar[tuple[str, ...]] = ("many", "large")
    sizes: ClassVar[tuple[int, ...]] = (2, 4)

    def work(self, ctx: RankContext) -> Work:
        broadcast = ctx.function(self.functions[0])
        full: dict[str, Any] = dict(ctx.whole()) if ctx.rank == 0 else {}
        targets = {name: tensor.to("meta") for name, tensor in ctx.whole().items()}

        def call() -> dict[str, Any]:
            landed: dict[str, Any] = dict(targets)
            broadcast(full.copy(), landed, ctx.device)
            return landed

        return Work(call, ctx.are_whole)

    def floor(self, ctx: RankContext) -> Work:
        return ctx.broadcasts(ctx.total)


class BroadcastTensors(Measured):
    """The tensors of named keys land in the sharded targets; floor: scatter, broadcast."""

    functions = ("_state_dict_utils._broadcast_tensors", "_state_dict_utils._TensorInfo")
    regimes = ("model",)
    sizes = (4,)

    def work(self, ctx: RankContext) -> Work:
        import torch

        broadcast, info = map(ctx.function, self.functions)
        local, keys = ctx.sharded(), [leaf.name for leaf in ctx.leaves]
        full: dict[str, Any] = dict(ctx.whole()) if ctx.rank == 0 else {}

        def call() -> dict[str, Any]:
            told = full or {
                leaf.name: info(torch.Size(leaf.shape), getattr(torch, leaf.dtype))
                for leaf in ctx.leaves
            }
            landed: dict[str, Any] = dict(local)
            broadcast(told, landed, list(keys), ctx.device)
            return landed

        return Work(call, ctx.are_sharded, lambda: _blank(ctx, local))

    def floor(self, ctx: RankContext) -> Work:
        return _from_first(ctx)


class DistributeStateDict(Measured):
    """Every rank cuts its part out of its own whole state dict; floor: one copy of the part."""

    functions = ("_state_dict_utils._distribute_state_dict",)
    regimes: ClassVar[tuple[str, ...]] = ("many", "model", "large")
    sizes: ClassVar[tuple[int, ...]] = (2, 4)
    varies: ClassVar[dict[tuple[str, str], str]] = {
        ("model", "peak"): "from 21.9 to 24.4 MiB on four ranks; what it waits for ends when it may"
    }

    def work(self, ctx: RankContext) -> Work:
        return _lands(ctx, self.functions[0], ctx.whole())

    def floor(self, ctx: RankContext) -> Work:
        return _on_device(ctx)


class DistributeTensors(Measured):
    """The tensors of named keys, whole on every rank, are cut; floor: one copy of the part."""

    functions = ("_state_dict_utils._distribute_tensors",)
    regimes = ("model",)
    sizes = (4,)

    def work(self, ctx: RankContext) -> Work:
        distribute, full, local = ctx.function(self.functions[0]), ctx.whole(), ctx.sharded()
        keys = list(local)

        def call() -> dict[str, Any]:
            pairs: dict[str, Any] = {name: (local[name], full[name]) for name in keys}
            distribute(pairs, keys, ctx.device)
            return pairs

        return Work(call, ctx.are_sharded, lambda: _blank(ctx, local))

    def floor(self, ctx: RankContext) -> Work:
        return _on_device(ctx)


def _on_device(ctx: RankContext) -> Work:
    """Floor: one copy of what this rank holds, within its device, into memory that is there."""
    source = ctx.pattern(ctx.held)
    target = source.clone()
    check = partial(ctx.same, expected=source, what="the copy")
    return Work(lambda: target.copy_(source), check, target.zero_)


def _shapes(ctx: RankContext) -> Any:
    """In a fake world nothing arrives: all that can be held to the layout is the shapes."""

    def check(got: dict[str, Any]) -> None:
        shapes: dict[str, torch.Size] = {k: v._local_tensor.shape for k, v in got.items()}
        assert shapes == {leaf.name: ctx.mine(leaf).shape for leaf in ctx.leaves}, "shapes differ"

    return check
