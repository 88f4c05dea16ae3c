"""The shards from which FSDP1 loads a weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import (
    ShardedTensorMetadata,
    TensorProperties,
)
from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard

from conformance.kit.collectives import Collectives
from conformance.kit.compare import assert_same, fingerprint
from conformance.kit.data import DTYPES, numbers
from conformance.kit.fsdp1 import fsdp_mesh, tp_local, tp_mesh
from conformance.kit.layouts import S, rows, sharded_tensor


def nested(full: torch.Tensor, root: Any) -> tuple[ShardedTensor, ShardedTensor]:
    """(outer, inner) of a weight that TP shards by row, and FSDP cuts once more."""
    line, column = tp_mesh(root), fsdp_mesh(root)
    mine = tp_local(full, root, S(0))
    pieces = [len(p) for p in torch.arange(len(mine)).chunk(column.size())]
    counts = pieces + [0] * (column.size() - len(pieces))
    inner = sharded_tensor(mine, rows(mine.shape, counts), column.get_group())
    half = len(full) // 2
    metadata = [
        ShardMetadata([i * half, 0], [half, full.shape[1]], f"rank:{owner}/{full.device}")
        for i, owner in enumerate(line.mesh.tolist())
    ]
    here = metadata[line.get_local_rank()]
    outer = ShardedTensor._init_from_local_shards_and_global_metadata(
        [LocalShard(inner, here)],
        ShardedTensorMetadata(metadata, full.size(), TensorProperties(dtype=full.dtype)),
        process_group=line.get_group(),
    )
    return outer, inner


@pytest.mark.judges("tensor.parallel.fsdp._pre_load_state_dict")
class TestPreLoadStateDict:
    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_the_list_is_the_callers(self, judged: Any, rank: int) -> None:
        """However many shards a rank has, what a caller does with the list changes no tensor."""
        full = numbers(6, 2)
        for owners in ([0, 0], [1, 1], [0, 1]):
            tensor = sharded_tensor(full, rows(full.shape, [4, 2], owners))
            held = list(tensor.local_shards())
            assert len(held) == owners.count(rank)
            _, shards = judged(tensor)
            assert list(map(id, shards)) == list(map(id, held)), f"{owners}: other shards"
            shards.clear()
            assert tensor.local_shards() == held, f"{owners}: the tensor's own list is handed out"

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_a_nested_tensor_is_unwrapped(self, judged: Any, mesh: Any) -> None:
        """Of a ShardedTensor in a ShardedTensor come the inner one and its shards."""
        root = mesh(2, 2)
        for size in [(8, 3), (6, 2), (4, 1)]:
            full = numbers(*size)
            outer, inner = nested(full, root)
            got, shards = judged(outer)
            assert got is inner, f"{size}: {type(got).__name__} of size {tuple(got.size())}"
            assert len(shards) == 1, f"{size}: {len(shards)} shards"
            mine = tp_local(full, root, S(0)).chunk(2)[root["dp"].get_local_rank()]
            assert_same(shards[0].tensor, mine, str(size))

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_a_flat_tensor_is_itself(self, judged: Any, world: Any) -> None:
        """A ShardedTensor of plain shards comes back with all its shards: none, one, several."""
        full = numbers(10, 2)
        for name, counts, owners in (
            ("one each", [3, 3, 3, 1], None),
            ("rank 3 has none", [4, 4, 2], [0, 1, 2]),
            ("rank 0 has two", [4, 2, 2, 2], [0, 1, 0, 2]),
            ("other order", [4, 3, 3, 0], [3, 2, 1, 0]),
        ):
            tensor = sharded_tensor(full, rows(full.shape, counts, owners))
            expected = tensor.local_shards()
            got, shards = judged(tensor)
            assert got is tensor, f"{name}: another tensor"
            assert isinstance(shards, list), f"{name}: a {type(shards).__name__}"
            assert len(shards) == len(expected), f"{name}: {len(shards)} of {len(expected)} shards"
            for ours, theirs in zip(shards, expected, strict=True):
                assert ours.tensor is theirs.tensor, f"{name}: another shard"
                assert ours.metadata == theirs.metadata, f"{name}: {ours.metadata}"

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_every_dtype(self, judged: Any) -> None:
        """Shards of every dtype come as they are."""
        for dtype in DTYPES:
            full = numbers(4, 2, dtype=dtype)
            _, shards = judged(sharded_tensor(full, rows(full.shape, [4])))
            assert_same(shards[0].tensor, full, str(dtype))

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    def test_a_group_of_some_ranks(self, judged: Any, mesh: Any, rank: int) -> None:
        """Tensors over a group without global rank 0 are served, too."""
        line, full = mesh(2, ranks=[1, 3]), numbers(5, 2)
        if rank in (1, 3):
            tensor = sharded_tensor(full, rows(full.shape, [2, 3]), line.get_group())
            got, shards = judged(tensor)
            assert got is tensor
            assert_same(shards[0].tensor, full.split([2, 3])[rank // 2])

    @pytest.mark.law("isolation")
    @pytest.mark.world(4)
    def test_nothing_is_changed(self, judged: Any, mesh: Any) -> None:
        """The tensors are not changed, nothing is sent, and a second call gives the same."""
        outer, inner = nested(numbers(8, 3), mesh(2, 2))
        before = fingerprint(inner)
        with Collectives() as seen:
            first, shards = judged(outer)
            again, second = judged(outer)
            flat, _ = judged(inner)
        assert seen.count == 0, dict(seen.names)
        assert first is again is flat is inner
        assert [s.tensor for s in shards] == [s.tensor for s in second]
        assert outer.local_shards()[0].tensor is inner, "the outer tensor was changed"
        assert fingerprint(inner) == before, "the inner tensor was changed"
