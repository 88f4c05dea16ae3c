"""Tensor subclasses between FSDP1 and tensor parallelism, with no operation but upstream's.

The operations of each type are measured: torch's own function is called with a type that can do
everything, and what it asked for is what the type under test can do.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

# The package has to come first: torch's module imports it, and it imports that.
import torch.distributed.fsdp
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import fsdp as upstream

from conformance.kit.agree import assert_raises_everywhere, attempt, exchange
from conformance.kit.data import numbers
from conformance.kit.fsdp1 import (
    HELD,
    fsdp_mesh,
    fsdp_rank,
    held_id,
    tp_local,
    tp_mesh,
)
from conformance.kit.layouts import SS, R, S, part, placement_id, rows, sharded_tensor
from conformance.kit.subclasses import (
    Pair,
    assert_holds_pair,
    inside,
    like_upstream,
    subclass_with,
)

KINDS = pytest.mark.parametrize("flatten", [True, False], ids=["traceable", "closed"])
"""With `__tensor_flatten__`, and without."""

GEOMETRY = pytest.mark.parametrize("policy", [None, "sizes"], ids=["fixed", "asked"])
"""Whether sizes and strides are stored, or questions that the type answers."""


def held_tensor(kind: type[Pair], full: torch.Tensor, root: Any, held: Any) -> torch.Tensor:
    """What FSDP1 asks to be chunked, of that type: plain, or around it a DTensor."""
    if held is None:
        return kind.of(full.clone())
    return inside(kind.of(tp_local(full, root, held).clone()), full, tp_mesh(root), [held])


def spoil(tensor: Any) -> None:
    """Change all that a tensor of such a type holds, in place."""
    local: Any = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    for mine in local.parts:
        mine.zero_()


@pytest.mark.judges("tensor.parallel.fsdp._chunk_dtensor")
class TestChunkDTensor:
    @KINDS
    @GEOMETRY
    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    @pytest.mark.needs("functional gathers")
    @pytest.mark.parametrize("held", HELD, ids=held_id)
    @pytest.mark.thorough(
        but=["plain-fixed-traceable", "R-asked-closed", "S0-fixed-traceable", "S1-asked-closed"]
    )
    def test_the_chunk_is_of_the_type(
        self, judged: Any, mesh: Any, held: Any, flatten: bool, policy: Any
    ) -> None:
        """A type with upstream's operations alone is chunked whole, into memory of its own."""
        root = mesh(2, 2)
        for size in [(8, 4), (4, 2, 3)] + ([(5, 3), (1, 4)] if held in (None, R) else []):
            full = numbers(*size)

            def chunked(
                chunk: Any, kind: type[Pair], full: torch.Tensor = full
            ) -> tuple[Any, torch.Tensor]:
                tensor = held_tensor(kind, full, root, held)
                return chunk(tensor, fsdp_rank(root), fsdp_mesh(root)), tensor

            kind, _ = like_upstream(
                lambda k, chunked=chunked: chunked(upstream._chunk_dtensor, k),  # type: ignore[misc]
                flatten,
                policy=policy,
            )
            got, tensor = chunked(judged, kind)
            assert got.device_mesh == root, f"{size}: on {got.device_mesh}"
            mine = part(full, root, got.placements)
            spoil(tensor)
            assert_holds_pair(got._local_tensor, kind, mine, str(size))


@pytest.mark.judges("tensor.parallel.fsdp._chunk_tensor")
class TestChunkTensor:
    @KINDS
    @GEOMETRY
    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", [*HELD, "ShardedTensor"], ids=str)
    @pytest.mark.thorough(but=["S(1)-fixed-traceable"])
    def test_the_chunk_is_of_the_type(
        self, judged: Any, mesh: Any, held: Any, flatten: bool, policy: Any
    ) -> None:
        """A type with upstream's operations alone is chunked whole, into memory of its own."""
        root = mesh(2, 2)
        line, pg = tp_mesh(root), root["dp"].get_group()
        for size in [(8, 4), (4, 2, 3)]:
            full = numbers(*size)

            def chunked(
                chunk: Any, kind: type[Pair], full: torch.Tensor = full
            ) -> tuple[Any, torch.Tensor]:
                if held == "ShardedTensor":
                    half = len(full) // 2
                    tensor: Any = sharded_tensor(
                        full, rows(full.shape, [half, half]), line.get_group()
                    )
                    live: Any = kind.of(tensor.local_shards()[0].tensor)
                    tensor.local_shards()[0].tensor = live
                else:
                    live = tensor = held_tensor(kind, full, root, held)
                with torch.no_grad():
                    return chunk(tensor, dist.get_rank(pg), 2, 0, pg), live

            kind, _ = like_upstream(
                lambda k, chunked=chunked: chunked(upstream._chunk_tensor, k),  # type: ignore[misc]
                flatten,
                policy=policy,
            )
            got, live = chunked(judged, kind)
            mine = tp_local(full, root, S(0) if held == "ShardedTensor" else held)
            spoil(live)
            (shard,) = got.local_shards()
            if isinstance(shard.tensor, ShardedTensor):
                (shard,) = shard.tensor.local_shards()
            assert_holds_pair(
                shard.tensor, kind, mine.chunk(2)[root["dp"].get_local_rank()], str(size)
            )


PLACED = [
    [S(0), R],
    [S(0), S(1)],
    [SS(0, 2), S(0)],
    [S(0), S(0)],
    [S(1), R],
    [R, S(0)],
    [R, R],
]


def gathered(gather: Any, kind: type[Pair], full: torch.Tensor, root: Any, placements: Any) -> Any:
    """What `gather` makes of a DTensor around that type."""
    local = kind.of(part(full, root, placements).clone())
    return gather(inside(local, full, root, placements), root)


@pytest.mark.judges("tensor.parallel.fsdp._all_gather_dtensor")
class TestAllGatherDTensor:
    @KINDS
    @GEOMETRY
    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    @pytest.mark.needs("functional gathers")
    @pytest.mark.parametrize("placements", PLACED, ids=placement_id)
    @pytest.mark.thorough(but=["R-R-asked-closed"])
    def test_all_that_it_holds_arrives(
        self, judged: Any, mesh: Any, placements: Any, flatten: bool, policy: Any
    ) -> None:
        """A type with upstream's operations alone is gathered whole, and all of it is finished."""
        root = mesh(2, 2)
        for size in [(8, 4), (4, 2, 3)]:
            full = numbers(*size)
            kind, _ = like_upstream(
                lambda k, full=full: gathered(  # type: ignore[misc]
                    upstream._all_gather_dtensor, k, full, root, placements
                ),
                flatten,
                policy=policy,
            )
            got = gathered(judged, kind, full, root, placements)
            assert_holds_pair(got, kind, part(full, root, [R, placements[1]]), str(size))

    @KINDS
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.needs("functional gathers")
    @pytest.mark.thorough(but=["traceable"])
    def test_what_is_pending_inside_is_finished(
        self, judged: Any, mesh: Any, flatten: bool
    ) -> None:
        """A type whose own collectives come back unfinished, inside it, is waited for."""
        root, full = mesh(2, 2), numbers(8, 4)
        kind = subclass_with(None, flatten, pending=True)
        for placements in [S(0), R], [S(0), S(1)], [SS(0, 2), S(0)]:
            got = gathered(judged, kind, full, root, placements)
            what = placement_id(placements)
            assert_holds_pair(got, kind, part(full, root, [R, placements[1]]), what)

    @KINDS
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.needs("functional gathers")
    def test_uneven_parts(self, judged: Any, mesh: Any, flatten: bool) -> None:
        """A type that can be padded is gathered whole from parts of unlike sizes."""
        root, kind = mesh(2, 2), subclass_with(None, flatten)
        for size in (5, 3), (3, 5, 2):
            for placements in [S(0), R], [S(1), R], [S(0), S(1)]:
                full = numbers(*size)
                got = gathered(judged, kind, full, root, placements)
                what = f"{size}, {placement_id(placements)}"
                assert_holds_pair(got, kind, part(full, root, [R, placements[1]]), what)

    @KINDS
    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=60)
    @pytest.mark.needs("functional gathers")
    @pytest.mark.thorough(but=["closed"])
    def test_one_operation_less(self, judged: Any, mesh: Any, world: Any, flatten: bool) -> None:
        """Without one of the operations it is gathered, or refused on every rank alike."""
        root = mesh(2, 1)
        for size in [(4, 3), (3, 3), (1, 3)]:
            full = numbers(*size)
            asked = sorted(
                set().union(
                    *exchange(
                        world,
                        sorted(
                            like_upstream(
                                lambda k, full=full: gathered(  # type: ignore[misc]
                                    upstream._all_gather_dtensor, k, full, root, [S(0), R]
                                ),
                                flatten,
                            )[1]
                        ),
                        f"asked-{size[0]}",
                    )
                )
            )
            for gone in asked:
                kind = subclass_with([op for op in asked if op != gone], flatten)

                def call(kind: type[Pair] = kind, full: torch.Tensor = full) -> None:
                    got = gathered(judged, kind, full, root, [S(0), R])
                    assert_holds_pair(got, kind, full)

                error = attempt(call)
                told = exchange(
                    world, error and type(error).__name__, f"{size[0]}-{gone.replace('.', '-')}"
                )
                what = f"{size} without {gone}: {told}; here {error!r}"
                assert len(set(told)) == 1, what
                assert told[0] != "AssertionError", what

    @KINDS
    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=25)
    @pytest.mark.needs("functional gathers")
    @pytest.mark.parametrize("odd", [0, 1])
    @pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
    @pytest.mark.thorough(
        but=["small-0-traceable", "small-1-closed", "large-0-closed", "large-1-traceable"]
    )
    def test_one_rank_has_such_a_type(
        self, judged: Any, mesh: Any, world: Any, flatten: bool, odd: int, large: bool
    ) -> None:
        """Such a type on one rank, where the other has a plain tensor, is refused on both."""
        root = mesh(2, 1)
        full = numbers(4, 3) if not large else torch.ones(1024, 1024)
        local = part(full, root, [S(0), R]).clone()
        if world.rank == odd:
            local = subclass_with(None, flatten).of(local)
        tensor = inside(local, full, root, [S(0), R])
        assert_raises_everywhere(world, lambda: judged(tensor, root), "rank 1")

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    @pytest.mark.needs("functional gathers")
    def test_what_is_not_gathered_is_a_copy(self, judged: Any, mesh: Any) -> None:
        """Where nothing has to be gathered a type that can be cloned, or taken apart, is copied."""
        root, full = mesh(1, 2), numbers(4, 3)
        clone = ["aten.clone.default"]
        for flatten, ops in (True, clone), (False, clone), (True, []):
            kind = subclass_with(ops, flatten)
            tensor = inside(kind.of(full.clone()), full, root, [R, R])
            got = judged(tensor, root)
            spoil(tensor)
            assert_holds_pair(got, kind, full, f"{flatten=} {ops}")
