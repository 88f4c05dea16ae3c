"""What FSDP asks over meshes that few build: flattened, built on their own, without this rank."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.testing._internal.two_tensor import TwoTensor

from conformance.kit.compare import assert_same, local
from conformance.kit.data import numbers
from conformance.kit.fsdp1 import HELD, assert_chunked, fsdp_mesh, fsdp_rank, given, held_id
from conformance.kit.layouts import SS, R, S, dtensor, part, read_whole
from conformance.kit.refusals import refused

FULL = (8, 4)
PENDING = Partial()
SIZES = [(8, 4), (7, 4), (6, 5), (3, 5), (1, 1), (4,), (2, 9, 2)]


@pytest.mark.judges("tensor.parallel.fsdp._chunk_dtensor")
class TestChunkDTensorOddMeshes:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", HELD, ids=held_id)
    @pytest.mark.parametrize("shape", [(2, 2, 1), (2, 1, 2), (1, 2, 2)], ids=str)
    @pytest.mark.thorough(but=["(2, 2, 1)-S0"])
    def test_a_flattened_mesh(
        self, judged: Any, mesh: Any, held: Any, shape: tuple[int, ...]
    ) -> None:
        """Chunks over dimensions that were flattened must make up the global tensor."""
        root = mesh(*shape)
        flat = root["rep", "dp"]._flatten()
        for size in SIZES:
            full = numbers(*size)
            leaf = given(full, root, held if held != S(1) or len(size) > 1 else R)
            got = judged(leaf, flat.get_local_rank(), flat)
            assert got.device_mesh == root, f"{size}: on {got.device_mesh}"
            assert_same(read_whole(got), full, f"{size}, {got.placements}")
            # Where TP has cut none of it any dimension will do that is shared alike.
            even = size[0] % 4 == 0
            if held in (None, R):
                even = any(n % flat.size() == 0 for n in size)
            rows = -(-size[0] // flat.size()) if even else size[0]
            most = rows * (full.numel() // size[0])
            assert got._local_tensor.numel() <= most, f"{size}: {got._local_tensor.shape} here"

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", [None, R], ids=held_id)
    def test_without_dimensions(self, judged: Any, mesh: Any, held: Any) -> None:
        """A 0-dim tensor must be held by each rank, in memory of its own."""
        root = mesh(2, 2)
        leaf = given(numbers(), root, held)
        got = judged(leaf, fsdp_rank(root), fsdp_mesh(root))
        assert got.placements == (R, R)
        assert_same(got._local_tensor, numbers())
        local(leaf).zero_()
        assert_same(got._local_tensor, numbers(), "after the tensor was written")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("names", [None, ("x",), ("dp",)], ids=str)
    @pytest.mark.parametrize("shape", [(2, 2), (1, 4)], ids=str)
    @pytest.mark.thorough(but=["(1, 4)-('x',)", "(2, 2)-None"])
    def test_a_tp_mesh_that_was_built_on_its_own(
        self, judged: Any, mesh: Any, rank: int, names: Any, shape: tuple[int, int]
    ) -> None:
        """TP's mesh must be known by its ranks where it was not cut out of the root."""
        root = mesh(*shape)
        if names == ("dp",) and shape == (2, 2):
            names = ("y",)  # the root has such a dimension, of this size
        lines = torch.arange(4).view(shape)
        tp = [DeviceMesh(root.device_type, line, mesh_dim_names=names) for line in lines]
        leaf = dtensor(numbers(*FULL), tp[rank // shape[1]], [S(1)])
        got = judged(leaf, fsdp_rank(root), fsdp_mesh(root))
        assert_chunked(got, numbers(*FULL), root, S(1))


@pytest.mark.judges("tensor.parallel.fsdp._all_gather_dtensor")
class TestAllGatherDTensorOddMeshes:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(3)
    def test_what_cannot_be_gathered(self, judged: Any, mesh: Any, rank: int) -> None:
        """No DTensor, no mesh, and a rank that is not on the mesh must be refused by name."""
        root = mesh(1, 2, ranks=[0, 1])
        leaf = dtensor(numbers(*FULL), root, [S(0), R])
        refused(lambda: judged(numbers(*FULL), root), "DTensor")
        refused(lambda: judged(leaf, None), "mesh")
        if rank == 2:
            refused(lambda: judged(leaf, root), "rank")
        else:
            assert_same(judged(leaf, root), numbers(*FULL))

    @pytest.mark.law("autograd")
    @pytest.mark.world(4)
    def test_what_records_or_holds_nothing(self, judged: Any, mesh: Any) -> None:
        """Chunks that require grad come out without a graph, and those on meta on meta."""
        root, full = mesh(2, 2), numbers(*FULL)
        for placements in ([S(0), R], [S(0), S(1)], [R, S(1)]):
            expected = part(full, root, [R, placements[1]])
            leaf = dtensor(full, root, placements)
            leaf._local_tensor.requires_grad_()
            got = judged(leaf, root)
            assert not got.requires_grad, f"{placements}: a graph"
            assert_same(got, expected, f"{placements}")
            got = judged(dtensor(full.to("meta"), root, placements), root)
            assert got.is_meta, f"{placements}: on {got.device}"
            assert got.shape == expected.shape, f"{placements}: {got.shape}"

    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    def test_tensors_without_values(self, judged: Any, mesh: Any) -> None:
        """Under `FakeTensorMode` the result must have its shape, and be fake itself."""
        root = mesh(2, 2)
        with FakeTensorMode():
            leaf = DTensor.from_local(torch.empty(4, 4), root, [S(0), R], run_check=False)
            got = judged(leaf, root)
        assert isinstance(got, FakeTensor)
        assert tuple(got.shape) == (8, 4)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_large_ones_in_another_order(self, judged: Any, mesh: Any) -> None:
        """A large tensor whose strides are not row-major must come out with its values."""
        root = mesh(2, 2)
        full = torch.arange(2048 * 1024, dtype=torch.float32).view(1024, 2048).t()
        meta = TensorMeta(full.shape, full.stride(), full.dtype)
        mine = part(full, root, [S(0), R])
        leaf = DTensor(mine, DTensorSpec(root, (S(0), R), tensor_meta=meta), requires_grad=False)
        assert_same(judged(leaf, root), full)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("shape", [(2, 2, 1), (1, 2, 2), (2, 1, 2)], ids=str)
    def test_sums_that_are_pending(self, judged: Any, mesh: Any, shape: Any) -> None:
        """A sum that is pending over any dimension but TP's must be taken, in every dtype."""
        root = mesh(*shape)
        for dtype in (torch.float64, torch.complex64, torch.int32, torch.uint8, torch.bfloat16):
            for outer in ([PENDING, R], [R, PENDING], [PENDING, S(0)], [S(1), PENDING]):
                for held in R, S(0):
                    full, placements = numbers(4, 4, dtype=dtype), [*outer, held]
                    got = judged(dtensor(full, root, placements), root)
                    times = shape[outer.index(PENDING)]
                    expected = part(full, root, [R, R, held]) * times
                    assert_same(got, expected, f"{dtype}, {placements}")

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_many_dimensions(self, judged: Any, mesh: Any) -> None:
        """A tensor of as many dimensions as nobody has must be gathered as any other."""
        root = mesh(2, 1)
        for count in range(1, 21):
            for rows in 3, 2:
                full = numbers(rows, *[1] * (count - 1), 2)
                got = judged(dtensor(full, root, [S(0), R]), root)
                assert_same(got, full, f"{count + 1} dimensions")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", [R, S(0), S(1)], ids=held_id)
    @pytest.mark.thorough(but=["S0"])
    def test_stripes_of_any_number(self, judged: Any, mesh: Any, held: Any) -> None:
        """Stripes of any number and size must be gathered, or refused where others hold them."""
        root = mesh(2, 2)
        for stripes in 1, 2, 3, 4:
            for rows in range(1, 13):
                full, placements = numbers(rows, 4), [SS(0, stripes), held]
                leaf = dtensor(full, root, placements, at=root.get_coordinate())
                try:
                    got = judged(leaf, root)
                except ValueError:
                    assert held == S(0), f"{rows} rows in {stripes} stripes are refused"
                    assert stripes != 2 or rows % 4, f"{rows} rows, two stripes each, are refused"
                    continue
                expected = part(full, root, [R, held], root.get_coordinate())
                assert_same(got, expected, f"{rows} rows in {stripes} stripes")


@pytest.mark.judges("tensor.parallel.fsdp._get_local_box")
class TestGetLocalBoxOddMeshes:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(3)
    def test_a_mesh_without_this_rank(self, judged: Any, mesh: Any, rank: int) -> None:
        """A rank that is not on the mesh has no shard, and must be told so."""
        leaf = dtensor(numbers(*FULL), mesh(2, ranks=[0, 1]), [S(0)])
        if rank == 2:
            refused(lambda: judged(leaf), "rank")
        else:
            assert tuple(map(tuple, judged(leaf))) == ((4 * rank, 0), (4, 4))


@pytest.mark.judges("tensor.parallel.fsdp._get_box")
class TestGetBoxOddMeshes:
    @pytest.mark.law("values")
    @pytest.mark.world(3)
    def test_a_mesh_without_this_rank(self, judged: Any, mesh: Any) -> None:
        """The distance from shard to shard is the same for a rank that has none."""
        leaf = dtensor(numbers(*FULL), mesh(2, ranks=[0, 1]), [S(0)])
        assert tuple(judged(leaf)[0]) == (4, 0)


@pytest.mark.judges("tensor.parallel.fsdp._chunk_tensor")
class TestChunkTensorOddLeaves:
    @pytest.mark.law("values")
    @pytest.mark.world(3)
    def test_without_dimensions(self, judged: Any, rank: int) -> None:
        """A 0-dim tensor must be held by one rank, as all ranks are told."""
        got = judged(numbers(), rank, 3, 0, dist.group.WORLD)
        assert tuple(got.metadata().size) == ()
        (shard,) = got.metadata().shards_metadata
        assert list(shard.shard_offsets) == list(shard.shard_sizes) == []
        held = got.local_shards()
        assert len(held) == (shard.placement.rank() == rank)
        for mine in held:
            assert_same(mine.tensor, numbers())


@pytest.mark.judges("tensor.parallel.fsdp._rewrite_spec_if_needed")
class TestRewriteSpecOddLeaves:
    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_what_is_right_already_stays(self, judged: Any, rank: int) -> None:
        """A spec whose placements are right must come back itself; text is read as a placement."""
        places: Any = ["rank:0/cpu", "rank:1/cpu"]
        shards = [ShardMetadata([4 * n, 0], [4, 4], place) for n, place in enumerate(places)]
        for spec in (ChunkShardingSpec(0, places), EnumerableShardingSpec(shards)):
            assert judged(spec, numbers(4, 4), rank) is spec, f"another {type(spec).__name__}"
        there: Any = ["rank:0/cuda:0", "rank:1/cuda:0"]
        shards = [ShardMetadata([4 * n, 0], [4, 4], place) for n, place in enumerate(there)]
        for spec in (ChunkShardingSpec(0, there), EnumerableShardingSpec(shards)):
            got: Any = judged(spec, numbers(4, 4), rank)
            found: Any = (
                got.placements
                if isinstance(got, ChunkShardingSpec)
                else [shard.placement for shard in got.shards]
            )
            devices = [str(place.device()) for place in found]
            wanted = ["cpu" if n == rank else "cuda:0" for n in range(2)]
            assert devices == wanted, f"{type(spec).__name__}: {found}"
        other: Any = object()
        assert judged(other, numbers(4, 4), rank) is other


@pytest.mark.judges("tensor.parallel.fsdp.DTensorExtensions")
class TestExtensionsOddLeaves:
    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("trains", [False, True])
    def test_a_parameter_around_a_wrapper(self, judged: Any, mesh: Any, trains: bool) -> None:
        """What FSDP flattens of a Parameter must be one, whatever its local tensor wraps."""
        mine = part(numbers(*FULL), mesh(2), [S(0)]).clone()
        leaf = dtensor(numbers(*FULL), mesh(2), [S(0)], local=TwoTensor(mine, mine.clone()))
        weight = nn.Parameter(leaf, requires_grad=trains)
        got, _ = judged(torch.device("cpu")).pre_flatten_transform(weight)
        assert isinstance(got, TwoTensor)
        assert isinstance(got, nn.Parameter), "FSDP makes one of it that trains"
        assert got.requires_grad is trains

    @pytest.mark.law("compatibility")
    @pytest.mark.should("upstream asks every device for its current stream")
    @pytest.mark.world(2)
    def test_a_device_without_streams(self, judged: Any, mesh: Any) -> None:
        """A device module that has no streams must serve as one whose streams do nothing."""
        made = judged(types.SimpleNamespace())
        flat, extension = made.pre_flatten_transform(dtensor(numbers(*FULL), mesh(2), [S(0)]))
        assert_same(made.post_unflatten_transform(flat, extension).full_tensor(), numbers(*FULL))
