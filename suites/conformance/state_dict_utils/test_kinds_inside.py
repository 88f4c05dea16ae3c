"""Ties and claims of leaves that hold tensors: wrappers in DTensors, shards in ShardedTensors."""

from __future__ import annotations

from typing import Any

import pytest
from torch.distributed.remote_device import _remote_device

from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.layouts import R, S, part, rows, sharded_tensor
from conformance.kit.subclasses import assert_holds_pair, inside, subclass_with


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherKindsInside:
    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @pytest.mark.needs("functional gathers")
    @pytest.mark.parametrize("flatten", [True, False], ids=["traceable", "closed"])
    def test_tied_wrappers(self, judged: Any, mesh: Any, flatten: bool) -> None:
        """Tied DTensors around a wrapper must come back tied, and others apart."""
        kind, full, line = subclass_with(None, flatten), numbers(6, 4), mesh(2)
        for placement in S(0), R:
            local = kind.of(part(full, line, [placement]).clone())
            one = inside(local, full, line, [placement])
            same = inside(local, full, line, [placement])
            other = inside(kind.of(local.first.clone()), full, line, [placement])
            got = judged({"a": one, "b": [one], "c": same, "d": other})
            assert got["a"] is got["b"][0], f"{placement}: one leaf became two"
            assert got["a"] is got["c"], f"{placement}: tied leaves came apart"
            assert got["a"] is not got["d"], f"{placement}: leaves that were apart became one"
            for name in "acd":
                assert_holds_pair(got[name], kind, full, f"{placement}: {name}")


@pytest.mark.judges("_state_dict_utils._copy_state_dict")
class TestCopyKindsInside:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_shards_that_are_told_to_lie_elsewhere(self, judged: Any, rank: int) -> None:
        """Shards must be copied wherever their metadata say that they lie."""
        full = numbers(6, 3)
        source, target = (
            sharded_tensor(value, rows(value.shape, [4, 2])) for value in (full, full * 0)
        )
        for shard in target.local_shards():
            shard.metadata.placement = _remote_device(f"rank:{1 - rank}/cpu")
        got = judged({"x": source}, {"x": target})["x"]
        assert got is target
        for shard in target.local_shards():
            (at, _), (count, _) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            assert_same(shard.tensor, full[at : at + count], f"rank {rank}")
