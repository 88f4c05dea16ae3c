"""State dicts copied, staged on the CPU, compared: work of one rank, no communication."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.base import COUNTS, Measured
from benchmarks.settings import TORCH, Settings
from benchmarks.work import Work

if TYPE_CHECKING:
    from benchmarks.rank_context import RankContext
    from benchmarks.settings import Leaf


class OffloadStateDictToCpu(Measured):
    """A snapshot of a sharded state dict in CPU memory; floor: one copy of its bytes."""

    functions = ("_state_dict_utils._offload_state_dict_to_cpu",)
    regimes = ("many", "model", "large")
    sizes = (2,)
    absent: ClassVar[dict[str, str]] = {
        TORCH: "on the CPU it aliases what is there already: nothing is copied"
    }

    @classmethod
    def missing(cls, arm: str, settings: Settings) -> str:
        return super().missing(arm, settings) if settings.device == "cpu" else ""

    def work(self, ctx: RankContext) -> Work:
        offload, sharded = ctx.function(self.functions[0]), ctx.sharded()

        def check(got: Any, leaf: Leaf) -> None:
            mine, theirs = got._local_tensor, sharded[leaf.name]._local_tensor
            assert mine.device.type == "cpu", f"{leaf.name}: on {mine.device}"
            assert mine.data_ptr() != theirs.data_ptr(), f"{leaf.name}: not copied"
            ctx.same(mine, ctx.mine(leaf), leaf.name)

        return Work(lambda: offload(sharded), ctx.of_names(check))

    def floor(self, ctx: RankContext) -> Work:
        return ctx.copies(ctx.held)


class OffloadWholeStateDictToCpu(OffloadStateDictToCpu):
    """A snapshot of a whole state dict in CPU memory; floor: one copy of its bytes."""

    sizes = (1,)

    def work(self, ctx: RankContext) -> Work:
        offload, whole = ctx.function(self.functions[0]), ctx.whole()

        def check(got: Any) -> None:
            ctx.are_whole(got)
            same = [name for name, t in whole.items() if t.data_ptr() == got[name].data_ptr()]
            assert not same, f"{same[0]}: not copied"

        return Work(lambda: offload(whole), check)

    def floor(self, ctx: RankContext) -> Work:
        return ctx.copies(ctx.total)


class CopyStateDict(Measured):
    """One state dict's values into another's tensors; floor: one copy of the bytes."""

    functions = ("_state_dict_utils._copy_state_dict",)
    regimes = ("many", "model", "large")
    sizes = (1,)

    def work(self, ctx: RankContext) -> Work:
        import torch

        copy, source = ctx.function(self.functions[0]), ctx.whole()
        target = {name: torch.zeros_like(t, device="cpu") for name, t in source.items()}

        reset = partial(ctx.blank, target.values())
        return Work(lambda: copy(source, target), ctx.are_whole, reset)

    def floor(self, ctx: RankContext) -> Work:
        return ctx.copies(ctx.total, fresh=False)


class CreateCpuStateDict(Measured):
    """New CPU tensors like a sharded state dict's; floor: the same tensors, allocated bare."""

    functions = ("_state_dict_utils._create_cpu_state_dict",)
    regimes: ClassVar[tuple[str, ...]] = ("many", "large")
    sizes: ClassVar[tuple[int, ...]] = (2,)
    arguments: ClassVar[dict[str, bool]] = {}

    def work(self, ctx: RankContext) -> Work:
        create, sharded = ctx.function(self.functions[0]), ctx.sharded()

        def check(got: Any, leaf: Leaf) -> None:
            name, mine, like = leaf.name, got._local_tensor, sharded[leaf.name]._local_tensor
            assert mine.device.type == "cpu", f"{name}: on {mine.device}"
            assert (mine.shape, mine.dtype) == (like.shape, like.dtype), f"{name}: {mine.shape}"
            assert mine.data_ptr() != like.data_ptr(), f"{name}: not new"
            if self.arguments.get("share_memory"):
                assert mine.is_shared(), f"{name}: not shared"
            if self.arguments.get("pin_memory"):
                assert mine.is_pinned(), f"{name}: not pinned"

        return Work(lambda: create(sharded, **self.arguments), ctx.of_names(check))

    def floor(self, ctx: RankContext) -> Work:
        import torch

        share = self.arguments.get("share_memory", False)
        pin = self.arguments.get("pin_memory", False)

        def least(leaf: Any) -> Any:
            count = leaf.nbytes // leaf.parts(ctx.size)
            made = torch.empty(count, dtype=torch.uint8, pin_memory=pin)
            return made.share_memory_() if share else made

        return ctx.each(ctx.leaves, least)


class CreateSharedCpuStateDict(CreateCpuStateDict):
    """The same in shared memory, as asynchronous staging asks; floor: the same tensors, bare."""

    regimes = ("model",)
    arguments: ClassVar[dict[str, bool]] = {"share_memory": True}
    varies: ClassVar[dict[tuple[str, str], str]] = {
        ("model", "calls"): "6575 or 6617 for a small model"
    }


class CreatePinnedCpuStateDict(CreateCpuStateDict):
    """The same in pinned memory, as staging from a device asks; floor: the same tensors, bare."""

    device_only = True
    arguments: ClassVar[dict[str, bool]] = {"pin_memory": True}


class StageFromDevice(Measured):
    """Values from the device into pinned CPU tensors; floor: one copy into pinned memory."""

    functions = ("_state_dict_utils._copy_state_dict", "_state_dict_utils._create_cpu_state_dict")
    regimes = ("many", "large")
    sizes = (1,)
    device_only = True

    def work(self, ctx: RankContext) -> Work:
        copy, create = map(ctx.function, self.functions)
        source = ctx.whole()
        staged = create(source, pin_memory=True)

        def call() -> Any:
            got = copy(source, staged, non_blocking=True)
            ctx.synchronize()
            return got

        return Work(call, ctx.are_whole, partial(ctx.blank, staged.values()))

    def floor(self, ctx: RankContext) -> Work:
        return ctx.copies(ctx.total, fresh=False, pinned=True)


class CheckStateDictSimilarity(Measured):
    """Whether two state dicts agree in kinds, shapes, dtypes; floor: a bare loop that compares."""

    functions = ("_state_dict_utils._check_state_dict_similarity",)
    regimes = ("many",)
    sizes = (1,)
    tracks = COUNTS

    def work(self, ctx: RankContext) -> Work:
        similar = ctx.function(self.functions[0])
        one, other = ctx.whole(), ctx.whole()

        def check(got: bool) -> None:
            assert got is True, f"equal dicts are {got}"

        return Work(lambda: similar(one, other), check)

    def floor(self, ctx: RankContext) -> Work:
        one, other = ctx.whole(), ctx.whole()
        pairs = list(zip(one.values(), other.values(), strict=True))
        return ctx.each(pairs, lambda p: p[0].shape == p[1].shape and p[0].dtype == p[1].dtype)
