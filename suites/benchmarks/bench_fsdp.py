"""What FSDP1 asks for each weight of a tensor-parallel model: chunks, boxes, metadata, gathers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.base import Measured
from benchmarks.bench_tensor_parallel import bare_dtensors
from benchmarks.settings import TORCH
from benchmarks.work import Work

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

    from benchmarks.rank_context import RankContext
    from benchmarks.settings import Leaf

PATH = "tensor.parallel.fsdp."


def root(ctx: RankContext) -> DeviceMesh:
    """The mesh of FSDP x TP: all ranks, two of them for TP."""
    return ctx.mesh(ctx.size // 2, 2)


def held(leaf: Leaf) -> Placement | None:
    """How TP holds the leaf; None: not at all."""
    from conformance.kit.layouts import S

    return {"S0": S(0), "S1": S(1), "R": None}[leaf.placement]


def _chunk_bytes(ctx: RankContext) -> int:
    return sum(
        leaf.nbytes // (ctx.size // 2) // (1 if leaf.placement == "R" else 2) for leaf in ctx.leaves
    )


class ChunkDtensor(Measured):
    """FSDP's chunk of each weight, as a DTensor over both meshes; floor: one copy of the chunks."""

    functions = (f"{PATH}_chunk_dtensor",)
    absent: ClassVar[dict[str, str]] = {
        TORCH: "of a weight that TP shards by row, ranks get other rows than FSDP's chunk"
    }

    def work(self, ctx: RankContext) -> Work:
        from conformance.kit.fsdp1 import assert_chunked, fsdp_mesh, fsdp_rank, given

        chunk, mesh = ctx.function(self.functions[0]), root(ctx)
        line, rank = fsdp_mesh(mesh), fsdp_rank(mesh)
        weights = [given(ctx.full(leaf).to(ctx.device), mesh, held(leaf)) for leaf in ctx.leaves]

        def check(got: Any, leaf: Leaf) -> None:
            assert_chunked(got, ctx.full(leaf), mesh, held(leaf), leaf.name)

        return Work(lambda: [chunk(w, rank, line) for w in weights], ctx.of_each(check))

    def floor(self, ctx: RankContext) -> Work:
        return ctx.moves(_chunk_bytes(ctx))


class AllGatherDtensor(Measured):
    """TP's part of each weight from FSDP's chunks; floor: one all-gather among FSDP's ranks."""

    functions = (f"{PATH}_all_gather_dtensor",)
    varies: ClassVar[dict[tuple[str, str], str]] = {
        ("model", "peak"): "from 484 to 508 kB on four ranks; a first message may be freed late"
    }
    redistributes = True

    def work(self, ctx: RankContext) -> Work:
        from conformance.kit.fsdp1 import sharded, tp_local
        from conformance.kit.layouts import dtensor

        gather, mesh = ctx.function(self.functions[0]), root(ctx)
        chunks = [
            dtensor(ctx.full(leaf).to(ctx.device), mesh, sharded(mesh, held(leaf)))
            for leaf in ctx.leaves
        ]

        def check(got: Any, leaf: Leaf) -> None:
            ctx.same(got, tp_local(ctx.full(leaf), mesh, held(leaf)), leaf.name)

        return Work(lambda: [gather(c, mesh) for c in chunks], ctx.of_each(check))

    def floor(self, ctx: RankContext) -> Work:
        group = root(ctx).get_group(0)
        return ctx.gathers(_chunk_bytes(ctx) * (group.size() - 1), group)


def _rows(ctx: RankContext, leaf: Leaf) -> torch.Tensor:
    return ctx.full(leaf).chunk(ctx.size)[ctx.rank]


class ChunkTensor(Measured):
    """FSDP's rows of each plain weight, as ShardedTensors; floor: one copy of the rows."""

    functions = (f"{PATH}_chunk_tensor",)
    sizes = (2,)

    def work(self, ctx: RankContext) -> Work:
        import torch.distributed as dist

        chunk, group = ctx.function(self.functions[0]), dist.group.WORLD
        weights = ctx.whole().values()

        def check(got: Any, leaf: Leaf) -> None:
            (shard,) = got.local_shards()
            ctx.same(shard.tensor, _rows(ctx, leaf), leaf.name)

        return Work(
            lambda: [chunk(w, ctx.rank, ctx.size, ctx.size, group) for w in weights],
            ctx.of_each(check),
        )

    def floor(self, ctx: RankContext) -> Work:
        return ctx.moves(ctx.total // ctx.size)


class Boxes(Measured):
    """Where each weight's shard lies in the whole; floor: (offset, size) by hand in a loop."""

    functions = (f"{PATH}_get_box", f"{PATH}_get_box_for", f"{PATH}_get_local_box")
    sizes: ClassVar[tuple[int, ...]] = (2,)

    def work(self, ctx: RankContext) -> Work:
        box, box_for, local_box = map(ctx.function, self.functions)
        sharded = list(ctx.sharded().values())

        def check(got: Any, leaf: Leaf) -> None:
            _, other, mine = got
            assert other == _box(leaf, ctx.size, ctx.size - 1), f"{leaf.name}: {other}"
            assert mine == _box(leaf, ctx.size, ctx.rank), f"{leaf.name}: {mine}"

        return Work(
            lambda: [(box(t), box_for(t, ctx.size - 1), local_box(t)) for t in sharded],
            ctx.of_each(check),
        )

    def floor(self, ctx: RankContext) -> Work:
        return ctx.each(ctx.leaves, lambda leaf: _box(leaf, ctx.size, ctx.rank))


def _box(leaf: Leaf, size: int, index: int) -> tuple[Any, Any]:
    import torch

    offsets, sizes = [0] * len(leaf.shape), list(leaf.shape)
    if leaf.placement != "R":
        dim = int(leaf.placement[1])
        sizes[dim] //= size
        offsets[dim] = sizes[dim] * index
    return torch.Size(offsets), torch.Size(sizes)


class ShardMetadataOf(Measured):
    """Each weight described in ShardedTensor's terms; floor: its boxes by hand."""

    functions = (
        f"{PATH}_create_sharded_tensor_md_from_dt",
        f"{PATH}_create_shard_md_from_dt",
        f"{PATH}_get_dt_pg",
    )
    sizes: ClassVar[tuple[int, ...]] = (2,)

    def work(self, ctx: RankContext) -> Work:
        describe, shard, group_of = map(ctx.function, self.functions)
        sharded = list(ctx.sharded().values())

        def check(got: Any, leaf: Leaf) -> None:
            whole, mine = got
            parts = leaf.parts(ctx.size)
            assert len(whole.shards_metadata) == parts, f"{leaf.name}: {whole}"
            for index, part in enumerate([*whole.shards_metadata, mine]):
                box = _box(leaf, ctx.size, index if index < parts else ctx.rank)
                found = (list(part.shard_offsets), list(part.shard_sizes))
                assert found == (list(box[0]), list(box[1])), f"{leaf.name}: {part}"

        return Work(
            lambda: [(describe(t, group_of(t)), shard(t, ctx.rank)) for t in sharded],
            ctx.of_each(check),
        )

    def floor(self, ctx: RankContext) -> Work:
        return ctx.each(ctx.leaves, lambda leaf: [_box(leaf, ctx.size, r) for r in range(ctx.size)])


class RewriteSpec(Measured):
    """Sharding specs moved to their tensor's device; floor: the spec, copied deep."""

    functions = (f"{PATH}_rewrite_spec_if_needed",)
    sizes = (2,)

    def work(self, ctx: RankContext) -> Work:
        rewrite, specs = ctx.function(self.functions[0]), self._specs(ctx)

        def check(got: list[Any]) -> None:
            for (_, tensor), spec in zip(specs, got, strict=True):
                device = spec.placements[ctx.rank].device()
                assert device == tensor.device, f"on {device}, expected {tensor.device}"

        return Work(lambda: [rewrite(spec, t, ctx.rank) for spec, t in specs], check)

    def floor(self, ctx: RankContext) -> Work:
        import copy

        return ctx.each(self._specs(ctx), lambda pair: copy.deepcopy(pair[0]))

    def _specs(self, ctx: RankContext) -> list[Any]:
        from torch.distributed._shard.sharding_spec import ChunkShardingSpec

        places = [f"rank:{r}/meta" for r in range(ctx.size)]
        return [
            (ChunkShardingSpec(dim=0, placements=list(places)), tensor)
            for tensor in ctx.whole().values()
        ]


class PreLoadStateDict(Measured):
    """The shards from which FSDP1 loads each weight; floor: local_shards() in a loop."""

    functions = (f"{PATH}_pre_load_state_dict",)
    sizes = (2,)

    def work(self, ctx: RankContext) -> Work:
        load, sharded = ctx.function(self.functions[0]), self._sharded(ctx)

        def check(got: list[Any]) -> None:
            for leaf, tensor, (same, shards) in zip(ctx.leaves, sharded, got, strict=True):
                assert same is tensor, f"{leaf.name}: another tensor"
                ctx.same(shards[0].tensor, _rows(ctx, leaf), leaf.name)

        return Work(lambda: [load(t) for t in sharded], check)

    def floor(self, ctx: RankContext) -> Work:
        return ctx.each(self._sharded(ctx), lambda t: t.local_shards())

    def _sharded(self, ctx: RankContext) -> list[Any]:
        from conformance.kit.layouts import rows, sharded_tensor

        return [
            sharded_tensor(whole, rows(whole.shape, [len(whole) // ctx.size] * ctx.size))
            for whole in ctx.whole().values()
        ]


class Extensions(Measured):
    """Each weight through FSDP1's flatten and unflatten; floor: a DTensor made bare."""

    functions = (f"{PATH}DTensorExtensions",)
    sizes = (2,)

    def work(self, ctx: RankContext) -> Work:
        import torch
        from torch.distributed.fsdp import _fsdp_extensions as fsdp
        from torch.distributed.fsdp._common_utils import _FSDPDeviceHandle

        handle: Any = _FSDPDeviceHandle.from_device(torch.device(ctx.device.type))
        extensions = ctx.function(self.functions[0])(handle)
        sharded = list(ctx.sharded().values())

        def call() -> list[Any]:
            flat = [fsdp._ext_pre_flatten_transform(t, extensions) for t in sharded]
            return [fsdp._ext_post_unflatten_transform(t, e, extensions) for t, e in flat]

        return Work(call, ctx.of_each(ctx.is_sharded))

    def floor(self, ctx: RankContext) -> Work:
        return bare_dtensors(ctx)
