"""FSDP's chunk of a weight, as a ShardedTensor."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import (
    ShardedTensorMetadata,
    TensorProperties,
)
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.tensor import DTensor

from conformance.kit import accelerator
from conformance.kit.agree import assert_raises_everywhere, exchange
from conformance.kit.boxes import assert_box, assert_of_its_own, assert_tile, boxes
from conformance.kit.collectives import Collectives
from conformance.kit.compare import assert_same, fingerprint, shares_memory
from conformance.kit.data import DTYPES, VIEWS, numbers
from conformance.kit.fsdp1 import EVEN, UNEVEN, given, held_id, tp_local, tp_mesh
from conformance.kit.groups import UNSORTED, group
from conformance.kit.layouts import R, S, dtensor, rows, sharded_tensor
from conformance.kit.nested import spoil
from conformance.kit.refusals import MISSING

SIZES = [(8, 4), (7,), (5, 3), (3, 2), (1,), (1, 5), (9, 1, 2), (0, 3), (3, 0), (6, 6)]


def call(judged: Any, tensor: torch.Tensor, pg: Any) -> Any:
    """The call as FSDP1 makes it: with the number of this machine's devices, on a CPU none."""
    kind = numbers(1).device.type
    devices = 0 if kind == "cpu" else torch.get_device_module(kind).device_count()
    with torch.no_grad():
        return judged(tensor, dist.get_rank(pg), dist.get_world_size(pg), devices, pg)


def unwrapped(tensor: Any) -> Any:
    """The ShardedTensor of FSDP's chunks, which may lie in TP's."""
    assert isinstance(tensor, ShardedTensor), f"expected a ShardedTensor, got {type(tensor)}"
    shards = tensor.local_shards()
    return shards[0].tensor if shards and isinstance(shards[0].tensor, ShardedTensor) else tensor


def assert_rows(got: Any, full: torch.Tensor, pg: Any, what: str = "result") -> None:
    """`got` is the ShardedTensor over `pg` of the rows of `full`, and says so truly."""
    assert isinstance(got, ShardedTensor), f"{what}: a {type(got).__name__}"
    assert got.size() == full.shape, f"{what}: size {tuple(got.size())}, not {tuple(full.shape)}"
    assert got.dtype == full.dtype, f"{what}: dtype {got.dtype}"
    ranks, shards = dist.get_process_group_ranks(pg), got.metadata().shards_metadata
    assert_tile([(s.shard_offsets, s.shard_sizes) for s in shards], full.shape, what)
    truth = boxes(full.shape, len(ranks), S(0))
    for shard in shards:
        owner = None if shard.placement is None else shard.placement.rank()
        assert owner is not None, f"{what}: a shard on no rank: {shard}"
        assert owner in ranks, f"{what}: a shard on rank {owner}, the group has {ranks}"
        box = (shard.shard_offsets, shard.shard_sizes)
        assert_box(box, truth[ranks.index(owner)], full.shape, f"{what}, shard of rank {owner}")
    local, mine = got.local_shards(), dist.get_rank(pg)
    offsets, sizes = truth[mine]
    assert len(local) <= 1, f"{what}: {len(local)} local shards"
    if not local:
        assert 0 in sizes, f"{what}: no local shard, expected {sizes}"
        return
    chunk = full[offsets[0] : offsets[0] + sizes[0]]
    assert_same(local[0].tensor, chunk, f"{what}, local shard")
    assert not local[0].tensor.requires_grad, f"{what}: the local shard requires grad"
    here = local[0].metadata
    assert_box((here.shard_offsets, here.shard_sizes), truth[mine], full.shape, f"{what}, local")


@pytest.mark.judges("tensor.parallel.fsdp._chunk_tensor")
class TestChunkTensor:
    @pytest.mark.law("values")
    @pytest.mark.world(1, 2, 4)
    @pytest.mark.thorough(but=["w2", "w4"])
    def test_the_rows_of_a_plain_tensor(self, judged: Any, world: Any) -> None:
        """A plain tensor of any shape is cut by rows, as torch.chunk cuts; some get nothing."""
        for size in SIZES:
            full = numbers(*size)
            assert_rows(call(judged, full, dist.group.WORLD), full, dist.group.WORLD, str(size))

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_every_dtype(self, judged: Any) -> None:
        """Every dtype is chunked bit for bit."""
        for dtype in DTYPES:
            full = numbers(5, 3, dtype=dtype)
            assert_rows(call(judged, full, dist.group.WORLD), full, dist.group.WORLD, str(dtype))

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("view", VIEWS.values(), ids=list(VIEWS))
    @pytest.mark.thorough(but=["transposed"])
    def test_every_memory_layout(self, judged: Any, view: Any) -> None:
        """Transposed, sliced, expanded and offset tensors are chunked as their values say."""
        for size in [(4, 6), (5, 3), (4, 2, 3)]:
            full = view(numbers(*size))
            assert_rows(call(judged, full, dist.group.WORLD), full, dist.group.WORLD, str(size))

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", [R, S(0), S(1)], ids=held_id)
    @pytest.mark.parametrize("sizes", [EVEN, UNEVEN], ids=["even", "uneven"])
    @pytest.mark.thorough(but=["even-R"])
    def test_the_rows_of_a_dtensor(self, judged: Any, mesh: Any, held: Any, sizes: Any) -> None:
        """Of a DTensor over TP's mesh the rows of its local tensor are cut over FSDP's group."""
        root = mesh(2, 2)
        pg = root["dp"].get_group()
        for size in sizes:
            full = numbers(*size)
            mine = tp_local(full, root, held)
            got = unwrapped(call(judged, given(full, root, held), pg))
            if mine.numel():
                assert_rows(got, mine, pg, str(size))
            else:
                assert sum(s.tensor.numel() for s in got.local_shards()) == 0, str(size)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("dim", [0, 1])
    @pytest.mark.parametrize("sizes", [EVEN, UNEVEN], ids=["even", "uneven"])
    @pytest.mark.thorough(but=["uneven-1"])
    def test_the_shards_of_a_dtensor(
        self, judged: Any, mesh: Any, world: Any, dim: int, sizes: Any
    ) -> None:
        """Around the chunks stands a ShardedTensor of TP's shards, true and alike on each rank."""
        root = mesh(2, 2)
        line = tp_mesh(root)
        for number, size in enumerate(sizes):
            full = numbers(*size)
            outer = call(judged, given(full, root, S(dim)), root["dp"].get_group())
            assert tuple(outer.size()) == size, f"{size}: size {tuple(outer.size())}"
            shards = outer.metadata().shards_metadata
            assert_tile([(s.shard_offsets, s.shard_sizes) for s in shards], size, str(size))
            truth = boxes(size, 2, S(dim))
            for shard in shards:
                place = line.mesh.tolist().index(shard.placement.rank())
                box = (shard.shard_offsets, shard.shard_sizes)
                assert_box(box, truth[place], size, f"{size}, shard of rank {shard.placement}")
            told = exchange(world, [str(s) for s in shards], f"shards-{number}")
            other = told[world.rank ^ 1]
            assert other == told[world.rank], f"{size}: on the other rank of TP {other}"

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_the_rows_of_a_sharded_tensor(self, judged: Any, mesh: Any) -> None:
        """Of a ShardedTensor the local shard's rows are cut; its own shards stay what they are."""
        root = mesh(2, 2)
        line, pg = tp_mesh(root), root["dp"].get_group()
        for size, counts, dim in (
            ((8, 3), [4, 4], 0),
            ((7, 3), [2, 5], 0),
            ((5, 4), [1, 3], 1),
            ((3, 2), [1, 1], 1),
        ):
            full, what = numbers(*size), f"{size} in {counts}"
            tensor = sharded_tensor(full, rows(size, counts, dim=dim), line.get_group())
            outer = call(judged, tensor, pg)
            assert_rows(unwrapped(outer), full.split(counts, dim)[line.get_local_rank()], pg, what)
            assert outer.size() == full.shape, f"{what}: size {outer.size()}"
            shards = outer.metadata().shards_metadata
            assert shards == tensor.metadata().shards_metadata, f"{what}: {shards}"
            assert outer.local_shards()[0].metadata == tensor.local_shards()[0].metadata, what

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    @pytest.mark.parametrize(
        "ranks",
        [
            [1, 3],
            pytest.param([2, 3, 1], marks=UNSORTED),
            pytest.param([3, 1, 0, 2], marks=UNSORTED),
        ],
        ids=str,
    )
    @pytest.mark.thorough(but=["[2, 3, 1]"])
    def test_the_group_is_fsdps(self, judged: Any, rank: int, ranks: Any) -> None:
        """Chunks go to the group's ranks in its own order; placements are global ranks."""
        pg = group(*ranks)
        if rank in ranks:
            for size in [(8, 2), (5, 3), (2, 2)]:
                full = numbers(*size)
                assert_rows(call(judged, full, pg), full, pg, f"{size} over {ranks}")

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    def test_the_local_shard_is_this_ranks(self, judged: Any, mesh: Any, rank: int) -> None:
        """A local shard says that it is on this rank, with the rank's number in the world."""
        pg = mesh(2, 2)["dp"].get_group()
        got = call(judged, numbers(8, 2), pg)
        here = got.local_shards()[0].metadata
        assert here.placement.rank() == rank, f"on rank {rank} it says {here.placement}"
        assert here in got.metadata().shards_metadata, f"{here} is not among the shards"

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("kind", ["plain", "DTensor", "ShardedTensor"])
    def test_devices_per_node(self, judged: Any, mesh: Any, rank: int, kind: str) -> None:
        """A rank's device is its number modulo `num_devices_per_node`, whatever is in here."""
        line, pg = tp_mesh(mesh(1, 4)), accelerator.pretend()
        tensor: Any = accelerator.empty(8, 2, index=rank % 3)
        if kind == "DTensor":
            spec = dtensor(numbers(32, 2), line, [S(0)])._spec
            tensor = DTensor(tensor, spec, requires_grad=False)
        elif kind == "ShardedTensor":
            shards = [
                ShardMetadata([8 * r, 0], [8, 2], f"rank:{r}/{accelerator.NAME}:{r % 3}")
                for r in range(4)
            ]
            tensor = ShardedTensor._init_from_local_shards_and_global_metadata(
                [Shard(tensor, shards[rank])],
                ShardedTensorMetadata(
                    shards, torch.Size([32, 2]), TensorProperties(dtype=tensor.dtype)
                ),
                process_group=line.get_group(),
            )
        got = unwrapped(judged(tensor, rank, 4, 3, pg))
        devices = [str(s.placement.device()) for s in got.metadata().shards_metadata]
        expected = [f"{accelerator.NAME}:{r % 3}" for r in range(4)]
        assert devices == expected, f"{devices}, expected {expected}"

    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", [None, R, S(0), S(1)], ids=held_id)
    @pytest.mark.thorough(but=["plain"])
    def test_nothing_is_sent(self, judged: Any, mesh: Any, held: Any) -> None:
        """No collective runs: sizes and groups say all that the metadata hold."""
        root = mesh(2, 2)
        tensor = given(numbers(8, 4), root, held)
        with Collectives() as seen:
            call(judged, tensor, root["dp"].get_group())
        assert seen.count == 0, dict(seen.names)

    @pytest.mark.law("isolation")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", [None, R, S(0), S(1)], ids=held_id)
    @pytest.mark.parametrize("shape", [(2, 2), (1, 4)], ids=["cut", "whole"])
    @pytest.mark.thorough(but=["whole-plain"])
    def test_the_result_is_a_copy(self, judged: Any, mesh: Any, held: Any, shape: Any) -> None:
        """The chunk is memory of its own; the input is not changed; a second call is the same."""
        root = mesh(*shape)
        pg, full = root["dp"].get_group(), numbers(8, 4)
        mine = tp_local(full, root, held)
        for trains in (True, False):
            tensor = nn.Parameter(given(full, root, held), requires_grad=trains)
            before = fingerprint(tensor)
            first = unwrapped(call(judged, tensor, pg))
            second = unwrapped(call(judged, tensor, pg))
            assert fingerprint(tensor) == before, "the input was changed"
            assert not shares_memory(first.local_shards()[0].tensor, tensor), "an alias"
            spoil({"first": first})
            assert fingerprint(tensor) == before, "a write to the result changed the input"
            assert_rows(second, mine, pg, "second result")
            spoil({"live": tensor.detach()})
            assert_rows(second, mine, pg, "after the input changed")

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_the_metadata_are_its_own(self, judged: Any) -> None:
        """Who writes into the metadata of one chunk must not write into another's."""
        made = []  # as long as they live nothing else has their memory

        def shards() -> Any:
            made.append(call(judged, numbers(4, 3), dist.group.WORLD))
            return [*made[-1].metadata().shards_metadata, made[-1].local_shards()[0].metadata]

        assert_of_its_own(shards)

    @pytest.mark.law("isolation")
    @pytest.mark.world(4)
    def test_a_sharded_tensor_stays_as_it_was(self, judged: Any, mesh: Any) -> None:
        """A ShardedTensor, its shards and its metadata are not changed, and not shared."""
        root, full = mesh(2, 2), numbers(8, 3)
        tensor = sharded_tensor(full, rows(full.shape, [4, 4]), tp_mesh(root).get_group())
        local = tensor.local_shards()[0]
        before, said = fingerprint(tensor), (str(tensor.metadata()), str(local.metadata))
        outer = call(judged, tensor, root["dp"].get_group())
        assert fingerprint(tensor) == before, "changed by the call"
        spoil({"result": unwrapped(outer)})
        outer.metadata().shards_metadata[0].shard_sizes[0] = 99
        outer.local_shards()[0].metadata.shard_sizes[0] = 99
        assert fingerprint(tensor) == before, "a write to the result changed the input"
        assert said == (str(tensor.metadata()), str(local.metadata)), "its metadata changed"

    @pytest.mark.law("autograd")
    @pytest.mark.world(2)
    def test_no_graph_is_kept(self, judged: Any, mesh: Any) -> None:
        """The chunk of a trained weight, or of one inside a graph, requires no grad."""
        root = mesh(2, 1)
        for held in (None, R, S(0)):
            weight = nn.Parameter(given(numbers(8, 4), root, held))
            for name, tensor in {"parameter": weight, "result": weight * 1}.items():
                pg = root["dp"].get_group()
                got = unwrapped(judged(tensor, dist.get_rank(pg), 2, 0, pg))
                shard = got.local_shards()[0].tensor
                what = f"{held_id(held)} {name}"
                assert not shard.requires_grad, f"{what}: requires grad"
                assert shard.grad_fn is None, f"{what}: part of a graph"
                properties = got.metadata().tensor_properties
                assert not properties.requires_grad, f"{what}: its metadata require grad"


@pytest.mark.judges("tensor.parallel.fsdp._chunk_tensor")
class TestOwners:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(2)
    def test_both_shards_on_one_rank(self, judged: Any, world: Any) -> None:
        """A ShardedTensor of which some rank has no shard must be refused on every rank."""
        full = numbers(4, 2)
        for owners in ([0, 0], [1, 1]):
            tensor = sharded_tensor(full, rows(full.shape, [2, 2], owners))
            call = partial(judged, tensor, world.rank, 2, 1, dist.group.WORLD)
            assert_raises_everywhere(world, call, kinds=MISSING, name=str(owners))
