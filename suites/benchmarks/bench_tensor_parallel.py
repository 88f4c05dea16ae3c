"""Parameters between DTensor and the local tensors that DDP and FSDP1 want."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.base import Measured

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.rank_context import RankContext, Work

UTILS = "tensor.parallel._data_parallel_utils."
DDP = "tensor.parallel.ddp."


class FlattenTensor(Measured):
    """Local tensor and spec of each weight, which trains; floor: what a bare loop reads of it."""

    functions = (f"{UTILS}_flatten_tensor",)
    sizes = (2,)
    version = "2"

    def work(self, ctx: RankContext) -> Work:
        from benchmarks.rank_context import Work

        # Frozen ones would be no comparison: torch makes their local tensors train.
        flatten = ctx.function(self.functions[0])
        sharded = list(ctx.sharded().values())
        for tensor in sharded:
            tensor.requires_grad_()

        def check(got: list[Any]) -> None:
            for leaf, tensor, (mine, spec) in zip(ctx.leaves, sharded, got, strict=True):
                ctx.same(mine, ctx.mine(leaf), leaf.name)
                assert mine.requires_grad, f"{leaf.name}: does not train"
                assert spec == tensor._spec, f"{leaf.name}: {spec}"

        return Work(lambda: [flatten(t) for t in sharded], check)

    def floor(self, ctx: RankContext) -> Work:
        return ctx.each(list(ctx.sharded().values()), lambda t: (t._local_tensor, t._spec))


class UnflattenTensor(Measured):
    """Each local tensor becomes its DTensor; floor: the DTensor, made bare in a loop."""

    functions = (f"{UTILS}_unflatten_tensor",)
    sizes = (2,)

    def work(self, ctx: RankContext) -> Work:
        from benchmarks.rank_context import Work

        unflatten, sharded = ctx.function(self.functions[0]), list(ctx.sharded().values())
        pairs = [(t._local_tensor, t._spec) for t in sharded]

        def check(got: list[Any]) -> None:
            for leaf, tensor in zip(ctx.leaves, got, strict=True):
                ctx.is_sharded(tensor, leaf)

        return Work(lambda: [unflatten(t, spec) for t, spec in pairs], check)

    def floor(self, ctx: RankContext) -> Work:
        from torch.distributed.tensor import DTensor

        pairs = [(t._local_tensor, t._spec) for t in ctx.sharded().values()]
        return ctx.each(pairs, lambda p: DTensor(*p, requires_grad=False))


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

        from benchmarks.rank_context import Work

        group: Any = dist.group.WORLD
        grads = [ctx.full(leaf).to(ctx.device) for leaf in ctx.leaves]

        def check(got: list[Any]) -> None:
            for leaf, grad, done in zip(ctx.leaves, grads, got, strict=True):
                ctx.same(done, grad * ctx.size, leaf.name)

        return Work(lambda: [finish(all_reduce(g, "sum", group)) for g in grads], check)


def module(ctx: RankContext) -> Any:
    """A module of one submodule a leaf, each with a tensor-parallel weight."""
    from torch import nn

    root = nn.Module()
    for n, tensor in enumerate(ctx.sharded().values()):
        child = nn.Module()
        child.register_parameter("weight", nn.Parameter(tensor))
        root.add_module(f"layer{n}", child)
    return root


def are_local(ctx: RankContext, root: nn.Module) -> None:
    """Every weight is a plain local Parameter with this rank's part."""
    from torch import nn

    for leaf, child in zip(ctx.leaves, root.children(), strict=True):
        assert isinstance(child.weight, nn.Parameter), f"{leaf.name}: no Parameter"
        ctx.same(child.weight.detach(), ctx.mine(leaf), leaf.name)


class LocalizeDtensor(Measured):
    """Weights become local Parameters for the first time; floor: one setattr each.

    After a forward torch has nothing left to localize: it has lost the parameters.
    """

    functions = (f"{DDP}_localize_dtensor",)
    sizes: ClassVar[tuple[int, ...]] = (2,)

    def work(self, ctx: RankContext) -> Work:
        from benchmarks.rank_context import Work

        localize, root = ctx.function(self.functions[0]), module(ctx)

        def reset() -> None:
            nonlocal root
            root = module(ctx)

        def call() -> nn.Module:
            localize(root)
            return root

        return Work(call, lambda got: are_local(ctx, got), reset)

    def floor(self, ctx: RankContext) -> Work:
        return _swaps(ctx)


class ReconstructDtensor(Measured):
    """Local Parameters give way to DTensors, as before a forward; floor: one setattr each."""

    functions = (f"{DDP}_reconstruct_dtensor",)
    sizes: ClassVar[tuple[int, ...]] = (2,)

    def work(self, ctx: RankContext) -> Work:
        from benchmarks.rank_context import Work

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
            for leaf, child in zip(ctx.leaves, got.children(), strict=True):
                ctx.is_sharded(child.weight.detach(), leaf)

        return Work(call, check, reset)

    def floor(self, ctx: RankContext) -> Work:
        return _swaps(ctx)


def _swaps(ctx: RankContext) -> Work:
    from torch import nn

    root = module(ctx)
    weights: list[Any] = [(child, child.weight) for child in root.children()]
    weights = [(child, nn.Parameter(weight.to_local())) for child, weight in weights]

    def least(pair: Any) -> Any:
        child, weight = pair
        child.weight = weight
        return child

    return ctx.each(weights, least)


class UpdateModuleParam(Measured):
    """Weights found by path and replaced; floor: one setattr each."""

    functions = (f"{DDP}_update_module_param", f"{DDP}_get_submodule_n_params")
    sizes = (2,)

    def work(self, ctx: RankContext) -> Work:
        from torch import nn

        from benchmarks.rank_context import Work

        update, find = map(ctx.function, self.functions)
        root = module(ctx)
        locals_ = {name: p.to_local() for name, p in root.named_parameters()}
        fresh = {name: nn.Parameter(t) for name, t in locals_.items()}

        def call() -> nn.Module:
            update([(*find(root, name), param) for name, param in fresh.items()])
            return root

        def check(got: nn.Module) -> None:
            assert all(got.get_parameter(n) is p for n, p in fresh.items()), "not replaced"

        return Work(call, check)

    def floor(self, ctx: RankContext) -> Work:
        return _swaps(ctx)


class PreDpModuleTransform(Measured):
    """A tensor-parallel module made ready for DDP, once; floor: one setattr a weight."""

    functions = (f"{DDP}_pre_dp_module_transform",)
    sizes = (2,)

    def work(self, ctx: RankContext) -> Work:
        from benchmarks.rank_context import Work

        transform, root = ctx.function(self.functions[0]), module(ctx)

        def reset() -> None:
            nonlocal root
            root = module(ctx)

        def call() -> nn.Module:
            transform(root)
            return root

        return Work(call, lambda got: are_local(ctx, got), reset)

    def floor(self, ctx: RankContext) -> Work:
        return _swaps(ctx)
