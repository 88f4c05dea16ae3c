"""Whole tensors land in sharded ones: from rank 0, or from every rank's own copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.measured import Measured

if TYPE_CHECKING:
    import torch

    from benchmarks.bed import Bed, Work


def _blank(local: dict[str, Any]) -> None:
    for tensor in local.values():
        tensor._local_tensor.zero_()


def _from_first(bed: Bed) -> Work:
    """Floor: one scatter of what each rank must hold, one broadcast of what all must."""
    same = sum(leaf.nbytes for leaf in bed.leaves if leaf.parts(bed.size) == 1)
    return bed.scatters(bed.held - same, same)


class BroadcastStateDict(Measured):
    """Rank 0's whole state dict lands in every rank's sharded one; floor: scatter, broadcast."""

    functions = ("_state_dict_utils._broadcast_state_dict",)
    regimes: ClassVar[tuple[str, ...]] = ("many", "model", "large", "mixed")
    sizes: ClassVar[tuple[int, ...]] = (2, 4, 8)

    def work(self, bed: Bed) -> Work:
        from benchmarks.bed import Work

        broadcast, local = bed.function(self.functions[0]), bed.sharded()
        full = bed.whole() if bed.rank == 0 else {}

        def call() -> dict[str, Any]:
            landed: dict[str, Any] = dict(local)
            broadcast(full.copy(), landed, bed.device)
            return landed

        check = _shapes(bed) if bed.fake else bed.are_sharded
        return Work(call, check, lambda: _blank(local))

    def floor(self, bed: Bed) -> Work:
        return _from_first(bed)


class BroadcastWholeStateDict(Measured):
    """Rank 0's whole state dict lands in plain targets on meta; floor: one broadcast."""

    functions = ("_state_dict_utils._broadcast_state_dict",)
    regimes: ClassVar[tuple[str, ...]] = ("many", "large")
    sizes: ClassVar[tuple[int, ...]] = (2, 4)

    def work(self, bed: Bed) -> Work:
        from benchmarks.bed import Work

        broadcast = bed.function(self.functions[0])
        full: dict[str, Any] = dict(bed.whole()) if bed.rank == 0 else {}
        targets = {name: tensor.to("meta") for name, tensor in bed.whole().items()}

        def call() -> dict[str, Any]:
            landed: dict[str, Any] = dict(targets)
            broadcast(full.copy(), landed, bed.device)
            return landed

        return Work(call, bed.are_whole)

    def floor(self, bed: Bed) -> Work:
        return bed.broadcasts(bed.total)


class BroadcastTensors(Measured):
    """The tensors of named keys land in the sharded targets; floor: scatter, broadcast."""

    functions = ("_state_dict_utils._broadcast_tensors", "_state_dict_utils._TensorInfo")
    regimes = ("model",)
    sizes = (4,)

    def work(self, bed: Bed) -> Work:
        import torch

        from benchmarks.bed import Work

        broadcast, info = map(bed.function, self.functions)
        local, keys = bed.sharded(), [leaf.name for leaf in bed.leaves]
        full: dict[str, Any] = dict(bed.whole()) if bed.rank == 0 else {}

        def call() -> dict[str, Any]:
            told = full or {
                leaf.name: info(torch.Size(leaf.shape), getattr(torch, leaf.dtype))
                for leaf in bed.leaves
            }
            landed: dict[str, Any] = dict(local)
            broadcast(told, landed, list(keys), bed.device)
            return landed

        return Work(call, bed.are_sharded, lambda: _blank(local))

    def floor(self, bed: Bed) -> Work:
        return _from_first(bed)


class DistributeStateDict(Measured):
    """Every rank cuts its part out of its own whole state dict; floor: one copy of the part."""

    functions = ("_state_dict_utils._distribute_state_dict",)
    regimes: ClassVar[tuple[str, ...]] = ("many", "model", "large")
    sizes: ClassVar[tuple[int, ...]] = (2, 4)
    varies: ClassVar[dict[tuple[str, str], str]] = {
        ("model", "peak"): "from 21.9 to 24.4 MiB on four ranks; what it waits for ends when it may"
    }

    def work(self, bed: Bed) -> Work:
        from benchmarks.bed import Work

        distribute, full, local = bed.function(self.functions[0]), bed.whole(), bed.sharded()

        def call() -> dict[str, Any]:
            landed: dict[str, Any] = dict(local)  # torch replaces targets by views of `full`
            distribute(full.copy(), landed, bed.device)
            return landed

        return Work(call, bed.are_sharded, lambda: _blank(local))

    def floor(self, bed: Bed) -> Work:
        return _on_device(bed)


class DistributeTensors(Measured):
    """The tensors of named keys, whole on every rank, are cut; floor: one copy of the part."""

    functions = ("_state_dict_utils._distribute_tensors",)
    regimes = ("model",)
    sizes = (4,)

    def work(self, bed: Bed) -> Work:
        from benchmarks.bed import Work

        distribute, full, local = bed.function(self.functions[0]), bed.whole(), bed.sharded()
        keys = list(local)

        def call() -> dict[str, Any]:
            pairs: dict[str, Any] = {name: (local[name], full[name]) for name in keys}
            distribute(pairs, keys, bed.device)
            return pairs

        return Work(call, bed.are_sharded, lambda: _blank(local))

    def floor(self, bed: Bed) -> Work:
        return _on_device(bed)


def _on_device(bed: Bed) -> Work:
    """Floor: one copy of what this rank holds, within its device, into memory that is there."""
    from benchmarks.bed import Work

    source = bed._pattern(bed.held)
    target = source.clone()

    def reset() -> None:
        target.zero_()

    return Work(lambda: target.copy_(source), lambda got: bed.same(got, source, "the copy"), reset)


def _shapes(bed: Bed) -> Any:
    """In a fake world nothing arrives: all that can be held to the layout is the shapes."""

    def check(got: dict[str, Any]) -> None:
        shapes: dict[str, torch.Size] = {k: v._local_tensor.shape for k, v in got.items()}
        assert shapes == {leaf.name: bed.mine(leaf).shape for leaf in bed.leaves}, "shapes differ"

    return check
