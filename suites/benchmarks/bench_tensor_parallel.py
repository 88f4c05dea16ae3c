"""Parameters between DTensor and the local tensors that DDP and FSDP1 want."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.measured import Measured

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.bed import Bed, Work

UTILS = "tensor.parallel._data_parallel_utils."
DDP = "tensor.parallel.ddp."


class FlattenTensor(Measured):
    """Local tensor and spec of each weight, which trains; floor: what a bare loop reads of it."""

    functions = (f"{UTILS}_flatten_tensor",)
    sizes = (2,)
    version = "2"

    def work(self, bed: Bed) -> Work:
        from benchmarks.bed import Work

        # Frozen ones would be no comparison: torch makes their local tensors train.
        flatten = bed.function(self.functions[0])
        sharded = list(bed.sharded().values())
        for tensor in sharded:
            tensor.requires_grad_()

        def check(got: list[Any]) -> None:
            for leaf, tensor, (mine, spec) in zip(bed.leaves, sharded, got, strict=True):
                bed.same(mine, bed.mine(leaf), leaf.name)
                assert mine.requires_grad, f"{leaf.name}: does not train"
                assert spec == tensor._spec, f"{leaf.name}: {spec}"

        return Work(lambda: [flatten(t) for t in sharded], check)

    def floor(self, bed: Bed) -> Work:
        return bed.each(list(bed.sharded().values()), lambda t: (t._local_tensor, t._spec))


class UnflattenTensor(Measured):
    """Each local tensor becomes its DTensor; floor: the DTensor, made bare in a loop."""

    functions = (f"{UTILS}_unflatten_tensor",)
    sizes = (2,)

    def work(self, bed: Bed) -> Work:
        from benchmarks.bed import Work

        unflatten, sharded = bed.function(self.functions[0]), list(bed.sharded().values())
        pairs = [(t._local_tensor, t._spec) for t in sharded]

        def check(got: list[Any]) -> None:
            for leaf, tensor in zip(bed.leaves, got, strict=True):
                bed.is_sharded(tensor, leaf)

        return Work(lambda: [unflatten(t, spec) for t, spec in pairs], check)

    def floor(self, bed: Bed) -> Work:
        from torch.distributed.tensor import DTensor

        pairs = [(t._local_tensor, t._spec) for t in bed.sharded().values()]
        return bed.each(pairs, lambda p: DTensor(*p, requires_grad=False))


class SyncGradHook(Measured):
    """Pending gradients come back finished; floor: the same all-reduces, waited for bare."""

    functions = (f"{UTILS}sync_grad_hook",)
    sizes = (2,)

    def work(self, bed: Bed) -> Work:
        return self._finished(bed, bed.function(self.functions[0]))

    def floor(self, bed: Bed) -> Work:
        return self._finished(bed, lambda pending: pending.wait())

    def _finished(self, bed: Bed, finish: Any) -> Work:
        import torch.distributed as dist
        from torch.distributed._functional_collectives import all_reduce

        from benchmarks.bed import Work

        group: Any = dist.group.WORLD
        grads = [bed.full(leaf).to(bed.device) for leaf in bed.leaves]

        def check(got: list[Any]) -> None:
            for leaf, grad, done in zip(bed.leaves, grads, got, strict=True):
                bed.same(done, grad * bed.size, leaf.name)

        return Work(lambda: [finish(all_reduce(g, "sum", group)) for g in grads], check)


def module(bed: Bed) -> Any:
    """A module of one submodule a leaf, each with a tensor-parallel weight."""
    from torch import nn

    root = nn.Module()
    for n, tensor in enumerate(bed.sharded().values()):
        child = nn.Module()
        child.register_parameter("weight", nn.Parameter(tensor))
        root.add_module(f"layer{n}", child)
    return root


def are_local(bed: Bed, root: nn.Module) -> None:
    """Every weight is a plain local Parameter with this rank's part."""
    from torch import nn

    for leaf, child in zip(bed.leaves, root.children(), strict=True):
        assert isinstance(child.weight, nn.Parameter), f"{leaf.name}: no Parameter"
        bed.same(child.weight.detach(), bed.mine(leaf), leaf.name)


class LocalizeDtensor(Measured):
    """Weights become local Parameters for the first time; floor: one setattr each.

    After a forward torch has nothing left to localize: it has lost the parameters.
    """

    functions = (f"{DDP}_localize_dtensor",)
    sizes: ClassVar[tuple[int, ...]] = (2,)

    def work(self, bed: Bed) -> Work:
        from benchmarks.bed import Work

        localize, root = bed.function(self.functions[0]), module(bed)

        def reset() -> None:
            nonlocal root
            root = module(bed)

        def call() -> nn.Module:
            localize(root)
            return root

        return Work(call, lambda got: are_local(bed, got), reset)

    def floor(self, bed: Bed) -> Work:
        return _swaps(bed)


class ReconstructDtensor(Measured):
    """Local Parameters give way to DTensors, as before a forward; floor: one setattr each."""

    functions = (f"{DDP}_reconstruct_dtensor",)
    sizes: ClassVar[tuple[int, ...]] = (2,)

    def work(self, bed: Bed) -> Work:
        from benchmarks.bed import Work

        reconstruct, root = bed.function(self.functions[0]), module(bed)
        localize = bed.function(f"{DDP}_localize_dtensor")

        def reset() -> None:
            nonlocal root
            root = module(bed)
            localize(root)

        def call() -> nn.Module:
            reconstruct(root, ())
            return root

        def check(got: Any) -> None:
            for leaf, child in zip(bed.leaves, got.children(), strict=True):
                bed.is_sharded(child.weight.detach(), leaf)

        return Work(call, check, reset)

    def floor(self, bed: Bed) -> Work:
        return _swaps(bed)


def _swaps(bed: Bed) -> Work:
    from torch import nn

    root = module(bed)
    weights: list[Any] = [(child, child.weight) for child in root.children()]
    weights = [(child, nn.Parameter(weight.to_local())) for child, weight in weights]

    def least(pair: Any) -> Any:
        child, weight = pair
        child.weight = weight
        return child

    return bed.each(weights, least)


class UpdateModuleParam(Measured):
    """Weights found by path and replaced; floor: one setattr each."""

    functions = (f"{DDP}_update_module_param", f"{DDP}_get_submodule_n_params")
    sizes = (2,)

    def work(self, bed: Bed) -> Work:
        from torch import nn

        from benchmarks.bed import Work

        update, find = map(bed.function, self.functions)
        root = module(bed)
        locals_ = {name: p.to_local() for name, p in root.named_parameters()}
        fresh = {name: nn.Parameter(t) for name, t in locals_.items()}

        def call() -> nn.Module:
            update([(*find(root, name), param) for name, param in fresh.items()])
            return root

        def check(got: nn.Module) -> None:
            assert all(got.get_parameter(n) is p for n, p in fresh.items()), "not replaced"

        return Work(call, check)

    def floor(self, bed: Bed) -> Work:
        return _swaps(bed)


class PreDpModuleTransform(Measured):
    """A tensor-parallel module made ready for DDP, once; floor: one setattr a weight."""

    functions = (f"{DDP}_pre_dp_module_transform",)
    sizes = (2,)

    def work(self, bed: Bed) -> Work:
        from benchmarks.bed import Work

        transform, root = bed.function(self.functions[0]), module(bed)

        def reset() -> None:
            nonlocal root
            root = module(bed)

        def call() -> nn.Module:
            transform(root)
            return root

        return Work(call, lambda got: are_local(bed, got), reset)

    def floor(self, bed: Bed) -> Work:
        return _swaps(bed)
