"""Sharded tensors become whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.measured import Measured

if TYPE_CHECKING:
    from benchmarks.bed import Bed, Work


class GatherStateDict(Measured):
    """A sharded state dict becomes whole on every rank; floor: one all-gather of the bytes."""

    functions = ("_state_dict_utils._gather_state_dict",)
    regimes: ClassVar[tuple[str, ...]] = ("many", "model", "large", "mixed")
    sizes: ClassVar[tuple[int, ...]] = (2, 4, 8)
    varies: ClassVar[dict[tuple[str, str], str]] = {
        (
            "mixed",
            "peak",
        ): "from 11.47 to 11.53 MB on four ranks; what it waits for ends when it may"
    }
    redistributes = True

    def work(self, bed: Bed) -> Work:
        from benchmarks.bed import Work

        gather, sharded = bed.function(self.functions[0]), bed.sharded()
        return Work(lambda: gather(sharded), bed.are_whole)

    def floor(self, bed: Bed) -> Work:
        return bed.gathers(bed.total - bed.held)


class GatherStateDictToFirst(Measured):
    """A sharded state dict becomes whole on rank 0, in CPU memory; floor: one gather."""

    functions = ("_state_dict_utils._gather_state_dict",)
    regimes = ("many", "model", "large")
    sizes = (4,)
    redistributes = True

    def work(self, bed: Bed) -> Work:
        from benchmarks.bed import Work

        gather, sharded = bed.function(self.functions[0]), bed.sharded()

        def check(got: Any) -> None:
            if bed.rank == 0:
                bed.are_whole(got)
            else:
                assert got == {}, "a rank that asked for nothing got something"

        return Work(lambda: gather(sharded, cpu_offload=True, ranks_only=(0,)), check)

    def floor(self, bed: Bed) -> Work:
        return bed.sends_to_first(bed.held)


class AllGatherShardedTensor(Measured):
    """One ShardedTensor becomes whole on every rank; floor: one all-gather of its bytes."""

    functions = ("_state_dict_utils._all_gather_sharded_tensor",)
    regimes = ("one",)
    sizes = (2, 4)

    def work(self, bed: Bed) -> Work:
        from benchmarks.bed import Work
        from conformance.kit.layouts import rows, sharded_tensor

        gather, (leaf,) = bed.function(self.functions[0]), bed.leaves
        full = bed.full(leaf).to(bed.device)
        counts = [full.shape[0] // bed.size] * bed.size
        sharded = sharded_tensor(full, rows(full.shape, counts))
        return Work(lambda: gather(sharded), lambda got: bed.same(got, bed.full(leaf), leaf.name))

    def floor(self, bed: Bed) -> Work:
        return bed.gathers(bed.total - bed.held)
