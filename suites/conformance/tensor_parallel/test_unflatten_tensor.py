"""The DTensor around a local tensor, as data parallelism gives it back."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial

from conformance.kit.agree import attempt, exchange
from conformance.kit.collectives import Collectives
from conformance.kit.compare import assert_same, assert_type, fingerprint, shares_memory
from conformance.kit.data import EACH_DTYPE, numbers
from conformance.kit.generated import drawn, layouts
from conformance.kit.layouts import ONE_D, THREE_D, TWO_D, R, S, dtensor, part, placement_id
from conformance.kit.refusals import SHAPE, assert_refusal, refused
from conformance.kit.streams import STREAM, Handle, Waits

FLATTEN = "tensor.parallel._data_parallel_utils._flatten_tensor"


def assert_describes(got: Any, like: Any, local: torch.Tensor, what: str = "result") -> None:
    """`got` is the DTensor of `like`'s spec over `local`."""
    assert isinstance(got, DTensor), f"{what}: a {type(got).__name__}"
    assert got.placements == like.placements, f"{what}: placements {got.placements}"
    assert got.device_mesh == like.device_mesh, f"{what}: mesh {got.device_mesh}"
    assert got.shape == like.shape, f"{what}: shape {tuple(got.shape)}"
    assert got.stride() == like.stride(), f"{what}: strides {got.stride()}"
    assert got.dtype == like.dtype, f"{what}: dtype {got.dtype}"
    assert_same(got._local_tensor.detach(), local, what)


@pytest.mark.judges("tensor.parallel._data_parallel_utils._unflatten_tensor")
class TestUnflattenTensor:
    @pytest.mark.law("values")
    @pytest.mark.world(1, 2, 4)
    @pytest.mark.parametrize("placements", ONE_D, ids=placement_id)
    @pytest.mark.thorough(but=["w2-S0"])
    def test_the_dtensor_that_the_spec_describes(
        self, judged: Any, mesh: Any, world: Any, placements: Any
    ) -> None:
        """A local tensor becomes the spec's DTensor, over its storage, without communication."""
        line = mesh(world.size)
        for shape in [(4, 6), (5, 3), (1, 1), (0, 3), (3, 0), (2, 3, 5)]:
            full = numbers(*shape)
            like = dtensor(full * 0, line, placements)
            local = part(full, line, placements).clone()
            with Collectives() as seen:
                got = judged(local, like._spec)
            assert seen.count == 0, f"{shape}: {seen.names}"
            assert_describes(got, like, part(full, line, placements), str(shape))
            assert local.numel() == 0 or shares_memory(got, local), f"{shape}: a copy"

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_two_dimensions(self, judged: Any, mesh: Any) -> None:
        """Over a 2-D mesh every combination of placements must give the spec's DTensor."""
        square = mesh(2, 2)
        for placements in TWO_D:
            for shape in [(8, 4), (7, 5), (2, 1)]:
                full, what = numbers(*shape), f"{shape} {placement_id(placements)}"
                local = part(full, square, placements).clone()
                like = dtensor(full * 0, square, placements)
                assert_describes(judged(local, like._spec), like, local, what)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_three_dimensions(self, judged: Any, mesh: Any) -> None:
        """Over a 3-D mesh a local tensor must become the spec's DTensor."""
        cube = mesh(1, 2, 2)
        for placements in THREE_D:
            full, what = numbers(7, 5), placement_id(placements)
            local = part(full, cube, placements).clone()
            like = dtensor(full * 0, cube, placements)
            assert_describes(judged(local, like._spec), like, local, what)

    @pytest.mark.law("group")
    @pytest.mark.world(2)
    def test_uneven_shards_of_an_unsorted_mesh(self, judged: Any, mesh: Any) -> None:
        """Local tensors of both sizes that torch makes there must be taken.

        distribute_tensor() goes by the rank's coordinate, fully_shard by its number in the group.
        """
        line, full = mesh(2, ranks=[1, 0]), numbers(5, 3)
        for at in (None, line.get_coordinate()):
            like = dtensor(full, line, [S(0)], at=at)
            got = judged(like.to_local().clone(), like._spec)
            assert_same(got.to_local(), part(full, line, [S(0)], at), str(at))

    @pytest.mark.law("group")
    @pytest.mark.world(3)
    @pytest.mark.parametrize("trains", [False, True])
    def test_a_mesh_without_this_rank(
        self, judged: Any, mesh: Any, rank: int, trains: bool
    ) -> None:
        """A rank outside of the spec's mesh must get an empty part, whatever it holds."""
        like = dtensor(numbers(8, 3), mesh(2, ranks=[0, 1]), [S(0)])
        mine = numbers(4, 3).requires_grad_(trains)
        got = judged(mine, like._spec)
        assert got.requires_grad is trains
        assert got.to_local().numel() == (0 if rank == 2 else 12)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_generated_layouts_come_back(
        self, judged: Any, subject: Any, mesh: Any, world: Any
    ) -> None:
        """unflatten(flatten(x)) equals x for generated shapes and placements."""
        flatten, square = subject.function(FLATTEN), mesh(2, 2)
        cases = drawn(layouts(2, 2), 30, world.seed)
        told = exchange(world, str(cases), "cases")
        assert len(set(told)) == 1, "the ranks drew different cases"
        for shape, placements in cases:
            full, what = numbers(*shape), f"{shape} {placement_id(placements)}"
            tensor = dtensor(full, square, placements)
            got = judged(*flatten(tensor))
            assert_describes(got, tensor, part(full, square, placements), what)

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    @EACH_DTYPE
    def test_every_dtype(self, judged: Any, mesh: Any, dtype: torch.dtype) -> None:
        """Every dtype and a 0-dim tensor pass bit for bit."""
        for shape in [(4,), (), (0, 3)]:
            full = numbers(*shape, dtype=dtype)
            like = dtensor(full, mesh(1), [S(0) if shape else R])
            assert_describes(judged(full, like._spec), like, full, f"{dtype} {shape}")

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
    @pytest.mark.thorough(but=["w1-frozen"])
    def test_flatten_and_back(
        self, judged: Any, subject: Any, mesh: Any, world: Any, trains: bool
    ) -> None:
        """unflatten(flatten(x)) equals x, `requires_grad` included, over the same memory."""
        tensor = dtensor(numbers(5, 3), mesh(world.size), [S(0)])
        weight = nn.Parameter(tensor, requires_grad=trains)
        got = judged(*subject.function(FLATTEN)(weight))
        assert_describes(got, weight, part(numbers(5, 3), mesh(world.size), [S(0)]))
        assert got.requires_grad is trains, f"requires_grad {got.requires_grad}, not {trains}"
        assert shares_memory(got, weight)

    @pytest.mark.law("values")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w2"])
    def test_a_wrong_shape_is_refused(self, judged: Any, mesh: Any, world: Any) -> None:
        """A local tensor that has not the shape which the spec gives this rank is an error."""
        line = mesh(world.size)
        spec = dtensor(numbers(4 * world.size, 6), line, [S(0)])._spec
        for name, wrong in {
            "too many rows": numbers(5, 6),
            "too few rows": numbers(3, 6),
            "too many columns": numbers(4, 7),
            "transposed": numbers(6, 4),
            "flat": numbers(24),
            "another dimension": numbers(4, 6, 1),
            "empty": numbers(0),
            "0-dim": numbers(),
        }.items():
            what = f"{name}: {tuple(wrong.shape)} for (4, 6)"
            refused(partial(judged, wrong, spec), SHAPE, what=what)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_another_ranks_shape_is_refused(self, judged: Any, mesh: Any, rank: int) -> None:
        """Uneven shards are told apart: a neighbour's shape and the whole tensor are errors."""
        line, full = mesh(4), numbers(7, 3)
        spec = dtensor(full, line, [S(0)])._spec
        mine = part(full, line, [S(0)])
        for other in range(4):
            theirs = part(full, line, [S(0)], [other])
            error = attempt(lambda t=theirs: judged(t.clone(), spec))  # type: ignore[misc]
            fits = theirs.shape == mine.shape
            what = f"shard of rank {other} on rank {rank}"
            if fits:
                assert error is None, f"{what}: refused, though of the right shape: {error!r}"
            else:
                assert_refusal(error, SHAPE, what=what)
        refused(lambda: judged(full, spec), SHAPE, what="the whole tensor for a shard")

    @pytest.mark.law("autograd")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w2"])
    def test_the_gradient_reaches_the_local_tensor(
        self, judged: Any, mesh: Any, world: Any
    ) -> None:
        """The gradient of the DTensor arrives at the local tensor: plain, finished, exact."""
        line, full, factor = mesh(world.size), numbers(5, 3), numbers(5, 3, salt=1)
        for placements in ONE_D:
            what = placement_id(placements)
            local = part(full, line, placements).clone().requires_grad_()
            like = dtensor(full, line, placements)
            got = judged(local, like._spec)
            assert got.requires_grad, what
            (got * dtensor(factor, line, placements)).sum().backward()
            assert type(local.grad) is torch.Tensor, f"{what}: a {type(local.grad).__name__}"
            assert_same(local.grad, part(factor, line, placements), what)

    @pytest.mark.law("autograd")
    @pytest.mark.needs("functional gathers")
    @pytest.mark.world(2, 4)
    def test_a_reduced_gradient_arrives_finished(self, judged: Any, mesh: Any, world: Any) -> None:
        """A gradient that has to be reduced on its way arrives complete, and is no promise."""
        line, full = mesh(world.size), numbers(2 * world.size, 3)
        local = part(full, line, [S(0)]).clone().requires_grad_()
        whole = judged(local, dtensor(full, line, [S(0)])._spec).redistribute(placements=[R])
        share = line.get_local_rank() + 1
        (whole.to_local(grad_placements=[Partial()]) * share).sum().backward()
        assert_type(local.grad, torch.Tensor, "the gradient")
        total = sum(range(1, world.size + 1))
        assert_same(local.grad, torch.full((2, 3), float(total)))

    @pytest.mark.law("autograd")
    @pytest.mark.world(2, 4)
    @pytest.mark.thorough(but=["w2"])
    def test_partial_gradients_are_summed(self, judged: Any, mesh: Any, world: Any) -> None:
        """Where every rank adds to the gradient, the local tensor gets the sum, finished."""
        line, full = mesh(world.size), numbers(4, 3)
        local = full.clone().requires_grad_()
        weight = judged(local, dtensor(full, line, [R])._spec)
        rows_of_batch = numbers(2 * world.size, 4, salt=1)
        batch = dtensor(rows_of_batch, line, [S(0)])
        (batch @ weight).sum().backward()
        assert_type(local.grad, torch.Tensor, "the gradient")
        expected = rows_of_batch.sum(0).unsqueeze(1).expand(4, 3)
        assert_same(local.grad, expected.contiguous())

    @pytest.mark.law("autograd")
    @pytest.mark.world(4)
    def test_gradients_of_each_placement_on_a_grid(self, judged: Any, mesh: Any) -> None:
        """Along each dimension of a mesh a gradient of any placement comes to the tensor's own."""
        grid, full, grad = mesh(2, 2), numbers(4, 6), numbers(4, 6, salt=1)
        for placements in product([R, S(0), S(1)], repeat=2):
            for given in product([R, S(0), S(1), Partial()], repeat=2):
                share, whole = 1, [R if p.is_partial() else p for p in given]
                for p, place in zip(given, grid.get_coordinate() or (), strict=True):
                    share *= (3, -2)[place] if p.is_partial() else 1  # they add up to one
                local = part(full, grid, placements).clone().requires_grad_()
                made = judged(local, dtensor(full, grid, placements)._spec)
                mine = part(grad, grid, whole) * share
                made.backward(dtensor(grad, grid, given, local=mine))
                expected = part(grad, grid, placements)
                assert_same(local.grad, expected, f"{placement_id(given)} to {placements}")

    @pytest.mark.law("autograd")
    @pytest.mark.world(2)
    def test_a_pending_sum(self, judged: Any, mesh: Any) -> None:
        """The gradient of a pending sum must reach each contribution whole."""
        line, full = mesh(2), numbers(4, 3)
        local = full.clone().requires_grad_()
        whole = judged(local, dtensor(full, line, [Partial()], local=full)._spec)
        summed = whole.redistribute(placements=[R])
        assert_same(summed.to_local().detach(), full * 2)
        summed.backward(dtensor(numbers(4, 3, salt=1), line, [R]))
        assert_type(local.grad, torch.Tensor, "the gradient")
        assert_same(local.grad, numbers(4, 3, salt=1))

    @pytest.mark.law("autograd")
    @pytest.mark.needs("functional gathers")
    @pytest.mark.world(2)
    def test_a_pending_gradient_arrives_finished(self, judged: Any, mesh: Any) -> None:
        """Hooks on the local tensor, as DDP has them, must see a gradient that is finished."""
        line, full, seen = mesh(2), numbers(4, 3), []
        local, spec = part(full, line, [S(0)]).clone(), dtensor(full, line, [S(0)])._spec
        local.requires_grad_().register_hook(lambda grad: seen.append(type(grad)))
        whole = judged(local, spec).redistribute(placements=[R], async_op=True)
        whole.to_local(grad_placements=[Partial()]).sum().backward()
        assert seen == [torch.Tensor], f"a hook saw {seen}"
        assert_same(local.grad, torch.full((2, 3), 2.0))

    @pytest.mark.law("autograd")
    @pytest.mark.needs("functional gathers")
    @pytest.mark.world(2)
    def test_waits_on_the_compute_stream(self, judged: Any, mesh: Any) -> None:
        """With a compute stream, what is still pending of a gradient is waited for on it."""
        line, full, handle = mesh(2), numbers(4, 3), Handle()
        local, spec = part(full, line, [S(0)]).clone(), dtensor(full, line, [S(0)])._spec
        local.requires_grad_()
        shard = judged(local, spec, device_handle=handle, compute_stream=STREAM)
        whole = shard.redistribute(placements=[R], async_op=True)
        with Waits(handle) as waits:
            whole.to_local(grad_placements=[Partial()]).sum().backward()
        assert type(local.grad) is torch.Tensor
        assert waits.streams[-1:] == [STREAM], f"waited for outside the stream: {waits.streams}"
        assert handle.current is None, "the compute stream is still current"
        assert_same(local.grad, torch.full((2, 3), 2.0))

    # Dynamo looks at the gradient of whatever it meets.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    @pytest.mark.law("autograd")
    @pytest.mark.world(1)
    def test_compiled(self, judged: Any, mesh: Any) -> None:
        """In compiled code the DTensor and its gradient are the same."""
        local = numbers(4, 3).requires_grad_()
        like = dtensor(numbers(4, 3), mesh(1), [S(0)])

        def code(tensor: torch.Tensor) -> Any:
            return (judged(tensor, like._spec) * 2).to_local()

        compiled: Any = torch.compile(code, backend="eager")
        got = compiled(local)
        assert_same(got.detach(), numbers(4, 3) * 2)
        got.backward(numbers(4, 3, salt=1))
        assert_same(local.grad, numbers(4, 3, salt=1) * 2)

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("placements", ONE_D, ids=placement_id)
    @pytest.mark.thorough(but=["S0"])
    def test_compiled_as_one_graph(self, judged: Any, mesh: Any, placements: Any) -> None:
        """With `fullgraph=True` the compiler finds no break in it, and the gradient is the same."""
        line, full = mesh(2), numbers(4, 6)
        spec, mine = dtensor(full, line, placements)._spec, part(full, line, placements)

        def code(tensor: torch.Tensor) -> Any:
            return (judged(tensor * 2, spec) * 3).to_local()

        local = mine.clone().requires_grad_()
        got = torch.compile(code, backend="aot_eager", fullgraph=True)(local)
        assert_same(got.detach(), mine * 6)
        got.backward(mine)
        assert_same(local.grad, mine * 6, "gradient")

    @pytest.mark.law("autograd")
    @pytest.mark.world(1)
    def test_used_twice_in_one_graph(self, judged: Any, mesh: Any) -> None:
        """A local tensor that is unflattened twice, for a shared module, gets both gradients."""
        local = numbers(4).requires_grad_()
        spec = dtensor(numbers(4), mesh(1), [S(0)])._spec
        first, second = judged(local, spec), judged(local, spec)
        (first.sum() + (second * 2).sum()).backward()
        assert_same(local.grad, torch.full((4,), 3.0))

    @pytest.mark.law("autograd")
    @pytest.mark.world(1)
    def test_a_view_of_a_flat_parameter(self, judged: Any, mesh: Any) -> None:
        """Through a view of FSDP's flat parameter the gradient lands in its own section."""
        flat = nn.Parameter(numbers(10))
        spec = dtensor(numbers(2, 3), mesh(1), [S(0)])._spec
        got = judged(flat[3:9].view(2, 3), spec)
        (got * dtensor(numbers(2, 3, salt=1), mesh(1), [S(0)])).sum().backward()
        expected = torch.zeros(10)
        expected[3:9] = numbers(2, 3, salt=1).reshape(-1)
        assert_same(flat.grad, expected)

    @pytest.mark.law("autograd")
    @pytest.mark.world(1)
    def test_no_graph_where_nothing_trains(self, judged: Any, mesh: Any) -> None:
        """Under no_grad, and for a frozen or integer tensor, the result is part of no graph."""
        like = dtensor(numbers(4), mesh(1), [S(0)])
        counts = dtensor(numbers(4, dtype=torch.int64), mesh(1), [S(0)])
        trained = numbers(4).requires_grad_()
        with torch.no_grad():
            assert not judged(trained, like._spec).requires_grad, "under no_grad"
        assert not judged(numbers(4), like._spec).requires_grad, "frozen"
        got = judged(numbers(4, dtype=torch.int64), counts._spec)
        assert not got.requires_grad, "integer"

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_hooks_do_not_pile_up(self, judged: Any, mesh: Any) -> None:
        """Unflattening the same tensor for every forward leaves no more hooks than once."""
        spec = dtensor(numbers(4), mesh(1), [S(0)])._spec
        local = numbers(4).requires_grad_()

        def hooks() -> int:
            return len(local._backward_hooks or ())

        judged(local, spec).sum().backward()
        once = hooks()
        for _ in range(4):
            judged(local, spec).sum().backward()
        assert hooks() == once, f"{hooks()} hooks after five forwards, {once} after one"
        assert_same(local.grad, torch.full((4,), 5.0))

    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    def test_inputs_stay_as_they_were(self, judged: Any, mesh: Any, world: Any) -> None:
        """The local tensor and the spec are not changed; a second call gives the same."""
        line, full = mesh(world.size), numbers(5, 3)
        like = dtensor(full, line, [S(0)])
        for trains in (True, False):
            local = part(full, line, [S(0)]).clone().requires_grad_(trains)
            before, spec = fingerprint(local), str(like._spec)
            for call in ("first call", "second call"):
                got = judged(local, like._spec)
                assert_describes(got, like, part(full, line, [S(0)]), call)
                assert fingerprint(local) == before, f"{call}: the local tensor was changed"
                assert str(like._spec) == spec, f"{call}: the spec was changed"
