"""A DTensor described in ShardedTensor's terms: metadata, and the group that it speaks of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard
from torch.distributed.device_mesh import DeviceMesh

from conformance.kit.agree import exchange
from conformance.kit.boxes import assert_box, assert_of_its_own, assert_tile, boxes
from conformance.kit.collectives import Collectives
from conformance.kit.compare import assert_unchanged, fingerprint
from conformance.kit.data import DTYPES, numbers
from conformance.kit.fsdp1 import tp_mesh
from conformance.kit.layouts import ONE_D, R, S, dtensor, placement_id

EVEN = [(8, 4), (4, 8, 3), (12, 0, 4)]
UNEVEN = [(5, 3), (7, 6), (9, 5, 2)]
WITH_EMPTY = [(3, 1), (1, 2), (2, 5), (0, 3), (3, 0)]
SIZES = {"even": EVEN, "uneven": UNEVEN, "empty": WITH_EMPTY}


def box_of(shard: ShardMetadata) -> tuple[list[int], list[int]]:
    """The box of a shard as its metadata has it."""
    return shard.shard_offsets, shard.shard_sizes


def seat(shard: ShardMetadata) -> int:
    """The rank that the metadata gives the shard to."""
    owner = None if shard.placement is None else shard.placement.rank()
    assert owner is not None, f"on no rank: {shard}"
    return owner


def plain(metadata: Any) -> list[Any]:
    """What ranks must agree on, as JSON."""
    return [[*box_of(shard), str(shard.placement)] for shard in metadata.shards_metadata] + [
        list(metadata.size),
        str(metadata.tensor_properties.dtype),
    ]


@pytest.mark.judges("tensor.parallel.fsdp._create_shard_md_from_dt")
class TestCreateShardMdFromDt:
    @pytest.mark.law("values")
    @pytest.mark.world(1, 2, 4)
    @pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
    @pytest.mark.thorough(but=["w2-even"])
    def test_this_ranks_shard(self, judged: Any, mesh: Any, world: Any, sizes: Any) -> None:
        """The metadata holds the box, the rank and the device of this rank's shard."""
        line = mesh(world.size)
        for size in sizes:
            for dim in (0, 1):
                if sizes is EVEN and size[dim] % world.size:
                    continue
                what, tensor = f"{size} S{dim}", dtensor(numbers(*size), line, [S(dim)])
                got = judged(tensor, world.rank)
                assert isinstance(got, ShardMetadata), f"{what}: a {type(got).__name__}"
                expected = boxes(size, world.size, S(dim))[world.rank]
                assert_box(box_of(got), expected, size, what)
                assert seat(got) == world.rank, f"{what}: {got.placement}"
                assert got.placement is not None
                device = got.placement.device()
                assert device == tensor._local_tensor.device, f"{what}: {got.placement}"

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_a_replica(self, judged: Any, mesh: Any, rank: int) -> None:
        """A replica's shard is the whole tensor."""
        for size in [(5, 3), (4, 4)]:
            got = judged(dtensor(numbers(*size), mesh(2), [R]), rank)
            assert_box(box_of(got), ((0, 0), size), size, str(size))
            assert seat(got) == rank

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_the_rank_it_is_told(self, judged: Any, mesh: Any, rank: int) -> None:
        """The shard's owner must be the rank that the caller names, whichever rank calls."""
        for placement in S(0), R:
            for owner in (1 - rank, 7):
                got = judged(dtensor(numbers(4, 3), mesh(2), [placement]), owner)
                assert seat(got) == owner, f"{placement}: {got.placement}, expected rank {owner}"

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_the_metadata_are_its_own(self, judged: Any, mesh: Any, rank: int) -> None:
        """Who writes into the metadata of one shard must not write into another's."""
        tensor = dtensor(numbers(4, 3), mesh(2), [S(0)])
        assert_of_its_own(lambda: [judged(tensor, rank)])

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_the_tensor_stays_as_it_was(self, judged: Any, mesh: Any, rank: int) -> None:
        """The tensor is not changed; a second call gives the same, and nothing is sent."""
        tensor = dtensor(numbers(4, 3), mesh(2), [S(0)])
        before = fingerprint(tensor)
        with Collectives() as seen:
            assert judged(tensor, rank) == judged(tensor, rank)
        assert seen.count == 0, dict(seen.names)
        assert_unchanged(tensor, before)


@pytest.mark.judges("tensor.parallel.fsdp._create_sharded_tensor_md_from_dt")
class TestCreateShardedTensorMdFromDt:
    @pytest.mark.law("values")
    @pytest.mark.world(1, 2, 4)
    @pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
    @pytest.mark.thorough(but=["w2-even"])
    def test_it_covers_the_tensor(self, judged: Any, mesh: Any, world: Any, sizes: Any) -> None:
        """The shards tile the tensor, even, uneven and empty ones."""
        line = mesh(world.size)
        for size in sizes:
            for placements in ONE_D:
                dim = getattr(placements[0], "dim", None)
                if sizes is EVEN and dim is not None and size[dim] % world.size:
                    continue
                tensor, what = dtensor(numbers(*size), line, placements), placement_id(placements)
                got = judged(tensor, line.get_group())
                assert tuple(got.size) == size, f"{size} {what}: size {got.size}"
                assert_tile(map(box_of, got.shards_metadata), size, f"{size} {what}")

    @pytest.mark.law("values")
    @pytest.mark.world(2, 4)
    @pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
    @pytest.mark.thorough(but=["w2-even"])
    def test_each_shard_is_where_it_says(
        self, judged: Any, mesh: Any, world: Any, sizes: Any
    ) -> None:
        """Each shard is placed on the rank that holds it, on every rank's word."""
        line = mesh(world.size)
        for size in sizes:
            for dim in (0, 1):
                what = f"{size} S{dim}"
                got = judged(dtensor(numbers(*size), line, [S(dim)]), line.get_group())
                held = {seat(s): box_of(s) for s in got.shards_metadata if 0 not in s.shard_sizes}
                truth = {
                    owner: box
                    for owner, box in enumerate(boxes(size, world.size, S(dim)))
                    if 0 not in box[1]
                }
                assert held.keys() == truth.keys(), f"{what}: on ranks {held}, expected {truth}"
                for owner, box in truth.items():
                    assert_box(held[owner], box, size, f"{what}, rank {owner}")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, 4)
    @pytest.mark.parametrize("placements", ONE_D, ids=placement_id)
    @pytest.mark.thorough(but=["w2-S0"])
    def test_all_ranks_say_the_same(
        self, judged: Any, mesh: Any, world: Any, placements: Any
    ) -> None:
        """Every rank describes the tensor in the same words."""
        line = mesh(world.size)
        for size in [(8, 4), (7, 5), (1, 1)]:
            got = plain(judged(dtensor(numbers(*size), line, placements), line.get_group()))
            told = exchange(world, got, f"metadata-{size[0]}")
            assert told == [told[0]] * world.size, f"{size}, by rank: {told}"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_the_properties(self, judged: Any, mesh: Any) -> None:
        """Dtype, layout and requires_grad are the tensor's."""
        line = mesh(1)
        for dtype in DTYPES:
            properties = judged(
                dtensor(numbers(4, dtype=dtype), line, [S(0)]), line.get_group()
            ).tensor_properties
            assert properties.dtype == dtype, f"{dtype}: {properties.dtype}"
            assert properties.layout == torch.strided, f"{dtype}: {properties.layout}"
            assert not properties.requires_grad, f"{dtype}: requires grad"
        trained = dtensor(numbers(4), line, [S(0)]).requires_grad_()
        assert judged(trained, line.get_group()).tensor_properties.requires_grad

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("size", [(8, 3), (5, 3)], ids=["even", "uneven"])
    @pytest.mark.thorough(but=["even"])
    def test_a_sharded_tensor_can_be_made_of_it(
        self, judged: Any, mesh: Any, rank: int, size: Any
    ) -> None:
        """Each rank of TP's group makes a ShardedTensor of the metadata and its local tensor."""
        line = tp_mesh(mesh(2, 2))
        tensor = dtensor(numbers(*size), line, [S(0)])
        got = judged(tensor, line.get_group())
        assert sorted(map(seat, got.shards_metadata)) == line.mesh.tolist(), (
            f"on {[str(s.placement) for s in got.shards_metadata]}, of {line}"
        )
        mine = [LocalShard(tensor._local_tensor, s) for s in got.shards_metadata if seat(s) == rank]
        made = ShardedTensor._init_from_local_shards_and_global_metadata(
            mine, sharded_tensor_metadata=got, process_group=line.get_group()
        )
        assert tuple(made.size()) == size
        expected = boxes(size, 2, S(0))[line.get_local_rank()]
        assert_box(box_of(made.local_shards()[0].metadata), expected, size, "local shard")

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_the_metadata_are_its_own(self, judged: Any, mesh: Any) -> None:
        """Who writes into the metadata of one tensor must not write into another's."""
        line, tensor = mesh(2), dtensor(numbers(4, 3), mesh(2), [S(0)])
        assert_of_its_own(lambda: judged(tensor, line.get_group()).shards_metadata)

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_the_tensor_stays_as_it_was(self, judged: Any, mesh: Any) -> None:
        """The tensor is not changed; a second call gives the same, and nothing is sent."""
        line = mesh(2)
        for placements in ONE_D:
            tensor, what = dtensor(numbers(4, 2), line, placements), placement_id(placements)
            before = fingerprint(tensor)
            with Collectives() as seen:
                first = plain(judged(tensor, line.get_group()))
                second = plain(judged(tensor, line.get_group()))
            assert first == second, f"{what}: {first}, then {second}"
            assert seen.count == 0, f"{what}: {dict(seen.names)}"
            assert_unchanged(tensor, before, what)


@pytest.mark.judges("tensor.parallel.fsdp._get_dt_pg")
class TestGetDtPg:
    @pytest.mark.law("group")
    @pytest.mark.world(4)
    def test_the_group_of_the_tensors_mesh(self, judged: Any, mesh: Any, rank: int) -> None:
        """A DTensor's group is that of its mesh: all ranks, some of them, a dimension of more."""
        root = mesh(2, 2)
        own = DeviceMesh.from_group(dist.new_group(range(4)), root.device_type)
        lines = [mesh(4), mesh(2, ranks=[1, 3]), tp_mesh(root), root["dp"], own]
        for line in lines:
            ranks = line.mesh.tolist()
            if rank in ranks:
                got = judged(dtensor(numbers(4, 2), line, [S(0)]))
                assert isinstance(got, dist.ProcessGroup), f"{ranks}: a {type(got).__name__}"
                assert got is line.get_group(), f"{ranks}: another group"
                assert sorted(dist.get_process_group_ranks(got)) == sorted(ranks)

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_no_group_is_made(self, judged: Any, mesh: Any) -> None:
        """Asking for the group makes none, and sends nothing."""
        tensor = dtensor(numbers(4, 2), mesh(2), [R])
        known = len(dist.distributed_c10d._world.pg_map)
        with Collectives() as seen:
            assert judged(tensor) is judged(tensor)
        assert seen.count == 0, dict(seen.names)
        assert len(dist.distributed_c10d._world.pg_map) == known
