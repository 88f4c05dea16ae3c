"""Details between FSDP1 and tensor parallelism that other files' inputs do not show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.tensor import DTensor, Partial

from conformance.kit import accelerator
from conformance.kit.agree import assert_raises_everywhere
from conformance.kit.compare import assert_same, local
from conformance.kit.data import numbers
from conformance.kit.fsdp1 import fsdp_mesh, fsdp_rank, given, tp_local, tp_mesh
from conformance.kit.layouts import R, S, dtensor, part, read_whole


def unusual(dtype: torch.dtype) -> torch.Tensor:
    """(8, 2) values that arithmetic does not keep: -0.0, NaNs with a payload, subnormals."""
    wide = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    sign = torch.iinfo(wide).min
    nan = int(torch.tensor(float("nan"), dtype=dtype).view(wide).item())
    found = [sign, nan | 1, nan | sign | 3, 1, 2, sign | 1, 0, sign]
    return torch.tensor(found * 2, dtype=wide).view(8, 2).view(dtype)


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class TestBits:
    @pytest.mark.judges("tensor.parallel.fsdp._chunk_dtensor")
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_chunk_dtensor(self, judged: Any, mesh: Any) -> None:
        """Negative zeros, NaN payloads and subnormals are chunked bit for bit."""
        root = mesh(2, 1)
        for dtype in FLOATS:
            for held in None, R:
                full = unusual(dtype)
                got = judged(given(full, root, held), fsdp_rank(root), fsdp_mesh(root))
                assert_same(local(got), part(full, root, [S(0), R]), f"{dtype} {held}")

    @pytest.mark.judges("tensor.parallel.fsdp._chunk_tensor")
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_chunk_tensor(self, judged: Any, rank: int) -> None:
        """Negative zeros, NaN payloads and subnormals are chunked bit for bit."""
        for dtype in FLOATS:
            full = unusual(dtype)
            got = judged(full, rank, 2, 0, dist.group.WORLD)
            assert_same(got.local_shards()[0].tensor, full.chunk(2)[rank], str(dtype))

    @pytest.mark.judges("tensor.parallel.fsdp._all_gather_dtensor")
    @pytest.mark.law("values")
    @pytest.mark.needs("functional gathers")
    @pytest.mark.world(2)
    def test_all_gather_dtensor(self, judged: Any, mesh: Any) -> None:
        """Negative zeros, NaN payloads and subnormals are gathered bit for bit."""
        root = mesh(2, 1)
        for dtype in FLOATS:
            full = unusual(dtype)
            assert_same(judged(dtensor(full, root, [S(0), R]), root), full, str(dtype))


class TestStrides:
    @pytest.mark.judges("tensor.parallel.fsdp._chunk_dtensor")
    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_the_whole_is_laid_out_as_the_weight(self, judged: Any, mesh: Any) -> None:
        """The chunk of a weight that lies in memory by columns says so of the whole."""
        root = mesh(2, 1)
        for name, weight in {
            "columns": numbers(4, 8).t(),
            "channels last": numbers(4, 3, 2, 2).to(memory_format=torch.channels_last),
        }.items():
            got = judged(weight, fsdp_rank(root), fsdp_mesh(root))
            assert got.stride() == weight.stride(), f"{name}: {got.stride()}"
            whole = local(got)
            assert_same(whole, weight.chunk(2)[fsdp_rank(root)], name)


@pytest.mark.judges("tensor.parallel.fsdp._chunk_dtensor")
class TestPartial:
    @pytest.mark.law("values")
    @pytest.mark.needs("functional gathers")
    @pytest.mark.world(4)
    def test_what_is_to_be_summed(self, judged: Any, mesh: Any) -> None:
        """The chunks of values that are to be summed over TP hold the sum, or are to be summed."""
        root = mesh(2, 2)
        mine = numbers(8, 4) * (root["tp"].get_local_rank() + 1)
        tensor = DTensor.from_local(mine, tp_mesh(root), [Partial()], run_check=False)
        got = judged(tensor, fsdp_rank(root), fsdp_mesh(root))
        assert_same(read_whole(got), numbers(8, 4) * 3, f"as {got.placements}")


@pytest.mark.judges("tensor.parallel.fsdp._all_gather_dtensor")
class TestWrongLargeChunk:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=4, limit=25)
    def test_on_one_rank(self, judged: Any, mesh: Any, world: Any) -> None:
        """A chunk of some MiB that is not what its placement says is an error on every rank."""
        root, full = mesh(2, 1), torch.ones(2048, 1024)
        mine = torch.ones(1023 if world.rank else 1024, 1024)
        tensor = DTensor(mine, dtensor(full, root, [S(0), R])._spec, requires_grad=False)
        assert_raises_everywhere(world, lambda: judged(tensor, root), "rank 1")


class TestDevices:
    @pytest.mark.judges("tensor.parallel.fsdp._rewrite_spec_if_needed")
    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_another_device_of_the_kind(self, judged: Any) -> None:
        """A tensor that is on another device of the same kind gives its own index."""
        accelerator.pretend()
        name = accelerator.NAME
        spec = ChunkShardingSpec(0, [f"rank:0/{name}:1", f"rank:1/{name}:1"])
        got = judged(spec, accelerator.empty(4, index=2), 0)
        assert [str(p.device()) for p in got.placements] == [f"{name}:2", f"{name}:1"]

    @pytest.mark.judges("tensor.parallel._data_parallel_utils._unflatten_tensor")
    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_the_spec_keeps_its_dtype(self, judged: Any, mesh: Any) -> None:
        """A local tensor that was cast changes nothing about the spec that is given."""
        spec = dtensor(numbers(4, 3), mesh(1), [S(0)])._spec
        for trains in (True, False):
            mine = numbers(4, 3, dtype=torch.bfloat16).requires_grad_(trains)
            got = judged(mine, spec)
            assert got.dtype == torch.bfloat16, f"dtype {got.dtype}"
            assert spec.tensor_meta is not None
            assert spec.tensor_meta.dtype == torch.float32, f"the spec says {spec.tensor_meta}"


@pytest.mark.judges("tensor.parallel.fsdp._chunk_tensor")
class TestNothingLeft:
    @pytest.mark.law("structure")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("size", [(4, 4), (2, 4)], ids=str)
    @pytest.mark.thorough(but=["(2, 4)"])
    def test_an_empty_shard_is_there(self, judged: Any, mesh: Any, size: Any) -> None:
        """In what TP has sharded each rank of FSDP has a shard, if an empty one: planners look."""
        root, full = mesh(4, 1), numbers(*size)
        full = full[: size[0] - 1]
        pg = root["dp"].get_group()
        outer = judged(given(full, root, S(0)), dist.get_rank(pg), 4, 0, pg)
        (shard,) = outer.local_shards()
        assert isinstance(shard.tensor, ShardedTensor), f"a {type(shard.tensor).__name__}"
        (inner,) = shard.tensor.local_shards()
        mine = tp_local(full, root, S(0))
        expected = part(mine, root, [S(0), R])
        assert_same(inner.tensor, expected)
