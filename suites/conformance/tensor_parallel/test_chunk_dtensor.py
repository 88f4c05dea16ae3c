"""FSDP's chunk of a weight, as a DTensor over the root mesh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list as create_chunk_list
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.torch_version import TorchVersion

from conformance.kit.agree import exchange
from conformance.kit.collectives import Collectives
from conformance.kit.compare import assert_same, fingerprint, local, shares_memory
from conformance.kit.data import DTYPES, VIEWS, numbers
from conformance.kit.fsdp1 import (
    EVEN,
    HELD,
    PLAIN_AND_COLUMNS,
    UNEVEN,
    WHOLE_AND_ROWS,
    assert_chunked,
    fsdp_mesh,
    fsdp_rank,
    given,
    held_id,
    tp_local,
    tp_mesh,
)
from conformance.kit.generated import drawn, layouts
from conformance.kit.layouts import R, S, dtensor, part, placement_id, read_whole
from conformance.kit.levels import MEMORY
from conformance.kit.memory import MIB, peak_growth
from conformance.kit.nested import spoil

MESHES = {"HSDP without TP": (2, 2, 1), "HSDP of one replica": (1, 2, 2), "DDP": (2, 1, 2)}


def call(judged: Any, tensor: torch.Tensor, root: Any) -> Any:
    """The call as FSDP1 makes it."""
    return judged(tensor, fsdp_rank(root), fsdp_mesh(root))


@pytest.mark.judges("tensor.parallel.fsdp._chunk_dtensor")
class TestChunkDTensor:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", HELD, ids=held_id)
    @pytest.mark.thorough(but=["S1"])
    def test_the_local_tensor_is_fsdps_chunk(self, judged: Any, mesh: Any, held: Any) -> None:
        """Each rank holds FSDP's chunk of its TP-local tensor, placed over the root mesh."""
        for shape in (2, 2), (4, 1), (1, 4):
            root = mesh(*shape)
            for size in EVEN if shape == (2, 2) else [(8, 4), (4, 8, 3)]:
                full = numbers(*size)
                got = call(judged, given(full, root, held), root)
                assert_chunked(got, full, root, held, f"{size} on {shape}")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", HELD, ids=held_id)
    @PLAIN_AND_COLUMNS
    @pytest.mark.thorough(but=["plain"])
    def test_the_whole_is_the_global_tensor(self, judged: Any, mesh: Any, held: Any) -> None:
        """The chunks of all ranks, read by their placements, are the global tensor."""
        root = mesh(2, 2)
        for size in EVEN:
            full = numbers(*size)
            got = call(judged, given(full, root, held), root)
            assert got.shape == full.shape, f"{size}: shape {tuple(got.shape)}"
            assert_same(read_whole(got), full, str(size))

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", [S(0), S(1)], ids=held_id)
    @pytest.mark.thorough(but=["S1"])
    def test_uneven_shards(self, judged: Any, mesh: Any, held: Any) -> None:
        """Of TP shards that are uneven themselves the chunks and the whole are as exact."""
        root = mesh(2, 2)
        for size in UNEVEN:
            full = numbers(*size)
            got = call(judged, given(full, root, held), root)
            assert_chunked(got, full, root, held, str(size))
            assert_same(read_whole(got), full, f"{size}, whole")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", [None, R], ids=held_id)
    @pytest.mark.thorough(but=["R"])
    def test_what_tp_does_not_shard(self, judged: Any, mesh: Any, held: Any) -> None:
        """Of a plain or replicated weight of any shape each rank holds its chunk, or nothing."""
        for shape in (2, 2), (4, 1):
            root = mesh(*shape)
            for size in [(7,), (3,), (1,), (0,), (1, 5), (5, 3), (0, 3), (3, 0), (9, 1, 2)]:
                full, what = numbers(*size), f"{size} on {shape}"
                got = call(judged, given(full, root, held), root)
                assert_chunked(got, full, root, held, what)
                assert_same(read_whole(got), full, f"{what}, whole")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", [S(0), S(1)], ids=held_id)
    @pytest.mark.thorough(but=["S1"])
    def test_empty_shards(self, judged: Any, mesh: Any, held: Any) -> None:
        """Ranks to which TP or FSDP leaves nothing hold nothing, and the whole is there."""
        for shape in (2, 2), (1, 4):
            root = mesh(*shape)
            for size in [(1, 4), (4, 1), (2, 2), (0, 4), (4, 0)]:
                full, what = numbers(*size), f"{size} on {shape}"
                got = call(judged, given(full, root, held), root)
                assert_chunked(got, full, root, held, what)
                assert_same(read_whole(got), full, f"{what}, whole")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("shape", MESHES.values(), ids=[n.replace(" ", "-") for n in MESHES])
    @pytest.mark.parametrize("held", HELD, ids=held_id)
    @pytest.mark.thorough(but=["plain-HSDP-without-TP"])
    def test_three_dimensions(self, judged: Any, mesh: Any, held: Any, shape: Any) -> None:
        """Over a 3-D mesh the replicate dimension holds replicas, and FSDP's holds the chunks."""
        root = mesh(*shape)
        for size in [(8, 4), (4, 2, 3)]:
            full = numbers(*size)
            got = call(judged, given(full, root, held), root)
            assert_chunked(got, full, root, held, str(size))
            assert_same(read_whole(got), full, f"{size}, whole")

    @pytest.mark.law("values")
    @pytest.mark.world(8)
    @pytest.mark.parametrize("held", HELD, ids=held_id)
    @WHOLE_AND_ROWS
    @pytest.mark.thorough(but=["R"])
    def test_hsdp_over_tp(self, judged: Any, mesh: Any, held: Any) -> None:
        """With replicas, chunks and TP shards at once every rank holds its chunk."""
        root = mesh(2, 2, 2)
        for size in [(8, 4), (4, 2, 3)]:
            full = numbers(*size)
            got = call(judged, given(full, root, held), root)
            assert_chunked(got, full, root, held, str(size))

    @pytest.mark.law("values")
    @pytest.mark.world(8)
    def test_what_strides_cannot_tell(self, judged: Any, mesh: Any) -> None:
        """Where FSDP's cuts of uneven TP shards follow no stride, the whole is still true."""
        root = mesh(4, 2)
        for size in [(9, 3), (10, 2), (5, 4)]:
            full = numbers(*size)
            got = call(judged, given(full, root, S(0)), root)
            assert got.shape == full.shape, f"{size}: shape {tuple(got.shape)}"
            assert_same(read_whole(got), full, str(size))

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", HELD, ids=held_id)
    @pytest.mark.thorough(but=["plain"])
    def test_one_dimension_of_three(self, judged: Any, mesh: Any, held: Any) -> None:
        """FSDP over one dimension of a 3-D mesh, the one before TP, cuts over that dimension."""
        for shape in (2, 2, 1), (1, 2, 2):
            root = mesh(*shape, names=("pp", "dp", "tp"))
            full = numbers(8, 4)
            got = judged(given(full, root, held), root["dp"].get_local_rank(), root["dp"])
            assert_chunked(got, full, root, held, str(shape))

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", [None, S(1)], ids=held_id)
    @pytest.mark.thorough(but=["plain"])
    def test_a_mesh_of_some_ranks(self, judged: Any, mesh: Any, rank: int, held: Any) -> None:
        """A root mesh without global rank 0 serves its members alone."""
        for shape in (2, 1), (1, 2):
            root = mesh(*shape, ranks=[1, 3])
            if rank in (1, 3):
                full = numbers(6, 4)
                got = call(judged, given(full, root, held), root)
                assert_chunked(got, full, root, held, str(shape))

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", HELD, ids=held_id)
    @WHOLE_AND_ROWS
    @pytest.mark.thorough(but=["S0"])
    def test_a_mesh_in_another_rank_order(self, judged: Any, mesh: Any, held: Any) -> None:
        """A rank holds the chunk of its place in the mesh, whatever its number in the group."""
        root, full = mesh(2, 2, ranks=[3, 1, 2, 0]), numbers(8, 4)
        got = call(judged, given(full, root, held), root)
        assert_chunked(got, full, root, held)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", HELD, ids=held_id)
    @WHOLE_AND_ROWS
    @pytest.mark.thorough(but=["S0"])
    def test_every_dtype(self, judged: Any, mesh: Any, held: Any) -> None:
        """Every dtype is chunked bit for bit, those that the backend cannot move, too."""
        root = mesh(2, 2)
        for dtype in DTYPES:
            full = numbers(8, 4, dtype=dtype)
            got = call(judged, given(full, root, held), root)
            assert_chunked(got, full, root, held, str(dtype))

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", HELD, ids=held_id)
    @WHOLE_AND_ROWS
    @pytest.mark.thorough(but=["S0"])
    def test_every_memory_layout(self, judged: Any, mesh: Any, held: Any) -> None:
        """Transposed, sliced, expanded and offset tensors are chunked as their values say."""
        root = mesh(2, 2)
        for name, view in VIEWS.items():
            full = numbers(8, 4)
            mine = view(tp_local(full, root, held).clone())
            tensor = dtensor(full, tp_mesh(root), [held], local=mine) if held else mine
            got = call(judged, tensor, root)
            assert_same(local(got), part(mine, root, [S(0), R]), name)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_generated_layouts(self, judged: Any, mesh: Any, world: Any) -> None:
        """Generated shapes and placements are chunked exactly."""
        root = mesh(2, 2)
        cases = [(shape, p[0]) for shape, p in drawn(layouts(2), 30, world.seed)]
        told = exchange(world, str(cases), "cases")
        assert len(set(told)) == 1, "the ranks drew different cases"
        for shape, held in cases:
            full, what = numbers(*shape), f"{shape} {held_id(held)}"
            got = call(judged, given(full, root, held), root)
            assert_chunked(got, full, root, held, what)
            assert_same(read_whole(got), full, f"{what}, whole")

    @pytest.mark.law("cost")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", HELD, ids=held_id)
    @WHOLE_AND_ROWS
    @pytest.mark.thorough(but=["R"])
    def test_nothing_is_sent(self, judged: Any, mesh: Any, held: Any) -> None:
        """No collective runs, since the rank holds all that its chunk is cut from."""
        for shape in (2, 2), (4, 1), (1, 2, 2), (2, 2, 1):
            root = mesh(*shape)
            tensor = given(numbers(8, 4), root, held)
            with Collectives() as seen:
                call(judged, tensor, root)
            assert seen.count == 0, f"{shape}: {dict(seen.names)}"

    @pytest.mark.law("cost")
    @pytest.mark.world(2)
    def test_one_rank_calls_alone(self, judged: Any, mesh: Any, rank: int) -> None:
        """A rank gets its chunk while the others do something else."""
        root, full = mesh(2, 1), numbers(6, 4)
        if rank == 1:
            assert_chunked(call(judged, given(full, root, None), root), full, root, None)

    @pytest.mark.law("cost")
    @pytest.mark.should(MEMORY)
    @pytest.mark.world(4)
    @pytest.mark.needs("resident memory")
    @pytest.mark.parametrize("held", [None, S(1)], ids=held_id)
    @pytest.mark.thorough(but=["S1"])
    def test_no_more_memory_than_the_chunk(self, judged: Any, mesh: Any, held: Any) -> None:
        """The call touches memory for the chunk, and not for the whole tensor."""
        root = mesh(4, 1)
        call(judged, given(numbers(8, 4), root, held), root)
        # No copy is made of it here: that would be a peak which hides the call's.
        whole = torch.ones(64, MIB // 4)  # 64 MiB
        tensor = dtensor(whole, tp_mesh(root), [held], local=whole) if held else whole
        grown = peak_growth(lambda: call(judged, tensor, root))
        assert grown < 32 * MIB, f"{grown / MIB:.0f} MiB for a chunk of 16 MiB"
        kept = local(call(judged, tensor, root)).untyped_storage().nbytes()
        assert kept == 16 * MIB, f"the result keeps {kept / MIB:.0f} MiB alive, its chunk has 16"

    @pytest.mark.law("isolation")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", HELD, ids=held_id)
    @PLAIN_AND_COLUMNS
    @pytest.mark.thorough(but=["S1"])
    def test_the_result_is_a_copy(self, judged: Any, mesh: Any, held: Any) -> None:
        """The chunk is memory of its own, so training on does not change it."""
        for shape in (2, 2), (1, 4), (4, 1):
            root, full = mesh(*shape), numbers(8, 4)
            tensor = given(full, root, held)
            got = call(judged, tensor, root)
            assert not shares_memory(got, tensor), f"{shape}: in the memory of the input"
            before = local(got).clone()
            spoil({"live": tensor})
            assert_same(local(got), before, f"{shape}, after the input changed")

    @pytest.mark.law("isolation")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", HELD, ids=held_id)
    @PLAIN_AND_COLUMNS
    @pytest.mark.thorough(but=["S1"])
    def test_the_input_stays_as_it_was(self, judged: Any, mesh: Any, held: Any) -> None:
        """The tensor is not changed, nor by writes to the result; a second call gives the same."""
        root, full = mesh(2, 2), numbers(8, 4)
        for trains in (True, False):
            tensor = nn.Parameter(given(full, root, held), requires_grad=trains)
            before = fingerprint(tensor)
            first = call(judged, tensor, root)
            assert fingerprint(tensor) == before, "the call changed the input"
            kept = local(first).clone()
            spoil({"result": first})
            assert fingerprint(tensor) == before, "a write to the result changed the input"
            assert_same(local(call(judged, tensor, root)), kept, "second call")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    @pytest.mark.needs("functional gathers")
    @pytest.mark.parametrize("held", HELD, ids=held_id)
    @pytest.mark.thorough(but=["S0"])
    def test_compiled_as_one_graph(self, judged: Any, mesh: Any, held: Any) -> None:
        """From torch 2.12 on the compiler finds no break in it; the chunks are the whole."""
        root, full = mesh(2, 2), numbers(8, 4)
        line, rank = fsdp_mesh(root), fsdp_rank(root)

        def code(tensor: torch.Tensor) -> Any:
            return judged(tensor * 2, rank, line)

        # Dynamo of torch 2.11 knows no method of a DeviceMesh, and breaks wherever one is called.
        one = TorchVersion(torch.__version__) >= "2.12"
        got = torch.compile(code, backend="aot_eager", fullgraph=one)(given(full, root, held))
        assert_same(local(got), part(full * 2, root, got.placements))
        assert_same(read_whole(got), full * 2, "whole")
        if held is None:
            # FSDP over the last dimension of the root mesh, which no one gathers again.
            root = mesh(1, 4, names=("pp", "dp"))
            line, rank = root["dp"], root["dp"].get_local_rank()
            got = torch.compile(code, backend="aot_eager", fullgraph=one)(full.clone())
            assert_same(local(got), full * 2, f"without tensor parallelism: {got.placements}")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.needs("functional gathers")
    @pytest.mark.parametrize("held", HELD, ids=held_id)
    @WHOLE_AND_ROWS
    @pytest.mark.thorough(but=["R"])
    def test_consumers_read_the_placements(self, judged: Any, mesh: Any, held: Any) -> None:
        """A checkpoint's planner and a redistribution take the chunks for what they are."""
        root = mesh(2, 2)
        for size in [*EVEN, (5, 3), (3, 1)] if held in (None, R) else EVEN:
            full, what = numbers(*size), str(size)
            got = call(judged, given(full, root, held), root)
            shape, offset = compute_local_shape_and_global_offset(
                got.shape, got.device_mesh, got.placements
            )
            assert shape == local(got).shape, f"{what}: {shape}, holds {tuple(local(got).shape)}"
            box = tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
            assert_same(local(got), full[box], f"{what}, at {offset}")
            for chunk in create_chunk_list(got):
                where = (tuple(chunk.sizes), tuple(chunk.offsets))
                assert where == (shape, offset), f"{what}: the planner says {chunk}"
            for placements in [R, R], [S(0), S(0)], [S(1), R], [R, S(0)], [S(0), S(1)]:
                moved = local(got.redistribute(placements=placements))
                expected = part(full, root, placements)
                assert_same(moved + 0, expected, f"{what} to {placement_id(placements)}")

    @pytest.mark.law("autograd")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", HELD, ids=held_id)
    @PLAIN_AND_COLUMNS
    @pytest.mark.thorough(but=["plain"])
    def test_no_graph_is_kept(self, judged: Any, mesh: Any, held: Any) -> None:
        """The chunk of a trained weight, or of one inside a graph, is part of no graph."""
        root = mesh(2, 2)
        weight = nn.Parameter(given(numbers(8, 4), root, held))
        for name, tensor in {"parameter": weight, "result": weight * 1}.items():
            got = call(judged, tensor, root)
            assert not got.requires_grad, f"{name}: requires grad"
            assert got.grad_fn is None, f"{name}: part of a graph"
            assert not local(got).requires_grad, f"{name}: its local tensor requires grad"
