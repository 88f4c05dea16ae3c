"""_all_gather_sharded_tensor: a ShardedTensor, whole, on every rank of its group."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from conformance.kit.agree import assert_raises_everywhere
from conformance.kit.collectives import Collectives
from conformance.kit.compare import assert_same, fingerprint, shares_memory
from conformance.kit.data import SOME_DTYPES, dtype_id, numbers
from conformance.kit.groups import UNSORTED, group
from conformance.kit.layouts import rows, sharded_tensor
from conformance.kit.levels import COUNT
from conformance.kit.refusals import shape_of

Boxes = list[tuple[list[int], list[int], int]]
Layout = tuple[tuple[int, ...], Boxes]


def _chunks(length: int, ranks: int) -> list[int]:
    """How many rows torch.chunk gives to each rank that it gives any."""
    return [len(piece) for piece in torch.arange(length).chunk(ranks)]


def _grid(row_cuts: list[int], column_cuts: list[int], owners: list[int]) -> Boxes:
    cells = [(r, c) for r in pairwise(row_cuts) for c in pairwise(column_cuts)]
    return [
        ([r0, c0], [r1 - r0, c1 - c0], owner)
        for ((r0, r1), (c0, c1)), owner in zip(cells, owners, strict=True)
    ]


LAYOUTS: dict[str, Callable[[int], Layout]] = {
    "even": lambda n: ((2 * n, 3), rows((2 * n, 3), [2] * n)),
    "one dimension": lambda n: ((2 * n,), rows((2 * n,), [2] * n)),
    "last shard short": lambda n: ((2 * n - 1, 3), rows((2 * n - 1, 3), [2] * (n - 1) + [1])),
    "last rank without": lambda n: ((2 * n - 2, 3), rows((2 * n - 2, 3), [2] * (n - 1))),
    "first rank without": lambda n: (
        (2 * n - 2, 3),
        rows((2 * n - 2, 3), [2] * (n - 1), list(range(1, n))),
    ),
    "first shard short": lambda n: ((2 * n - 1, 3), rows((2 * n - 1, 3), [1] + [2] * (n - 1))),
    "rising": lambda n: (
        (n * (n + 1) // 2, 2),
        rows((n * (n + 1) // 2, 2), list(range(1, n + 1))),
    ),
    "empty shard": lambda n: ((2 * n - 2, 3), rows((2 * n - 2, 3), [2] * (n - 1) + [0])),
    "empty shard beside": lambda n: (
        (2 * n, 3),
        rows((2 * n, 3), [2, 0] + [2] * (n - 1), [0, 0, *range(1, n)]),
    ),
    "empty shard before": lambda n: (
        (2 * n, 3),
        rows((2 * n, 3), [0, 2] + [2] * (n - 1), [0, 0, *range(1, n)]),
    ),
    "all on the last rank": lambda n: ((5, 2), rows((5, 2), [5], [n - 1])),
    "owners reversed": lambda n: (
        (2 * n, 3),
        rows((2 * n, 3), [2] * n, list(reversed(range(n)))),
    ),
    "two shards a rank": lambda n: (
        (2 * n, 3),
        rows((2 * n, 3), [1] * 2 * n, [i // 2 for i in range(2 * n)]),
    ),
    "shards dealt in turn": lambda n: (
        (3 * n, 2),
        rows((3 * n, 2), [1] * 3 * n, [i % n for i in range(3 * n)]),
    ),
    "columns": lambda n: ((3, 2 * n), rows((3, 2 * n), [2] * n, dim=1)),
    "columns uneven": lambda n: ((3, 2 * n - 1), rows((3, 2 * n - 1), [1] + [2] * (n - 1), dim=1)),
    "inner of three": lambda n: ((2, 2 * n, 3), rows((2, 2 * n, 3), [2] * n, dim=1)),
    "grid": lambda n: ((5, 7), _grid([0, 2, 5], [0, 4, 7], [0, n - 1, 1, 0])),
}
"""Name to a layout for n ranks, n > 1: the size, and the boxes as `sharded_tensor` takes them."""


@pytest.mark.judges("_state_dict_utils._all_gather_sharded_tensor")
class TestAllGatherShardedTensor:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("dtype", [*SOME_DTYPES, torch.float8_e5m2, torch.int64], ids=dtype_id)
    @pytest.mark.thorough(but=["bfloat16", "uint16", "bool", "complex64", "float8_e5m2"])
    def test_every_dtype_is_gathered_to_the_bit(self, judged: Any, dtype: torch.dtype) -> None:
        """A ShardedTensor of any dtype is gathered bit for bit."""
        full = numbers(4, 3, dtype=dtype)
        assert_same(judged(sharded_tensor(full, rows((4, 3), [2, 2]))), full)

    @pytest.mark.law("values")
    @pytest.mark.world(3)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.thorough(but=["owners reversed"])
    def test_every_layout_is_gathered(self, judged: Any, world: Any, layout: str) -> None:
        """Every element comes to its place, whichever rank holds it in whichever shard."""
        size, boxes = LAYOUTS[layout](world.size)
        full = numbers(*size)
        assert_same(judged(sharded_tensor(full, boxes)), full, layout)

    @pytest.mark.law("values")
    @pytest.mark.world(3)
    def test_shards_in_any_order(self, judged: Any, subject: Any, world: Any) -> None:
        """Where a rank has several shards each must come to its box, in whatever order they are."""
        gather = subject.function("_state_dict_utils._gather_state_dict")
        for name, layout in LAYOUTS.items():
            size, boxes = layout(world.size)
            full = numbers(*size)
            for turn in range(2):
                tensor = sharded_tensor(full, boxes)
                held = tensor.local_shards()
                if turn == 0:
                    held.reverse()
                elif world.rank == 0:
                    held[:] = held[1:] + held[:1]
                assert_same(judged(tensor), full, f"{name}, {turn}")
                assert_same(gather({"w": tensor})["w"], full, f"{name}, {turn}, in a state dict")

    @pytest.mark.law("values")
    @pytest.mark.world(1, 2, 3, 4)
    @pytest.mark.thorough(but=["w3"])
    def test_torch_chunks_of_every_length_are_gathered(self, judged: Any, world: Any) -> None:
        """Shards cut as torch.chunk cuts are gathered for every length, ranks without any too."""
        for length in range(1, 10):
            for rest in ((), (3,)):
                full = numbers(length, *rest, salt=length)
                boxes = rows(full.shape, _chunks(length, world.size))
                assert_same(judged(sharded_tensor(full, boxes)), full, f"size {(length, *rest)}")

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("size", [(), (0,), (0, 3), (3, 0)], ids=str)
    def test_scalars_and_zero_size_dimensions(self, judged: Any, size: tuple[int, ...]) -> None:
        """A 0-dim ShardedTensor, and one without elements, is gathered with its size and dtype."""
        full = numbers(*size, dtype=torch.bfloat16)
        assert_same(judged(sharded_tensor(full, [([0] * len(size), list(size), 0)])), full)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_a_shard_that_is_not_contiguous_is_gathered(self, judged: Any, rank: int) -> None:
        """A shard is read in logical order, whatever its strides."""
        full = numbers(4, 3)
        tensor = sharded_tensor(full, rows((4, 3), [2, 2]))
        shard = tensor.local_shards()[0]
        shard.tensor = shard.tensor.t().contiguous().t()
        assert_same(judged(tensor), full)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_the_result_is_on_the_device_asked_for(self, judged: Any, device: torch.device) -> None:
        """With `device` given the result is there."""
        full = numbers(4, 3, device=device)
        got = judged(sharded_tensor(full, rows((4, 3), [2, 2])), None, device)
        assert got.device == device, f"on {got.device}, expected {device}"
        assert_same(got, full)

    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    def test_the_result_is_memory_of_its_own(self, judged: Any, world: Any) -> None:
        """The shards are only read, the result shares nothing with them, a second call agrees."""
        full = numbers(4, 3)
        tensor = sharded_tensor(full, rows((4, 3), _chunks(4, world.size)))
        before = fingerprint(tensor)
        first, second = judged(tensor), judged(tensor)
        assert fingerprint(tensor) == before, "the call changed the ShardedTensor"
        assert not shares_memory(first, second), "two calls share memory"
        for shard in tensor.local_shards():
            assert not shares_memory(first, shard.tensor), "the result aliases a shard"
            shard.tensor.fill_(77)
        assert_same(first, full, "the first result, after the shards changed")
        assert_same(second, full, "the second result, after the shards changed")

    @pytest.mark.law("autograd")
    @pytest.mark.world(2)
    def test_shards_that_require_grad_leave_no_graph(self, judged: Any) -> None:
        """The result of shards that require grad has no graph."""
        full = numbers(4, 3)
        tensor = sharded_tensor(full, rows((4, 3), [2, 2]))
        tensor.local_shards()[0].tensor.requires_grad_()
        got = judged(tensor)
        assert got.grad_fn is None, f"the result keeps a graph: {got.grad_fn}"
        assert_same(got, full)

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("passed", [True, False], ids=["pg", "no-pg"])
    @pytest.mark.thorough(but=["no-pg"])
    def test_two_groups_side_by_side_do_not_mix(self, judged: Any, rank: int, passed: bool) -> None:
        """Without `pg` the tensor's own group is used, and with it that group: no other rank's."""
        groups = [group(0, 1), group(2, 3)]
        mine = rank // 2
        full = numbers(4, 3, salt=mine)
        tensor = sharded_tensor(full, rows((4, 3), [2, 2]), groups[mine])
        assert_same(judged(tensor, groups[mine]) if passed else judged(tensor), full)

    @pytest.mark.law("group")
    @pytest.mark.world(3)
    def test_a_group_without_global_rank_0(self, judged: Any, rank: int) -> None:
        """Only the members of `pg` take part; global rank 0 need not be one."""
        members = group(1, 2)
        if rank == 0:
            return
        full = numbers(3, 2)
        assert_same(judged(sharded_tensor(full, rows((3, 2), [2, 1]), members), members), full)

    @pytest.mark.law("group")
    @pytest.mark.world(3)
    @UNSORTED
    @pytest.mark.parametrize("passed", [True, False], ids=["pg", "no-pg"])
    @pytest.mark.thorough(but=["no-pg"])
    def test_a_group_in_another_rank_order(self, judged: Any, passed: bool) -> None:
        """Where group rank and global rank differ, each shard still comes to its place."""
        turned = group(2, 0, 1)
        full = numbers(6, 2)
        tensor = sharded_tensor(full, rows((6, 2), [2, 2, 2]), turned)
        assert_same(judged(tensor, turned) if passed else judged(tensor), full)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=25)
    def test_a_shard_smaller_than_its_metadata_raises_on_every_rank(
        self, judged: Any, world: Any
    ) -> None:
        """A shard on one rank that is not what the metadata state raises the same on every rank."""
        tensor = sharded_tensor(numbers(4, 3), rows((4, 3), [2, 2]))
        if world.rank == 1:
            shard = tensor.local_shards()[0]
            shard.tensor = shard.tensor[:1].clone()
        told = re.compile(rf"rank 1|{shape_of(1, 3)}|{shape_of(2, 3)}")
        assert_raises_everywhere(world, lambda: judged(tensor), told)

    @pytest.mark.law("cost")
    @pytest.mark.should(COUNT)
    @pytest.mark.world(2)
    def test_collectives_do_not_grow_with_the_shards(self, judged: Any) -> None:
        """Sixteen shards a rank need as many collectives as one."""
        counts = []
        for shards in (1, 16):
            owners = [i // shards for i in range(2 * shards)]
            boxes = rows((32, 3), [16 // shards] * 2 * shards, owners)
            with Collectives() as seen:
                judged(sharded_tensor(numbers(32, 3), boxes))
            counts.append(seen.count)
        assert counts[0] == counts[1] > 0, f"collectives for 1 and 16 shards a rank: {counts}"
