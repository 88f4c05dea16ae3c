"""What tensor parallelism holds of a weight, put together from FSDP's chunks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from conformance.kit.agree import assert_raises_everywhere, attempt, exchange
from conformance.kit.collectives import Collectives
from conformance.kit.compare import assert_same, fingerprint, shares_memory
from conformance.kit.data import EACH_DTYPE, VIEWS, numbers
from conformance.kit.fsdp1 import (
    EVEN,
    HELD,
    PLAIN_AND_COLUMNS,
    UNEVEN,
    fsdp_rank,
    given,
    held_id,
    sharded,
    tp_local,
)
from conformance.kit.generated import drawn, layouts
from conformance.kit.layouts import (
    SOME_OF_TWO_D,
    SS,
    THREE_D,
    TWO_D,
    R,
    S,
    dtensor,
    part,
    placement_id,
)
from conformance.kit.nested import spoil
from conformance.kit.refusals import flaw

CHUNK = "tensor.parallel.fsdp._chunk_dtensor"


def assert_gathered(
    got: Any, full: torch.Tensor, root: DeviceMesh, placements: Any, what: str = "result"
) -> None:
    """`got` is the plain, finished tensor that TP's dimension alone leaves to this rank."""
    # An AsyncCollectiveTensor is a tensor, too, but one that somebody still has to wait for.
    assert type(got) is torch.Tensor, f"{what}: expected a plain tensor, got {type(got).__name__}"
    kept = [*[R] * (root.ndim - 1), placements[-1]]
    assert_same(got, part(full, root, kept, root.get_coordinate()), what)


@pytest.mark.judges("tensor.parallel.fsdp._all_gather_dtensor")
class TestAllGatherDTensor:
    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", HELD, ids=held_id)
    @pytest.mark.parametrize("sizes", [EVEN, UNEVEN], ids=["even", "uneven"])
    @pytest.mark.thorough(but=["even-plain"])
    def test_the_tp_local_tensor(self, judged: Any, mesh: Any, held: Any, sizes: Any) -> None:
        """From FSDP's chunks every rank gets its TP-local tensor, plain and finished."""
        for shape in (2, 2), (4, 1), (1, 4):
            root = mesh(*shape)
            placements = sharded(root, held)
            for size in sizes:
                full = numbers(*size)
                got = judged(dtensor(full, root, placements), root)
                assert_gathered(got, full, root, placements, f"{size} on {shape}")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("ranks", [[0, 1, 2, 3], [3, 1, 0, 2]], ids=["sorted", "turned"])
    @pytest.mark.thorough(but=["sorted"])
    def test_large_tensors(self, judged: Any, mesh: Any, ranks: list[int]) -> None:
        """A weight of some MiB, in any placement, must be gathered to the bit."""
        root = mesh(2, 2, ranks=ranks)
        for placements in [*TWO_D, [SS(0, 2), R]]:
            for size in [(1024, 1280), (1023, 1281), (1, 1024, 1280)]:
                full = torch.arange(torch.Size(size).numel(), dtype=torch.float32).view(size)
                tensor = dtensor(full, root, placements, at=root.get_coordinate())
                got = judged(tensor, root)
                what = f"{size} as {placement_id(placements)}"
                assert_gathered(got, full, root, placements, what)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_sizes_around_powers_of_two(self, judged: Any, mesh: Any) -> None:
        """Chunks of a few bytes more or less than any usual threshold must be gathered."""
        root = mesh(2, 1)
        for power in range(8, 17):
            for off in (-129, -128, -96, -64, -33, -32, -16, -9, -8, -4, -1, 0, 1, 8, 32, 64, 128):
                full = torch.arange(2 * (2**power + off), dtype=torch.int32).to(torch.int8)
                got = judged(dtensor(full, root, [S(0), R]), root)
                assert_gathered(got, full, root, [S(0), R], f"chunks of 2**{power} {off:+d} bytes")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", HELD, ids=held_id)
    @PLAIN_AND_COLUMNS
    @pytest.mark.thorough(but=["plain"])
    def test_empty_chunks(self, judged: Any, mesh: Any, held: Any) -> None:
        """Ranks that hold nothing take part, and get what the others hold."""
        for shape in (2, 2), (4, 1):
            root = mesh(*shape)
            placements = sharded(root, held)
            for size in [(1, 4), (4, 1), (2, 2), (3, 3), (0, 4), (4, 0)]:
                full = numbers(*size)
                got = judged(dtensor(full, root, placements), root)
                assert_gathered(got, full, root, placements, f"{size} on {shape}")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("placements", TWO_D, ids=placement_id)
    @SOME_OF_TWO_D
    @pytest.mark.thorough(but=["R-S1"])
    def test_any_placement(self, judged: Any, mesh: Any, placements: Any) -> None:
        """Whatever the outer dimension does with the tensor, it is gathered; TP's stays."""
        root = mesh(2, 2)
        for size in [(8, 4), (5, 7), (1, 3), (4, 2, 3)]:
            full = numbers(*size)
            got = judged(dtensor(full, root, placements), root)
            assert_gathered(got, full, root, placements, str(size))

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("shape", [(2, 2, 1), (1, 2, 2), (2, 1, 2)], ids=str)
    @pytest.mark.thorough(but=["(2, 2, 1)"])
    def test_three_dimensions(self, judged: Any, mesh: Any, shape: Any) -> None:
        """Over a 3-D mesh all dimensions but TP's are gathered."""
        root = mesh(*shape)
        for held in HELD:
            for size in [(8, 4), (5, 3)]:
                full, placements = numbers(*size), sharded(root, held)
                got = judged(dtensor(full, root, placements), root)
                assert_gathered(got, full, root, placements, f"{size} {held_id(held)}")
        for placements in THREE_D:
            full = numbers(8, 4)
            got = judged(dtensor(full, root, placements), root)
            assert_gathered(got, full, root, placements, placement_id(placements))

    @pytest.mark.law("values")
    @pytest.mark.world(8)
    def test_hsdp_over_tp(self, judged: Any, mesh: Any) -> None:
        """With replicas, chunks and TP shards at once every rank gets its TP-local tensor."""
        root, full = mesh(2, 2, 2), numbers(8, 4)
        for held in HELD:
            placements = sharded(root, held)
            got = judged(dtensor(full, root, placements), root)
            assert_gathered(got, full, root, placements, held_id(held))

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @EACH_DTYPE
    @pytest.mark.thorough(but=["bool"])
    def test_every_dtype(self, judged: Any, mesh: Any, dtype: torch.dtype) -> None:
        """Every dtype is gathered bit for bit, those that the backend cannot move, too."""
        root = mesh(2, 1)
        for size in [(4, 3), (5, 3), (1,)]:
            full = numbers(*size, dtype=dtype)
            got = judged(dtensor(full, root, [S(0), R]), root)
            assert_gathered(got, full, root, [S(0), R], str(size))

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_every_memory_layout(self, judged: Any, mesh: Any) -> None:
        """Chunks that are transposed, sliced or offset in memory are gathered as their values."""
        root = mesh(2, 2)
        for held in HELD:
            placements = sharded(root, held)
            for name, view in VIEWS.items():
                full = numbers(8, 4)
                if name != "expanded":
                    mine = view(part(full, root, placements).clone())
                    tensor = dtensor(full, root, placements, local=mine)
                    what = f"{held_id(held)} {name}"
                    assert_gathered(judged(tensor, root), full, root, placements, what)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("rows", [6, 6000], ids=["small", "large"])
    @pytest.mark.thorough(but=["small"])
    def test_lazy_signs(self, judged: Any, mesh: Any, rank: int, rows: int) -> None:
        """Chunks whose memory means the negative or the conjugate are gathered as their values."""
        root = mesh(2, 1)
        for name, lazy in {"negated": torch._neg_view, "conjugated": torch.conj}.items():
            full = torch.arange(3.0 * rows).view(rows, 3)
            full = torch.complex(full, full + 1) if name == "conjugated" else full
            for turned in ({0, 1}, {0}, {1}):
                whole = full.clone()
                for n, chunk_of_n in enumerate(whole.chunk(2)):
                    if n in turned:
                        chunk_of_n.copy_(lazy(chunk_of_n.clone()))
                mine = full.chunk(2)[rank].clone()
                mine = lazy(mine) if rank in turned else mine
                tensor = dtensor(full, root, [S(0), R], local=mine)
                assert_gathered(judged(tensor, root), whole, root, [S(0), R], f"{name} {turned}")

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("rows", [3, 2, 0], ids=lambda rows: f"{rows} rows")
    @pytest.mark.thorough(but=["0 rows"])
    def test_a_shard_of_one_element(self, judged: Any, mesh: Any, rows: int) -> None:
        """A shard of one element or none must arrive whatever the stride it has."""
        root = mesh(2, 1)
        full = numbers(rows)
        local = numbers(2 * rows).new_zeros(2 * rows)[::2][: part(full, root, [S(0), R]).numel()]
        local.copy_(part(full, root, [S(0), R]))
        got = judged(dtensor(full, root, [S(0), R], local=local), root)
        assert_same(got, full)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_generated_layouts(self, judged: Any, mesh: Any, world: Any) -> None:
        """Generated shapes and placements are gathered exactly."""
        root = mesh(2, 2)
        cases = drawn(layouts(2, 2), 30, world.seed)
        told = exchange(world, str(cases), "cases")
        assert len(set(told)) == 1, "the ranks drew different cases"
        for size, placements in cases:
            full, what = numbers(*size), f"{size} {placement_id(placements)}"
            got = judged(dtensor(full, root, placements), root)
            assert_gathered(got, full, root, placements, what)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", HELD, ids=held_id)
    @pytest.mark.parametrize("sizes", [EVEN, UNEVEN], ids=["even", "uneven"])
    @pytest.mark.thorough(but=["uneven-plain"])
    def test_chunked_and_back(
        self, judged: Any, subject: Any, mesh: Any, held: Any, sizes: Any
    ) -> None:
        """What was chunked must come back as the TP-local tensor, to the bit."""
        root = mesh(2, 2)
        for size in sizes:
            full = numbers(*size)
            given_tensor = given(full, root, held)
            chunk = subject.function(CHUNK)(given_tensor, fsdp_rank(root), root["dp"])
            got = judged(chunk, root)
            assert_same(got, tp_local(full, root, held), str(size))

    @pytest.mark.law("cost")
    @pytest.mark.should("ranks that also agree on their errors need a second one for any size")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("held", HELD, ids=held_id)
    @pytest.mark.parametrize(("rows", "most"), [(32, 1), (1024, 2)], ids=["small", "large"])
    @pytest.mark.thorough(but=["small-plain"])
    def test_number_of_collectives(
        self, judged: Any, mesh: Any, held: Any, rows: int, most: int
    ) -> None:
        """Small chunks take one collective and large ones two; what lies here is not sent for."""
        for shape in (2, 2), (4, 1), (2, 2, 1), (1, 2, 2):
            root = mesh(*shape)
            tensor = dtensor(numbers(rows, 64), root, sharded(root, held))
            whole = dtensor(numbers(8, 4), root, [*[R] * (len(shape) - 1), held or R])
            judged(tensor, root)  # what is made once for a mesh is made
            with Collectives() as seen:
                judged(tensor, root)
            assert seen.count <= most, f"{shape}: {dict(seen.names)}"
            # In and out: the chunk goes to FSDP's group, and the TP-local tensor is what comes. A
            # short message on top lets the ranks agree.
            local = tensor._local_tensor
            parts = int(root.shape[-2])
            limit = (local.nbytes + 16384) * (parts + 1) * 1.1
            assert seen.bytes <= limit, f"{shape}: {seen.bytes} bytes for {parts} x {local.nbytes}"
            with Collectives() as seen:
                judged(whole, root)
            assert seen.count == 0, f"{shape}, nothing to gather: {dict(seen.names)}"

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    def test_a_mesh_of_some_ranks(self, judged: Any, mesh: Any, rank: int) -> None:
        """A root mesh without global rank 0 serves its members alone."""
        root, full = mesh(2, 1, ranks=[1, 3]), numbers(5, 3)
        if rank in (1, 3):
            got = judged(dtensor(full, root, [S(0), R]), root)
            assert_gathered(got, full, root, [S(0), R])

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    def test_a_mesh_in_another_rank_order(self, judged: Any, mesh: Any) -> None:
        """Chunks are put together in the order of the mesh, whatever that of the group."""
        root, full = mesh(2, 2, ranks=[3, 1, 2, 0]), numbers(8, 4)
        for held in HELD:
            placements = sharded(root, held)
            got = judged(dtensor(full, root, placements, at=root.get_coordinate()), root)
            assert_gathered(got, full, root, placements, held_id(held))

    @pytest.mark.law("symmetry")
    @pytest.mark.world(4)
    def test_a_wrong_mesh(self, judged: Any, mesh: Any, world: Any) -> None:
        """A mesh that is not the tensor's is a clear error on every rank, before tensors move."""
        root = mesh(2, 2)
        tensor = dtensor(numbers(8, 4), root, [S(0), S(1)])
        for name, wrong in {
            "FSDP's": root["dp"],
            "TP's": root["tp"],
            "of another shape": mesh(4, 1),
            "in another order": mesh(2, 2, ranks=[0, 2, 1, 3]),
            "flat": mesh(4),
        }.items():
            with Collectives() as seen:
                error = attempt(lambda w=wrong: judged(tensor, w))  # type: ignore[misc]
            said = [type(error).__name__, flaw(error, (re.compile("(?i)mesh"),))]
            told = exchange(world, said, name.replace(" ", "-"))
            assert len({kind for kind, _ in told}) == 1, f"mesh {name}: {told}"
            assert not said[1], f"mesh {name}: {said[1]}"
            assert seen.count == 0, f"mesh {name}: {dict(seen.names)}"

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=4, limit=15)
    @pytest.mark.parametrize("wrong", [numbers(2, 3), numbers(3, 3).half()], ids=["shape", "dtype"])
    def test_a_wrong_chunk_on_one_rank(
        self, judged: Any, mesh: Any, world: Any, wrong: Any
    ) -> None:
        """A chunk that is not what its placement says is the same error on every rank."""
        root = mesh(2, 1)
        mine = wrong if world.rank == 1 else numbers(3, 3)
        like = dtensor(numbers(6, 3), root, [S(0), R])
        tensor = DTensor(mine, like._spec, requires_grad=False)
        assert_raises_everywhere(world, lambda: judged(tensor, root), "rank 1")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=4, limit=15)
    @pytest.mark.parametrize("rows", [6, 6000], ids=["small", "large"])
    @pytest.mark.parametrize(
        "other",
        [
            lambda rows: (numbers(rows, 3).bfloat16(), S(0)),
            lambda rows: (numbers(rows, 3).double(), S(0)),
            lambda rows: (numbers(rows, 4), S(0)),
            lambda rows: (numbers(rows, 3), S(1)),
        ],
        ids=["narrower", "wider", "shape", "placement"],
    )
    @pytest.mark.thorough(but=["narrower-small", "shape-large", "placement-small"])
    def test_another_whole_on_one_rank(
        self, judged: Any, mesh: Any, world: Any, rows: int, other: Any
    ) -> None:
        """Tensors that the ranks describe differently are the same error on every rank."""
        root = mesh(2, 1)
        full, placement = other(rows) if world.rank == 1 else (numbers(rows, 3), S(0))
        tensor = dtensor(full, root, [placement, R])
        assert_raises_everywhere(world, lambda: judged(tensor, root), "rank 1")

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_an_equal_mesh(self, judged: Any, mesh: Any) -> None:
        """A mesh that equals the tensor's is its mesh, though another object."""
        root, full = mesh(2, 2), numbers(8, 4)
        twin = DeviceMesh(root.device_type, root.mesh.clone(), mesh_dim_names=("dp", "tp"))
        assert twin == root
        got = judged(dtensor(full, root, [S(0), S(1)]), twin)
        assert_gathered(got, full, root, [S(0), S(1)])

    @pytest.mark.law("isolation")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("shape", [(2, 2), (1, 4)], ids=["gathered", "nothing to gather"])
    @pytest.mark.thorough(but=["nothing to gather"])
    def test_the_result_is_a_copy(self, judged: Any, mesh: Any, shape: Any) -> None:
        """The result is memory of its own; the input is not changed; a second call is the same."""
        root, full = mesh(*shape), numbers(8, 4)
        for held in HELD:
            what, placements = held_id(held), sharded(root, held)
            tensor = dtensor(full, root, placements)
            before = fingerprint(tensor)
            first, second = judged(tensor, root), judged(tensor, root)
            assert fingerprint(tensor) == before, f"{what}: the input was changed"
            assert not shares_memory(first, tensor), f"{what}: in the memory of the input"
            spoil({"first": first})
            assert fingerprint(tensor) == before, f"{what}: a write changed the input"
            spoil({"live": tensor})
            assert_gathered(second, full, root, placements, f"{what}, after the input changed")

    @pytest.mark.law("autograd")
    @pytest.mark.world(4)
    def test_no_graph_is_kept(self, judged: Any, mesh: Any) -> None:
        """What is gathered for loading is part of no graph."""
        for root in mesh(2, 2), mesh(1, 4):
            for placements in [S(0), R], [S(0), S(1)], [SS(0, int(root.shape[1])), S(0)]:
                weight = nn.Parameter(dtensor(numbers(8, 4), root, placements))
                got = judged(weight, root)
                what = f"{tuple(root.shape)} {placement_id(placements)}"
                assert not got.requires_grad, f"{what}: requires grad"
                assert got.grad_fn is None, f"{what}: part of a graph"
