"""Between FSDP1 and tensor parallelism where one process plays all ranks: LocalTensorMode.

A tensor stands for one tensor a rank, and so do sizes and coordinates.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
from torch.distributed.tensor import DTensor

from conformance.kit.boxes import boxes
from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.fsdp1 import HELD, WHOLE_AND_ROWS, fsdp_mesh, held_id, tp_mesh, unsharded
from conformance.kit.layouts import R, S, dtensor, part, placement_id

SIZES = [(8, 4), (12, 2), (4, 2, 3)]


def coordinate(root: Any, rank: int) -> list[int]:
    """Where a rank is on the root mesh."""
    (found,) = (root.mesh == rank).nonzero().tolist()
    return list(found)


def played(
    mode: LocalTensorMode, full: torch.Tensor, root: Any, placements: Any, mesh: Any = None
) -> DTensor:
    """A DTensor that holds `full`, of which each rank that is played has its part.

    Over the root mesh, or over `mesh`, which is a part of it.
    """
    with mode.disable():
        parts = {r: part(full, root, placements, coordinate(root, r)) for r in sorted(mode.ranks)}
        mesh, placements = (root, placements) if mesh is None else (mesh, placements[-1:])
        spec = dtensor(full, mesh, placements)._spec
    local = mode.rank_map(lambda rank: parts[rank].clone())
    return DTensor(local, spec, requires_grad=False)


def assert_played(got: Any, full: torch.Tensor, root: Any, placements: Any, what: str) -> None:
    """Each rank that is played has the part that the placements give to it."""
    assert isinstance(got, LocalTensor), f"{what}: a {type(got).__name__}"
    for rank, mine in got._local_tensors.items():
        expected = part(full, root, placements, coordinate(root, rank))
        assert_same(mine, expected, f"{what}, rank {rank}")


@pytest.mark.judges("tensor.parallel.fsdp._chunk_dtensor")
class TestChunkDTensor:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", HELD, ids=held_id)
    @WHOLE_AND_ROWS
    def test_each_rank_gets_its_chunk(self, judged: Any, mesh: Any, held: Any) -> None:
        """Each rank that is played holds the chunk that its place on the mesh gives to it."""
        root, mode = mesh(2, 2), LocalTensorMode(4)
        for size in SIZES:
            full = numbers(*size)
            with mode:
                tensor: Any = (
                    mode.rank_map(lambda _, full=full: full.clone())  # type: ignore[misc]
                    if held is None
                    else played(mode, full, root, unsharded(root, held), tp_mesh(root))
                )
                got = judged(tensor, 0, fsdp_mesh(root))
            assert_played(got._local_tensor, full, root, got.placements, str(size))


@pytest.mark.judges("tensor.parallel.fsdp._all_gather_dtensor")
class TestAllGatherDTensor:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    @pytest.mark.parametrize(
        "placements",
        [[S(0), R], [S(0), S(1)], [S(0), S(0)], [S(1), R], [R, S(0)]],
        ids=placement_id,
    )
    @pytest.mark.thorough(but=["S0-S1", "S0-S0", "R-S0"])
    def test_each_rank_gets_its_part(self, judged: Any, mesh: Any, placements: Any) -> None:
        """Each rank that is played gets the part that tensor parallelism leaves to it."""
        root, mode = mesh(2, 2), LocalTensorMode(4)
        for size in [*SIZES, (5, 3)] if placements[1] == R else SIZES:
            full = numbers(*size)
            with mode:
                got = judged(played(mode, full, root, placements), root)
            assert_played(got, full, root, [R, placements[1]], str(size))


@pytest.mark.judges("tensor.parallel._data_parallel_utils._unflatten_tensor")
class TestUnflattenTensor:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", [R, S(0), S(1)], ids=held_id)
    @pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
    @pytest.mark.thorough(but=["frozen-S1", "trained-S0"])
    def test_the_dtensor_around_all_of_them(
        self, judged: Any, mesh: Any, held: Any, trains: bool
    ) -> None:
        """Around what all ranks hold stands the DTensor of the spec."""
        root, mode = mesh(2, 2), LocalTensorMode(4)
        for size in [*SIZES, (5, 3)]:
            full = numbers(*size)
            with mode:
                whole = played(mode, full, root, unsharded(root, held), tp_mesh(root))
                local = whole._local_tensor.requires_grad_(trains)
                got = judged(local, whole._spec)
            assert got._spec == whole._spec, f"{size}: {got._spec}"
            assert got.requires_grad is trains, f"{size}: requires_grad {got.requires_grad}"
            assert_played(got._local_tensor, full, root, unsharded(root, held), str(size))


@pytest.mark.judges("tensor.parallel._data_parallel_utils._flatten_tensor")
class TestFlattenTensor:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    def test_what_all_of_them_hold(self, judged: Any, mesh: Any) -> None:
        """The local tensor is what each rank that is played holds."""
        root, full, mode = mesh(2, 2), numbers(5, 3), LocalTensorMode(4)
        with mode:
            whole = played(mode, full, root, [R, S(0)], tp_mesh(root))
            got, spec = judged(whole)
        assert spec == whole._spec
        assert_played(got, full, root, [R, S(0)], "local")


@pytest.mark.judges("tensor.parallel.fsdp._get_local_box")
class TestGetLocalBox:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", [R, S(0), S(1)], ids=held_id)
    @pytest.mark.thorough(but=["R", "S0"])
    def test_a_box_for_each(self, judged: Any, mesh: Any, held: Any) -> None:
        """Offsets and sizes stand for those of each rank that is played."""
        root, mode = mesh(2, 2), LocalTensorMode(4)
        for size in SIZES:
            full = numbers(*size)
            with mode:
                tensor = played(mode, full, root, unsharded(root, held), tp_mesh(root))
                found = [list(side) for side in judged(tensor)]
            for rank in range(4):
                mine = [[_of(rank, number) for number in side] for side in found]
                expected = [list(side) for side in boxes(size, 2, held)[coordinate(root, rank)[1]]]
                assert mine == expected, f"{size}, rank {rank}: {mine}, expected {expected}"


def _of(rank: int, number: Any) -> int:
    """What a number is on a rank that is played."""
    ints = getattr(getattr(number, "node", None), "_local_ints", None)
    return int(ints[rank]) if ints is not None else int(number)
