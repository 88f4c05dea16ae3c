"""Where the shards of a DTensor lie in the global tensor."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Shard

from conformance.kit.agree import attempt, exchange
from conformance.kit.boxes import assert_box, assert_tile, boxes
from conformance.kit.collectives import Collectives
from conformance.kit.compare import assert_unchanged, fingerprint
from conformance.kit.data import numbers
from conformance.kit.fsdp1 import tp_mesh
from conformance.kit.generated import drawn, layouts
from conformance.kit.layouts import ONE_D, SS, R, S, dtensor, part, placement_id
from conformance.kit.refusals import assert_refusal, refused

EVEN = [(8, 4), (4, 8, 3), (4, 4), (12, 0, 4)]
UNEVEN = [(5, 3), (7, 6), (3, 1), (1, 2), (9, 5, 2), (0, 3), (3, 0), (2, 5), (6, 6)]


def answer(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """(what the call gives, None) or (None, what it raises)."""
    found: list[Any] = []
    error = attempt(lambda: found.append(call()))
    return (None, error) if error is not None else (found[0], None)


KIND = re.compile("(?i)replica|placement|shard|mesh|dimension")
"""What names the kind of DTensor that has no box."""


@pytest.mark.judges("tensor.parallel.fsdp._get_box")
class TestGetBox:
    @pytest.mark.law("values")
    @pytest.mark.world(1, 2, 4)
    @pytest.mark.parametrize("placements", ONE_D, ids=placement_id)
    @pytest.mark.thorough(but=["w2-S1"])
    def test_the_size_is_this_ranks(
        self, judged: Any, mesh: Any, world: Any, placements: Any
    ) -> None:
        """The size is that of this rank's shard, even, uneven or empty."""
        line = mesh(world.size)
        for size in EVEN + UNEVEN:
            full = numbers(*size)
            _, got = judged(dtensor(full, line, placements))
            expected = tuple(part(full, line, placements).shape)
            assert tuple(got) == expected, f"{size}: size {tuple(got)}, expected {expected}"

    @pytest.mark.law("values")
    @pytest.mark.world(2, 4)
    @pytest.mark.thorough(but=["w2"])
    def test_the_offset_is_the_step(self, judged: Any, mesh: Any, world: Any) -> None:
        """The offset is the step from one even shard to the next; replicas have none."""
        line = mesh(world.size)
        for size in EVEN:
            for placements in ONE_D:
                offsets, _ = judged(dtensor(numbers(*size), line, placements))
                expected = boxes(size, world.size, placements[0])[1][0]
                what = f"{size} {placement_id(placements)}"
                assert tuple(offsets) == expected, f"{what}: {tuple(offsets)} is not {expected}"

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_the_tensor_stays_as_it_was(self, judged: Any, mesh: Any) -> None:
        """The tensor is only looked at."""
        tensor = dtensor(numbers(5, 3), mesh(2), [S(0)])
        before = fingerprint(tensor)
        assert judged(tensor) == judged(tensor)
        assert_unchanged(tensor, before)


@pytest.mark.judges("tensor.parallel.fsdp._get_box_for")
class TestGetBoxFor:
    @pytest.mark.law("values")
    @pytest.mark.world(1, 2, 3, 4)
    @pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
    @pytest.mark.parametrize("placements", [[S(0)], [S(1)]], ids=placement_id)
    @pytest.mark.thorough(but=["w3-S1-even"])
    def test_the_box_of_each_shard(
        self, judged: Any, mesh: Any, world: Any, placements: Any, even: bool
    ) -> None:
        """Box i is where shard i lies, as torch.chunk cuts; together they tile the tensor."""
        line = mesh(world.size)
        for size in EVEN if even else UNEVEN:
            if even and size[placements[0].dim] % world.size:
                continue
            tensor = dtensor(numbers(*size), line, placements)
            found = [judged(tensor, i) for i in range(world.size)]
            for i, expected in enumerate(boxes(size, world.size, placements[0])):
                assert_box(found[i], expected, size, f"shard {i} of {size}")
            assert_tile(found, size, str(size))

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("dim", [0, 1, 2])
    @pytest.mark.thorough(but=["2"])
    def test_fewer_rows_than_ranks(self, judged: Any, mesh: Any, dim: int) -> None:
        """Empty shards have empty boxes inside the tensor, and the others are as they were."""
        line = mesh(4)
        for rows in (0, 1, 2, 3, 5, 6):
            size = [2, 2, 2]
            size[dim] = rows
            tensor = dtensor(numbers(*size), line, [S(dim)])
            for i, expected in enumerate(boxes(size, 4, S(dim))):
                assert_box(judged(tensor, i), expected, size, f"shard {i} of {rows} rows")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(4)
    def test_all_ranks_say_the_same(self, judged: Any, mesh: Any, world: Any) -> None:
        """The boxes are the same on every rank, whatever shard the rank itself holds."""
        line = mesh(4)
        for size in [(7, 3), (5, 4), (2, 2), (8, 4)]:
            tensor = dtensor(numbers(*size), line, [S(0)])
            found = [[list(part) for part in judged(tensor, i)] for i in range(4)]
            told = exchange(world, found, f"boxes-{size[0]}")
            assert told == [told[0]] * 4, f"{size}: by rank {told}"

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_generated_shapes(self, judged: Any, mesh: Any, world: Any) -> None:
        """The boxes of generated shapes tile them."""
        line = mesh(4)
        for size, placements in drawn(layouts(4), 40, world.seed):
            tensor, what = dtensor(numbers(*size), line, placements), placement_id(placements)
            if isinstance(placements[0], Shard):
                found = [judged(tensor, i) for i in range(4)]
                assert_tile(found, size, f"{size} {what}")

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_replicas(self, judged: Any, mesh: Any) -> None:
        """Each replica's box is the whole tensor, or replicas are refused clearly."""
        for size in [(5, 3), (4, 4), (), (0, 3)]:
            tensor = dtensor(numbers(*size), mesh(2), [R])
            for i in range(2):
                got, error = answer(partial(judged, tensor, i))
                if got is not None:
                    assert_box(got, ((0,) * len(size), size), size, f"replica {i} of {size}")
                else:
                    assert_refusal(error, KIND, what=f"replica {i} of {size}")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_strided_shards_are_refused(self, judged: Any, mesh: Any) -> None:
        """A shard whose rows do not lie together is no box, and is refused clearly."""
        full, line = numbers(16, 2), mesh(4)
        tensor = dtensor(full, line, [SS(0, 2)])
        refused(lambda: judged(tensor, 1), KIND, what="one box for rows 2, 3, 10 and 11")

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    def test_a_mesh_of_some_ranks(self, judged: Any, mesh: Any, rank: int) -> None:
        """Shards are counted along the tensor's own mesh."""
        for line, inside in (mesh(2, ranks=[1, 3]), (1, 3)), (mesh(3, ranks=[2, 0, 3]), (0, 2, 3)):
            if rank in inside:
                tensor = dtensor(numbers(6, 3), line, [S(0)])
                for i, expected in enumerate(boxes((6, 3), len(inside), S(0))):
                    assert_box(judged(tensor, i), expected, (6, 3), f"shard {i} of {inside}")

    @pytest.mark.law("cost")
    @pytest.mark.world(2)
    def test_nothing_is_sent(self, judged: Any, mesh: Any) -> None:
        """Boxes are found without communication."""
        tensor = dtensor(numbers(4, 3), mesh(2), [S(0)])
        with Collectives() as seen:
            judged(tensor, 0)
            judged(tensor, 1)
        assert seen.count == 0, dict(seen.names)


@pytest.mark.judges("tensor.parallel.fsdp._get_local_box")
class TestGetLocalBox:
    @pytest.mark.law("values")
    @pytest.mark.world(1, 2, 4)
    @pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
    @pytest.mark.thorough(but=["w2-even"])
    def test_this_ranks_box(self, judged: Any, mesh: Any, world: Any, even: bool) -> None:
        """A rank gets the box of the shard that it holds."""
        line = mesh(world.size)
        for size in EVEN if even else UNEVEN:
            for dim in (0, 1):
                if even and size[dim] % world.size:
                    continue
                expected = boxes(size, world.size, S(dim))[line.get_local_rank()]
                got = judged(dtensor(numbers(*size), line, [S(dim)]))
                assert_box(got, expected, size, f"{size} S{dim}")

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("size", [(8, 3), (5, 3)], ids=["even", "uneven"])
    @pytest.mark.thorough(but=["uneven"])
    def test_its_place_in_the_mesh(self, judged: Any, mesh: Any, rank: int, size: Any) -> None:
        """The rank's place in the tensor's mesh counts, not its number in the world."""
        for ranks in [1, 3], [3, 1, 0, 2], [2, 3]:
            line = mesh(len(ranks), ranks=ranks)
            if rank in ranks:
                expected = boxes(size, len(ranks), S(0))[ranks.index(rank)]
                tensor = dtensor(numbers(*size), line, [S(0)], at=line.get_coordinate())
                assert_box(judged(tensor), expected, size, f"{ranks}")
        root = mesh(2, 2)
        expected = boxes(size, 2, S(0))[rank % 2]
        got = judged(dtensor(numbers(*size), tp_mesh(root), [S(0)]))
        assert_box(got, expected, size, "TP's dimension of a mesh")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_two_dimensions(self, judged: Any, mesh: Any, rank: int) -> None:
        """On a mesh of two dimensions the box is right, or the tensor is refused clearly."""
        full, square = numbers(8, 4), mesh(2, 2)
        for placements in [S(0), S(1)], [R, S(0)], [S(0), S(0)]:
            tensor, what = dtensor(full, square, placements), placement_id(placements)
            got, error = answer(partial(judged, tensor))
            if got is not None:
                offsets, sizes = got
                cut = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
                mine = part(full, square, placements)
                assert torch.equal(full[cut], mine), f"{what}: {got} holds other elements"
            else:
                assert_refusal(error, KIND, what=what)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_strided_shards_are_refused(self, judged: Any, mesh: Any) -> None:
        """A shard whose rows do not lie together is no box, and is refused clearly."""
        tensor = dtensor(numbers(8, 2), mesh(2), [SS(0, 2)])
        refused(lambda: judged(tensor), KIND, what="one box for rows that do not lie together")
