"""Sharded tensors become whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.base import Measured
from benchmarks.work import Work

if TYPE_CHECKING:
    from benchmarks.rank_context import RankContext


class GatherStateDict(Measured):
    """A sharded state dict becomes whole on every rank; floor: one all-gather of the bytes."""

    functions = ("_state_dict_utils._gather_state_dict",)
    regimes: ClassVar[tuple[str, ...]] = ("many", "model", "large", "mixed")
    sizes: ClassVar[tuple[int, ...]] = (2, 4, 8)
    varies: ClassVar[dict[tuple[str, str], str]] = {
        ("mixed", "peak"): "from 11.47 to 11.53 MB on four ranks; what it waits for may end late"
    }
    redistributes = True

    def work(self, ctx: RankContext) -> Work:
        gather, sharded = ctx.function(self.functions[0]), ctx.sharded()
        return Work(lambda: gather(sharded), ctx.are_whole)

    def floor(self, ctx: RankContext) -> Work:
        return ctx.gathers(ctx.total - ctx.held)


class GatherStateDictToFirst(Measured):
    """A sharded state dict becomes whole on rank 0, in CPU memory; floor: one gather."""

    functions = ("_state_dict_utils._gather_state_dict",)
    regimes = ("many", "model", "large")
    sizes = (4,)
    redistributes = True

    def work(self, ctx: RankContext) -> Work:
        gather, sharded = ctx.function(self.functions[0]), ctx.sharded()

        def check(got: Any) -> None:
            if ctx.rank == 0:
                ctx.are_whole(got)
            else:
                assert got == {}, "a rank that asked for nothing got something"

        return Work(lambda: gather(sharded, cpu_offload=True, ranks_only=(0,)), check)

    def floor(self, ctx: RankContext) -> Work:
        return ctx.sends_to_first(ctx.held)


class AllGatherShardedTensor(Measured):
    """One ShardedTensor becomes whole on every rank; floor: one all-gather of its bytes."""

    functions = ("_state_dict_utils._all_gather_sharded_tensor",)
    regimes = ("one",)
    sizes = (2, 4)

    def work(self, ctx: RankContext) -> Work:
        from conformance.kit.layouts import rows, sharded_tensor

        gather, (leaf,) = ctx.function(self.functions[0]), ctx.leaves
        full = ctx.full(leaf).to(ctx.device)
        counts = [full.shape[0] // ctx.size] * ctx.size
        sharded = sharded_tensor(full, rows(full.shape, counts))
        return Work(lambda: gather(sharded), lambda got: ctx.same(got, ctx.full(leaf), leaf.name))

    def floor(self, ctx: RankContext) -> Work:
        return ctx.gathers(ctx.total - ctx.held)
