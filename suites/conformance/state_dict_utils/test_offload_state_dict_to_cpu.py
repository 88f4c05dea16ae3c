"""A snapshot of a state dict in CPU memory."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce

from conformance.kit.cases import each
from conformance.kit.collectives import Collectives
from conformance.kit.compare import assert_same, assert_unchanged, fingerprint
from conformance.kit.containers import CONTAINERS
from conformance.kit.data import EACH_DTYPE, SHAPES, VIEWS, numbers
from conformance.kit.generated import examples, state_dicts
from conformance.kit.layouts import (
    ONE_D,
    TWO_D,
    S,
    dtensor,
    part,
    placement_id,
    rows,
    sharded_tensor,
)
from conformance.kit.levels import STRIDES
from conformance.kit.nested import assert_apart, assert_same_structure, sample, spoil, tensors
from conformance.kit.refusals import refused


def three_kinds(mesh: Any, size: int) -> dict[str, Any]:
    """A tensor of each kind over all ranks."""
    full = numbers(5, 2)
    return {
        "dtensor": dtensor(full, mesh(size), [S(0)]),
        "sharded": sharded_tensor(full, rows(full.shape, [2, 3], [size - 1, 0])),
        "tensor": numbers(3),
    }


@pytest.mark.judges("_state_dict_utils._offload_state_dict_to_cpu")
class TestOffloadStateDictToCpu:
    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w1"])
    def test_later_training_does_not_change_it(self, judged: Any, mesh: Any, world: Any) -> None:
        """The snapshot keeps its values while every tensor of the model and optimizer changes."""
        value = sample(**three_kinds(mesh, world.size))
        expected = sample(**three_kinds(mesh, world.size))
        got = judged(value, type_check=False)
        assert_apart(got, value)
        spoil(value)
        assert_same_structure(got, expected)

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("kind", ["plain", "0-dim", "parameter", "DTensor", "ShardedTensor"])
    def test_no_kind_is_aliased(self, judged: Any, mesh: Any, kind: str) -> None:
        """A tensor that already lies in CPU memory is copied, whatever its kind."""
        full = numbers(4, 2)
        tensor = {
            "plain": lambda: full,
            "0-dim": lambda: numbers(salt=1),
            "parameter": lambda: nn.Parameter(full),
            "DTensor": lambda: dtensor(full, mesh(1), [S(0)]),
            "ShardedTensor": lambda: sharded_tensor(full, rows(full.shape, [4])),
        }[kind]()
        value = {"x": [tensor]}
        got = judged(value)
        assert_same_structure(got, value)
        assert_apart(got, value)

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_containers_and_values_are_apart(self, judged: Any) -> None:
        """Containers, sets and values of unknown type in the snapshot are its own."""
        value: dict[str, Any] = {"d": {"x": 1}, "l": [[1]], "s": {1, 2}, "o": bytearray(b"ab")}
        got = judged(value, type_check=False)
        value["d"]["x"] = 2
        value["l"][0].append(2)
        value["s"].add(3)
        value["o"].extend(b"c")
        assert got == {"d": {"x": 1}, "l": [[1]], "s": {1, 2}, "o": bytearray(b"ab")}

    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    def test_the_input_stays_as_it_was(self, judged: Any, mesh: Any, world: Any) -> None:
        """The state dict is not changed, also not through its snapshot."""
        value = sample(**three_kinds(mesh, world.size))
        before = fingerprint(value)
        got = judged(value, type_check=False)
        assert_unchanged(value, before)
        spoil(got)
        got["model"].clear()
        assert fingerprint(value) == before, "changed through the snapshot"
        assert_same_structure(judged(value, type_check=False), value, "second call")

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    @EACH_DTYPE
    def test_every_dtype_and_memory_layout(self, judged: Any, dtype: torch.dtype) -> None:
        """Every dtype is kept bit for bit, whatever strides and offset."""
        value = {
            f"{shape} {view}": make(numbers(*shape, dtype=dtype))
            for shape in SHAPES
            for view, make in VIEWS.items()
        }
        expected = {name: tensor.contiguous().clone() for name, tensor in value.items()}
        got = judged(value)
        for name, tensor in expected.items():
            assert_same(got[name], tensor, f"{dtype} {name}")

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("placements", ONE_D, ids=placement_id)
    @pytest.mark.thorough(but=["S1"])
    def test_dtensors(self, judged: Any, mesh: Any, placements: Any) -> None:
        """A DTensor stays one, its local tensor copied: even, uneven and empty shards."""
        line = mesh(2)
        for shape in [(4, 6), (5, 3), (1, 1), (0, 3), (3, 0)]:
            full = numbers(*shape)
            value = {"x": dtensor(full, line, placements)}
            with Collectives() as seen:
                got = judged(value)["x"]
            assert seen.count == 0, f"{shape}: a snapshot of this rank's part communicates"
            assert got.placements == tuple(placements), f"{shape}: placements {got.placements}"
            assert got.shape == full.shape, f"{shape}: shape {tuple(got.shape)}"
            assert_same(got._local_tensor, part(full, line, placements), str(shape))

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_dtensors_over_two_dimensions(self, judged: Any, mesh: Any) -> None:
        """On a 2-D mesh a DTensor must stay one, its local tensor copied, for each placement."""
        square, full = mesh(2, 2), numbers(7, 5)
        for placements in TWO_D:
            value = {"x": dtensor(full, square, placements)}
            got = judged(value)["x"]
            name = placement_id(placements)
            assert got.placements == tuple(placements), f"{name}: became {got.placements}"
            assert_same(got._local_tensor, part(full, square, placements), name)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_a_pending_collective_is_waited_for(self, judged: Any, rank: int) -> None:
        """A result that is still on its way is in the snapshot as a finished tensor."""
        group: Any = dist.group.WORLD
        pending = all_reduce(numbers(4) * (rank + 1), "sum", group)
        got = judged({"x": pending})["x"]
        assert not isinstance(got, AsyncCollectiveTensor), "still on its way"
        assert_same(got, numbers(4) * 3)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_every_container(self, judged: Any) -> None:
        """Containers keep type, keys and order."""

        def keep(name: str) -> None:
            value = {"x": CONTAINERS[name](numbers(2, 3), numbers(3))}
            assert_same_structure(judged(value, type_check=False), value)

        each(CONTAINERS, keep)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_every_leaf_of_a_state_dict(self, judged: Any) -> None:
        """A model's and an optimizer's state pass the type check, complex numbers and sets too."""
        value = sample()
        assert_same_structure(judged(value), value)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_ties_survive(self, judged: Any) -> None:
        """Tied tensors are tied in the snapshot, and copied once."""
        weight = nn.Parameter(numbers(3))
        value = {"a": weight, "b": {"c": weight}, "d": weight.detach(), "other": numbers(3)}
        got = judged(value)
        assert_same_structure(got, value)
        assert_apart(got, value)
        assert got["a"] is got["b"]["c"], "one Parameter became two"

    @pytest.mark.law("structure")
    @pytest.mark.should(STRIDES)
    @pytest.mark.world(1)
    def test_memory_format_survives(self, judged: Any) -> None:
        """Dense strides survive: transposed and channels-last tensors stay what they are."""
        image = numbers(2, 3, 4, 5).to(memory_format=torch.channels_last)
        value = {"image": image, "transposed": numbers(4, 6).t()}
        got = judged(value)
        for name, tensor in value.items():
            assert got[name].stride() == tensor.stride(), f"{name}: strides {got[name].stride()}"
        assert_apart(got, value)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_generated_state_dicts(self, judged: Any, world: Any) -> None:
        """Generated state dicts are snapshot whole: containers, order, ties, flags, bits."""

        @examples(world.seed)
        @given(state_dicts())
        def offload(value: Any) -> None:
            before, got = fingerprint(value), judged(value)
            assert_same_structure(got, value)
            assert_unchanged(value, before)
            assert_apart(got, value)

        offload()

    @pytest.mark.law("group")
    @pytest.mark.world(2)
    def test_ranks_only(self, judged: Any, rank: int) -> None:
        """Only the ranks asked for get the snapshot; the others an empty dict."""
        value = {"x": [numbers(3)], "y": 1}
        assert_same_structure(judged(value, ranks_only=(1,)), value if rank == 1 else {})
        assert_same_structure(judged(value, ranks_only=(0, 1)), value)
        assert_same_structure(judged(value), value)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2)
    def test_a_bad_leaf_is_an_error_on_every_rank(self, judged: Any) -> None:
        """A leaf that no checkpoint can hold is an error also where no snapshot is asked for."""
        told = re.compile("layer.odd|object")
        value = {"layer.odd": [object()]}
        refused(lambda: judged(value, ranks_only=(1,)), told, kinds=(ValueError,))

    @pytest.mark.law("autograd")
    @pytest.mark.world(1)
    def test_no_graph_is_kept(self, judged: Any) -> None:
        """The snapshot holds no graph, and `requires_grad` of parameters survives."""
        weight = nn.Parameter(numbers(3))
        got = judged({"weight": weight, "result": weight * 2, "frozen": numbers(3)})
        for name, tensor in tensors(got).items():
            assert tensor.grad_fn is None, f"{name} keeps a graph alive"
        assert isinstance(got["weight"], nn.Parameter)
        assert got["weight"].requires_grad
        assert not got["frozen"].requires_grad
        assert_same(got["result"].detach(), numbers(3) * 2)
