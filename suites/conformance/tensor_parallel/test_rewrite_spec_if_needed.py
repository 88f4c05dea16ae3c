"""A sharding spec for a tensor that lies on another device than the spec says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec

from conformance.kit.compare import assert_unchanged, fingerprint
from conformance.kit.data import numbers

CPU = torch.device("cpu")


def said(spec: Any) -> list[tuple[Any, Any]]:
    """(rank, device) of each placement."""
    return [(p.rank(), p.device()) for p in spec.placements]


def spec(*places: str, dim: int = 0) -> ChunkShardingSpec:
    """A spec that chunks `dim` over these places."""
    return ChunkShardingSpec(dim=dim, placements=list(places))


@pytest.mark.judges("tensor.parallel.fsdp._rewrite_spec_if_needed")
class TestRewriteSpecIfNeeded:
    @pytest.mark.law("values")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("rank", [0, 1, 2])
    def test_this_rank_gets_the_tensors_device(self, judged: Any, rank: int) -> None:
        """The place of this rank becomes its tensor's device; sharding and others stay."""
        for dim in (0, 1, -1):
            for places in (
                ["rank:0/cuda:0", "rank:1/cuda:1", "rank:2/cuda:2"],
                ["rank:2/cuda:0", "rank:0/cuda:1", "rank:1/cuda:0"],
            ):
                before = spec(*places, dim=dim)
                got = judged(before, numbers(4, device=CPU), rank)
                assert isinstance(got, ChunkShardingSpec)
                assert got.dim == dim, f"dimension {got.dim}, expected {dim}"
                expected = [(r, CPU if r == rank else d) for r, d in said(before)]
                assert said(got) == expected, f"{places}: {said(got)}, expected {expected}"

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_every_place_of_this_rank(self, judged: Any) -> None:
        """A rank that holds several chunks gets its device for each of them."""
        got = judged(
            spec("rank:1/cuda:0", "rank:0/cuda:0", "rank:1/cuda:1"), numbers(4, device=CPU), 1
        )
        assert said(got) == [(1, CPU), (0, torch.device("cuda:0")), (1, CPU)]

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_any_device(self, judged: Any) -> None:
        """A tensor that is on no CPU gives its own device, index and all."""
        tensor = torch.empty(4, device="meta")
        got = judged(spec("rank:0/cpu", "rank:1/cpu"), tensor, 1)
        assert said(got) == [(0, CPU), (1, tensor.device)]

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_where_nothing_is_needed(self, judged: Any) -> None:
        """A spec that fits, or in which this rank has no place, stays what it says."""
        for name, before, rank in (
            ("fits", spec("rank:0/cpu", "rank:1/cpu"), 1),
            ("others do not fit", spec("rank:0/cuda:0", "rank:1/cpu"), 1),
            ("no place", spec("rank:0/cuda:0", "rank:1/cuda:1"), 2),
            ("no rank", spec("meta", "rank:0/cuda:0"), 1),
        ):
            got = judged(before, numbers(4, device=CPU), rank)
            assert got.dim == before.dim, name
            assert said(got) == said(before), f"{name}: {said(got)}"

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_an_enumerable_spec_keeps_its_shards(self, judged: Any) -> None:
        """A spec that lists its shards keeps their boxes and their ranks."""
        shards = [
            ShardMetadata([0, 0], [1, 2], "rank:0/cpu"),
            ShardMetadata([1, 0], [3, 2], "rank:1/cpu"),
        ]
        before = EnumerableShardingSpec(shards)
        got = judged(before, numbers(4, 2, device=CPU), 0)
        assert isinstance(got, EnumerableShardingSpec)
        assert got.shards == shards

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_every_listed_shard_of_this_rank(self, judged: Any) -> None:
        """A rank that holds several listed shards gets its device for each of them."""
        places = ["rank:1/cuda:0", "rank:0/cuda:0", "rank:1/cuda:1", "rank:1/cpu"]
        shards = [ShardMetadata([n, 0], [1, 2], place) for n, place in enumerate(places)]
        got = judged(EnumerableShardingSpec(shards), numbers(4, 2, device=CPU), 1)
        told = [(s.placement.rank(), s.placement.device()) for s in got.shards]
        assert told == [(1, CPU), (0, torch.device("cuda:0")), (1, CPU), (1, CPU)], f"{told}"

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_the_inputs_stay_as_they_were(self, judged: Any) -> None:
        """The spec and the tensor are not changed; a second call gives the same."""
        before, tensor = spec("rank:0/cuda:0", "rank:1/cuda:1"), numbers(4, device=CPU)
        kept, printed = copy.deepcopy(before), fingerprint(tensor)
        places = list(map(id, before.placements))
        for turn in ("first call", "second call"):
            got = judged(before, tensor, 0)
            assert said(got)[0] == (0, CPU), turn
            assert before == kept, f"{turn}: the spec was changed to {said(before)}"
            assert list(map(id, before.placements)) == places, f"{turn}: other placements"
            got.placements[1] = got.placements[0]
            assert before == kept, f"{turn}: the result shares its list with the spec"
        assert_unchanged(tensor, printed)
