"""Parameters between DTensor and the local tensors that DDP and FSDP1 want."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.base import Measured
from benchmarks.work import Work

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.rank_context import RankContext
    from benchmarks.settings import Leaf

UTILS = "tensor.parallel._data_parallel_utils."
DDP = "tensor.parallel.ddp."


class FlattenTensor(Measured):
    """Local tensor and spec of each weight, which trains; floor: what a bare loop reads of it."""

    functions = (f"{UTILS}_flatten_tensor",)
    sizes = (2,)
    version = "2"

    def work(self, ctx: RankContext) -> Work:
        # Frozen ones would be no comparison: torch makes their local tensors train.
        flatten = ctx.function(self.functions[0])
        sharded: list[Any] = [tensor.requires_grad_() for tensor in ctx.sharded().values()]

        def check(got: list[Any]) -> None:
            for leaf, tensor, (mine, spec) in zip(ctx.leaves, sharded, got, strict=True):
                ctx.same(mine, ctx.mine(leaf), leaf.name)
                assert mine.requires_grad, f"{leaf.name}: does not train"
                assert spec == tensor._spec, f"{leaf.name}: {spec}"

        return Work(lambda: [flatten(t) for t in sharded], check)

    def floor(self, ctx: RankContext) -> Work:
        return ctx.each(list(ctx.sharded().values()), lambda t: (t._local_tensor, t._spec))


def bare_dtensors(ctx: RankContext) -> Work:
    """Floor: of each weight the DTensor, made bare in a loop."""
    from torch.distributed.tensor import DTensor

    pairs = [(t._local_tensor, t._spec) for t in ctx.sharded().values()]
    return ctx.each(pairs, lambda p: DTensor(*p, requires_grad=False))


class UnflattenTensor(Measured):
    """Each local tensor becomes its DTensor; floor: the DTensor, made bare in a loop."""

    functions = (f"{UTILS}_unflatten_tensor",)
    sizes = (2,)

    def work(self, ctx: RankContext) -> Work:
        unflatten, sharded = ctx.function(self.functions[0]), list(ctx.sharded().values())
        pairs = [(t._local_tensor, t._spec) for t in sharded]

        return Work(lambda: [unflatten(t, spec) for t, spec in pairs], ctx.of_each(ctx.is_sharded))

    def floor(self, ctx: RankContext) -> Work:
        return bare_dtensors(ctx)


class SyncGradHook(Measured):
    """Pending gradients come back finished; floor: the same all-reduces, waited for bare."""

    functions = (f"{UTILS}sync_grad_hook",)
    sizes = (2,)

    def work(self, ctx: RankContext) -> Work:
        return self._finished(ctx, ctx.function(self.functions[0]))

    def floor(self, ctx: RankContext) -> Work:
        return self._finished(ctx, lambda pending: pending.wait())

    def _finished(self, ctx: RankContext, finish: Any) -> Work:
        import torch.distributed as dist
        from torch.distributed._functional_collectives import all_reduce

        group: Any = dist.group.WORLD
        grads = ctx.whole().values()

        def check(got: Any, leaf: Leaf) -> None:
            ctx.same(got, ctx.full(leaf) * ctx.size, leaf.name)

        return Work(
            lambda: [finish(all_reduce(g, "sum", group)) for g in grads], ctx.of_each(check)
        )


def module(ctx: RankContext) -> Any:
    """A module of one submodule a leaf, each with a tensor-parallel weight."""
    from torch import nn

    root = nn.Module()
    for n, tensor in enumerate(ctx.sharded().values()):
        child = nn.Module()
        child.register_parameter("weight", nn.Parameter(tensor))
        root.add_module(f"layer{n}", child)
    return root


class Swapped(Measured):
    """What these have in common: one module a weight, and its parameter is set."""

    sizes: ClassVar[tuple[int, ...]] = (2,)

    def floor(self, ctx: RankContext) -> Work:
        """One setattr a weight."""
        from torch import nn

        children: list[Any] = list(module(ctx).children())
        fresh = [(child, nn.Parameter(child.weight.to_local())) for child in children]

        def least(pair: Any) -> Any:
            child, weight = pair
            child.weight = weight
            return child

        return ctx.each(fresh, least)


class LocalizeDtensor(Swapped):
    """Weights become local Parameters for the first time; floor: one setattr each.

    After a forward torch has nothing left to localize: it has lost the parameters.
    """

    functions = (f"{DDP}_localize_dtensor",)

    def work(self, ctx: RankContext) -> Work:
        from torch import nn

        localize, root = ctx.function(self.functions[0]), module(ctx)

        def reset() -> None:
            nonlocal root
            root = module(ctx)

        def call() -> nn.Module:
            localize(root)
            return root

        def check(got: nn.Module) -> None:
            for leaf, child in zip(ctx.leaves, got.children(), strict=True):
                assert isinstance(child.weight, nn.Parameter), f"{leaf.name}: no Parameter"
                ctx.same(child.weight.detach(), ctx.mine(leaf), leaf.name)

        return Work(call, check, reset)


class ReconstructDtensor(Swapped):
    """Local Parameters give way to DTensors, as before a forward; floor: one setattr each."""

    functions = (f"{DDP}_reconstruct_dtensor",)

    def work(self, ctx: RankContext) -> Work:
        reconstruct, root = ctx.function(self.functions[0]), module(ctx)
        localize = ctx.function(f"{DDP}_localize_dtensor")

        def reset() -> None:
            nonlocal root
            root = module(ctx)
            localize(root)

        def call() -> nn.Module:
            reconstruct(root, ())
            return root

        def check(got: Any) -> None:
            ctx.of_each(ctx.is_sharded)([child.weight.detach() for child in got.children()])

        return Work(call, check, reset)


class UpdateModuleParam(Swapped):
    """Weights found by path and replaced; floor: one setattr each."""

    functions = (f"{DDP}_update_module_param", f"{DDP}_get_submodule_n_params")

    def work(self, ctx: RankContext) -> Work:
        from torch import nn

        update, find = map(ctx.function, self.functions)
        root = module(ctx)
        fresh = {name: nn.Parameter(p.to_local()) for name, p in root.named_parameters()}

        def call() -> nn.Module:
            update([(*find(root, name), param) for name, param in fresh.items()])
            return root

        def check(got: nn.Module) -> None:
            assert all(got.get_parameter(n) is p for n, p in fresh.items()), "not replaced"

        return Work(call, check)


class PreDpModuleTransform(LocalizeDtensor):
    """A tensor-parallel module made ready for DDP, once; floor: one setattr a weight."""

    functions = (f"{DDP}_pre_dp_module_transform",)
