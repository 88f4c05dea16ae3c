"""FSDP's chunk of a weight that is cut over several dimensions of the root mesh already."""

from __future__ import annotations

from typing import Any

import pytest
from torch.testing._internal.two_tensor import TwoTensor

from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.layouts import SS, R, S, dtensor, part, read_whole
from conformance.kit.levels import MEMORY
from conformance.kit.refusals import refused

# Name -> the root mesh over ep, dp and tp, the dimensions that the weight lies on, and how.
HELD: dict[str, tuple[tuple[int, int, int], tuple[str, ...], list[Any]]] = {
    "outside FSDP": ((2, 2, 1), ("ep", "tp"), [S(0), R]),
    "outside FSDP by column": ((2, 2, 1), ("ep", "tp"), [S(1), R]),
    "outside FSDP alone": ((2, 2, 1), ("ep",), [S(0)]),
    "in stripes": ((1, 2, 2), ("tp",), [SS(0, 2)]),
}
BOTH_SIDES: dict[str, list[Any]] = {
    "rows twice": [S(0), S(0)],
    "rows and columns": [S(0), S(1)],
    "columns and rows": [S(1), S(0)],
    "stripes of stripes": [SS(0, 2), S(0)],
}

GATHER = "tensor.parallel.fsdp._all_gather_dtensor"


def assert_true(
    judged: Any, root: Any, fsdp: Any, dims: tuple[str, ...], held: list[Any], what: str
) -> None:
    """The chunks' placements tell the truth, and no rank holds more than before."""
    for size in (8, 4), (7, 5), (3, 6), (1, 2):
        full, on = numbers(*size), root[dims]
        got = judged(dtensor(full, on, held), fsdp.get_local_rank(), fsdp)
        told = f"{what}, {size}, {got.placements}"
        assert got.device_mesh == root, f"{told}: on {got.device_mesh}"
        assert_same(read_whole(got), full, told)
        most = part(full, on, held).numel()
        assert got._local_tensor.numel() <= most, f"{told}: {got._local_tensor.shape} here"


@pytest.mark.judges("tensor.parallel.fsdp._chunk_dtensor")
class TestChunkDTensorOfSeveralDims:
    @pytest.mark.law("values")
    @pytest.mark.should("torch knows a root mesh of two dimensions alone")
    @pytest.mark.world(4)
    def test_cut_outside_of_fsdp(self, judged: Any, mesh: Any) -> None:
        """Of a weight that is cut to the left of FSDP, or in stripes, chunks make up the whole."""
        for name, (shape, dims, held) in HELD.items():
            root = mesh(*shape, names=("ep", "dp", "tp"))
            assert_true(judged, root, root["dp"], dims, held, name)
            if name.startswith("outside"):
                full = numbers(8, 4)
                leaf = dtensor(full, root[dims], held)
                got = judged(leaf, root["dp"].get_local_rank(), root["dp"])
                rows = part(leaf._local_tensor, root["dp"], [S(0)])
                assert_same(got._local_tensor, rows, f"{name}, {got.placements}")

    @pytest.mark.law("values")
    @pytest.mark.should("torch knows a root mesh of two dimensions alone")
    @pytest.mark.world(8)
    @pytest.mark.thorough
    def test_cut_on_both_sides_of_fsdp(self, judged: Any, mesh: Any) -> None:
        """Of a weight cut on both sides of FSDP, or inside a flattened one, as much holds."""
        root = mesh(2, 2, 2, names=("ep", "dp", "tp"))
        for name, held in BOTH_SIDES.items():
            assert_true(judged, root, root["dp"], ("ep", "tp"), held, name)
        flat = root["ep", "dp"]._flatten()
        for placement in S(0), S(1):
            assert_true(judged, root, flat, ("tp",), [placement], f"flattened, {placement}")

    @pytest.mark.law("values")
    @pytest.mark.world(6)
    @pytest.mark.parametrize("shape", [(3, 2), (2, 3)], ids=str)
    @pytest.mark.thorough(but=["(3, 2)"])
    def test_rows_that_nobody_can_share_alike(self, judged: Any, mesh: Any, shape: Any) -> None:
        """Of any number of rows over three ranks by two the chunks must make up the whole."""
        root = mesh(*shape)
        for rows in range(1, 15):
            for held in S(0), S(1):
                full = numbers(rows, 5)
                leaf = dtensor(full, root["tp"], [held])
                got = judged(leaf, root["dp"].get_local_rank(), root["dp"])
                told = f"{rows} rows, {held}: {got.placements}"
                assert_same(read_whole(got), full, told)
                assert_same(got._local_tensor, part(full, root, got.placements), f"{told}, here")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(4)
    def test_a_weight_of_other_ranks(self, judged: Any, mesh: Any, rank: int) -> None:
        """A rank that is not on the weight's mesh must be told so."""
        root, others = mesh(2, 2), mesh(2, ranks=[0, 1], names=("tp",))
        if rank < 2:
            return
        leaf = dtensor(numbers(8, 4), others, [S(0)])
        refused(lambda: judged(leaf, root["dp"].get_local_rank(), root["dp"]), "rank")


@pytest.mark.judges("tensor.parallel.fsdp._chunk_dtensor")
class TestChunkDTensorMemory:
    @pytest.mark.law("cost")
    @pytest.mark.should(MEMORY)
    @pytest.mark.world(4)
    def test_no_chunk_keeps_more_alive(self, judged: Any, mesh: Any) -> None:
        """A chunk's memory must be its own size, or checkpoints of it hold all that it views."""
        root = mesh(2, 2, 1, names=("ep", "dp", "tp"))
        flat = root["ep", "dp"]._flatten()
        for size in (8, 8), (6, 8), (3, 8), (1, 8):
            full = numbers(*size)
            for held in None, R, S(0), S(1):
                leaf = full if held is None else dtensor(full, root["tp"], [held])
                got = judged(leaf, flat.get_local_rank(), flat)
                here = got._local_tensor
                kept, needed = here.untyped_storage().nbytes(), here.numel() * here.itemsize
                told = f"{size}, {held or 'plain'}: {got.placements}"
                assert kept == needed, f"{told}: a chunk of {needed} bytes keeps {kept} alive"


@pytest.mark.judges("tensor.parallel.fsdp._chunk_dtensor")
class TestChunkDTensorOfWrappers:
    @pytest.mark.law("values")
    @pytest.mark.should("torch knows a root mesh of two dimensions alone")
    @pytest.mark.world(4)
    def test_a_wrapper_over_a_flattened_mesh(self, judged: Any, mesh: Any) -> None:
        """All that a wrapper holds must be cut by each dimension that FSDP's mesh was made of."""
        root = mesh(2, 2, 1, names=("ep", "dp", "tp"))
        flat = root["ep", "dp"]._flatten()
        for size in (8, 4), (7, 5):
            full = numbers(*size)
            got = judged(TwoTensor(full.clone(), full + 1), flat.get_local_rank(), flat)
            mine, local = part(full, root, got.placements), got._local_tensor
            assert type(local) is TwoTensor, f"{size}: a {type(local).__name__}"
            assert_same(local.a, mine, f"{size}: first")
            assert_same(local.b, mine + 1, f"{size}: second")


@pytest.mark.judges("tensor.parallel.fsdp._chunk_dtensor")
class TestChunkDTensorWithoutTensorParallelism:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("shape", [(1, 2), (1, 2, 1), (1, 1, 2)], ids=str)
    @pytest.mark.thorough(but=["(1, 2)", "(1, 1, 2)"])
    def test_a_mesh_without_tp(self, judged: Any, subject: Any, mesh: Any, shape: Any) -> None:
        """Where FSDP has the last dimension of the root mesh, too, the chunks lead back."""
        root = mesh(*shape, names=("pp", "rep", "dp") if len(shape) == 3 else ("pp", "dp"))
        fsdp = root["rep", "dp"] if len(shape) == 3 else root["dp"]
        gather = subject.function(GATHER)
        for size in (8, 4), (3, 5), (1,):
            full = numbers(*size)
            got = judged(full.clone(), fsdp.get_local_rank(-1), fsdp)
            told = f"{size}: {got.placements}"
            assert got.device_mesh == root, f"{told}: on {got.device_mesh}"
            assert_same(got._local_tensor, part(full, root, got.placements), f"{told}, here")
            assert_same(gather(got, root), full, f"{told}, gathered")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(4)
    def test_stages_of_their_own(self, judged: Any, subject: Any, mesh: Any) -> None:
        """Of two stages of a pipeline, each under FSDP, each must get its own values back."""
        root = mesh(2, 2, names=("pp", "dp"))
        stage = root.get_local_rank("pp")
        full = numbers(8, 4) + 100 * stage
        got = judged(full.clone(), root["dp"].get_local_rank(), root["dp"])
        whole = subject.function(GATHER)(got, root)
        assert_same(whole, full, f"stage {stage}: {got.placements}")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(4)
    def test_fsdp_inside_of_tp(self, judged: Any, mesh: Any) -> None:
        """FSDP inside of a weight's tensor parallelism must be refused: none could gather it."""
        root = mesh(2, 2, names=("tp", "dp"))
        leaf = dtensor(numbers(8, 4), root["tp"], [S(1)])
        refused(lambda: judged(leaf, root["dp"].get_local_rank(), root["dp"]), "innermost")
