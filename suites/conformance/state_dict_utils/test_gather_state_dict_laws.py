"""_gather_state_dict, how it goes about it: isolation, symmetry, group, autograd, cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from conformance.kit.agree import assert_raises_everywhere
from conformance.kit.collectives import Collectives
from conformance.kit.compare import assert_same, fingerprint
from conformance.kit.data import numbers
from conformance.kit.groups import UNSORTED, group
from conformance.kit.layouts import R, S, dtensor, read_whole, rows, sharded_tensor
from conformance.kit.levels import BYTES, COUNT
from conformance.kit.nested import assert_apart, spoil
from conformance.kit.refusals import MISSING

ROOM = 64 * 1024
"""Bytes that the ranks may spend on agreeing, whatever the size of the tensors."""


def _leaves(line: Any, size: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A leaf of each kind, and what each is whole."""
    fulls = {k: numbers(4 * size, 3, salt=i) for i, k in enumerate(("rows", "whole", "st", "on"))}
    made = {
        "rows": dtensor(fulls["rows"], line, [S(0)]),
        "whole": dtensor(fulls["whole"], line, [R]),
        "st": sharded_tensor(fulls["st"], rows((4 * size, 3), [4] * size)),
        "in": [{"on": fulls["on"].clone()}],
    }
    return made, fulls


def _assert_whole(got: dict[str, Any], fulls: dict[str, torch.Tensor], what: str) -> None:
    for key, full in fulls.items():
        assert_same(got["in"][0]["on"] if key == "on" else got[key], full, f"{what}: {key}")


class _Made(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations return in memory that was not there."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage()._cdata not in known:
            self.bytes += result.untyped_storage().nbytes()
        return result


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherStateDictIsolation:
    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    def test_the_state_dict_is_only_read(self, judged: Any, mesh: Any, world: Any) -> None:
        """The caller's containers and tensors are as they were."""
        leaves, _ = _leaves(mesh(world.size), world.size)
        before = fingerprint(leaves)
        judged(leaves, cpu_offload=True)
        assert fingerprint(leaves) == before, "the call changed its input"

    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("key", ["rows", "whole", "st", "in"])
    @pytest.mark.thorough(but=["w1-in", "w2-rows", "w2-whole", "w2-st"])
    def test_training_on_does_not_change_the_result(
        self, judged: Any, mesh: Any, world: Any, key: str
    ) -> None:
        """No result lies in live memory: what training does later does not reach it."""
        for cpu_offload in (False, True):
            leaves, fulls = _leaves(mesh(world.size), world.size)
            got = judged({key: leaves[key]}, cpu_offload=cpu_offload)
            assert_apart(got, leaves, f"{cpu_offload=}")
            spoil(leaves)
            result = got["in"][0]["on"] if key == "in" else got[key]
            expected = fulls["on" if key == "in" else key]
            assert_same(result, expected, f"{key}, {cpu_offload=}, after training went on")

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_a_second_call_gives_the_same(self, judged: Any, mesh: Any) -> None:
        """A second call gives the same answer, in memory of its own."""
        leaves, fulls = _leaves(mesh(2), 2)
        first, second = judged(leaves), judged(leaves)
        assert_apart(first, second, "the first result beside the second")
        _assert_whole(first, fulls, "first call")
        _assert_whole(second, fulls, "second call")


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherStateDictSymmetry:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, 3)
    def test_keys_in_another_order_on_each_rank(
        self, judged: Any, mesh: Any, world: Any, rank: int
    ) -> None:
        """Ranks whose dicts hold the same keys in another order get the right tensors."""
        line = mesh(world.size)
        keys = [f"k{i}" for i in range(6)]
        fulls = {key: numbers(6, 3, salt=i) for i, key in enumerate(keys)}
        turned = keys[2 * rank :] + keys[: 2 * rank]
        got = judged({key: dtensor(fulls[key], line, [S(0)]) for key in turned})
        assert list(got) == turned, f"keys {list(got)}, expected {turned}"
        for key in keys:
            assert_same(got[key], fulls[key], key)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=25)
    def test_an_unsupported_leaf_on_one_rank(self, judged: Any, mesh: Any, world: Any) -> None:
        """A leaf of an unsupported type on one rank raises the same on every rank, naming it."""
        odd: Any = object() if world.rank == 1 else 1
        leaves = {"odd.one": odd, "w": dtensor(numbers(4), mesh(2), [S(0)])}
        assert_raises_everywhere(world, lambda: judged(leaves), "odd.one")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=25)
    def test_a_leaf_that_one_rank_lacks(self, judged: Any, mesh: Any, world: Any) -> None:
        """A sharded leaf that one rank of its mesh lacks raises the same everywhere, by name."""
        leaves = {k: dtensor(numbers(4), mesh(2), [S(0)]) for k in ("here", "layer.lost")}
        if world.rank == 1:
            del leaves["layer.lost"]
        assert_raises_everywhere(world, lambda: judged(leaves), "layer.lost", kinds=MISSING)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=25)
    @pytest.mark.parametrize("what", ["shape", "dtype"])
    def test_a_leaf_that_differs_on_one_rank(
        self, judged: Any, mesh: Any, world: Any, what: str
    ) -> None:
        """A sharded leaf of another shape or dtype on one rank raises everywhere, naming it."""
        other = {"shape": numbers(8, 3), "dtype": numbers(4, 3, dtype=torch.int32)}[what]
        full = other if world.rank == 1 else numbers(4, 3)
        leaves = {"fine": dtensor(numbers(4), mesh(2), [S(0)])}
        leaves["layer.odd"] = dtensor(full, mesh(2), [S(0)])
        assert_raises_everywhere(world, lambda: judged(leaves), "layer.odd")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2)
    def test_an_unsupported_leaf_on_every_rank(self, judged: Any, mesh: Any, world: Any) -> None:
        """With `type_check` a leaf that no checkpoint can hold is refused by its name."""
        leaves = {"deep": [{"odd": object()}], "w": dtensor(numbers(4), mesh(2), [S(0)])}
        assert_raises_everywhere(world, lambda: judged(leaves), "odd")


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherStateDictGroup:
    @pytest.mark.law("group")
    @pytest.mark.world(3)
    @pytest.mark.parametrize("wanted", [(), (0,), (1,), (2,), (0, 2), (2, 1)], ids=str)
    @pytest.mark.thorough(but=["()", "(0,)", "(2, 1)"])
    def test_only_the_ranks_of_ranks_only_get_the_result(
        self, judged: Any, mesh: Any, rank: int, wanted: tuple[int, ...]
    ) -> None:
        """The ranks of `ranks_only` get everything, the others `{}`; empty means all."""
        leaves, fulls = _leaves(mesh(3), 3)
        got = judged(leaves, ranks_only=wanted)
        if wanted and rank not in wanted:
            assert got == {}, f"rank {rank} is not in {wanted} and got {got}"
        else:
            _assert_whole(got, fulls, f"rank {rank} of {wanted}")

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("members", [(1, 3), pytest.param((3, 1), marks=UNSORTED)], ids=str)
    def test_ranks_only_counts_in_the_groups_own_numbers(
        self, judged: Any, mesh: Any, rank: int, members: tuple[int, int]
    ) -> None:
        """With `pg` the ranks of `ranks_only` are that group's own numbers."""
        some = group(*members)
        line = mesh(2, ranks=[1, 3])
        if rank not in members:
            return
        fulls = [numbers(5, 3), numbers(4, 3, salt=1)]
        got = judged(
            {
                "w": dtensor(fulls[0], line, [S(0)]),
                "st": sharded_tensor(fulls[1], rows((4, 3), [2, 2]), some),
            },
            pg=some,
            ranks_only=(0,),
        )
        if rank != members[0]:
            assert got == {}, f"global rank {rank} got {got}"
        else:
            assert_same(got["w"], fulls[0], "w")
            assert_same(got["st"], fulls[1], "st")

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    def test_only_the_ranks_of_the_mesh_are_needed(self, judged: Any, mesh: Any, rank: int) -> None:
        """Without `pg` the ranks of the leaves' mesh do it alone, without global rank 0."""
        line = mesh(2, ranks=[1, 3])
        if rank in (0, 2):
            return
        full = numbers(5, 3)
        assert_same(judged({"w": dtensor(full, line, [S(0)])})["w"], full)

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("kind", ["DTensor", "ShardedTensor"])
    def test_groups_side_by_side_do_not_mix(
        self, judged: Any, mesh: Any, rank: int, kind: str
    ) -> None:
        """Leaves of two groups under one key are gathered each in its own group."""
        side = rank // 2
        full = numbers(4, 3, salt=side)
        if kind == "DTensor":
            grid = mesh(2, 2, names=("side", "x"))
            leaf: Any = dtensor(full, grid["x"], [S(0)])
        else:
            groups = [group(0, 1), group(2, 3)]
            leaf = sharded_tensor(full, rows((4, 3), [2, 2]), groups[side])
        assert_same(judged({"w": leaf})["w"], full)

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=str)
    def test_a_mesh_in_another_rank_order(
        self, judged: Any, mesh: Any, shape: tuple[int, ...]
    ) -> None:
        """On a mesh of unsorted ranks each shard comes to where full_tensor() reads it."""
        full = numbers(9, 3)
        turned = mesh(*shape, ranks=[3, 1, 2, 0])
        got = judged({"w": dtensor(full, turned, [S(0)] * len(shape))})
        assert_same(got["w"], full)


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherStateDictAutograd:
    @pytest.mark.law("autograd")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("kind", ["rows", "whole", "plain"])
    def test_no_graph_is_kept(self, judged: Any, mesh: Any, kind: str) -> None:
        """What is gathered from tensors with a graph has none."""
        full = numbers(4, 3)
        if kind == "plain":
            leaf = full.clone().requires_grad_() * 1
        else:
            leaf = dtensor(full, mesh(2), [S(0) if kind == "rows" else R]).requires_grad_()
        got = judged({"w": leaf})["w"]
        assert got.grad_fn is None, f"the result keeps {got.grad_fn}"
        assert_same(got, full)

    @pytest.mark.law("autograd")
    @pytest.mark.world(2)
    def test_training_goes_on_undisturbed(self, judged: Any, mesh: Any) -> None:
        """A call between forward and backward leaves the gradients as they would have been."""
        weight = nn.Parameter(dtensor(numbers(4, 3), mesh(2), [S(0)]))
        loss = (weight * 2).sum()
        judged({"w": weight})
        loss.backward()
        assert weight.requires_grad, "the parameter is frozen now"
        assert isinstance(weight.grad, DTensor), f"no gradient arrived: {weight.grad}"
        whole = read_whole(weight.grad)
        assert_same(whole, torch.full((4, 3), 2.0), "gradient")


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherStateDictCost:
    @pytest.mark.law("cost")
    @pytest.mark.should(COUNT)
    @pytest.mark.world(4)
    @pytest.mark.parametrize("kind", ["1-D", "2-D", "ShardedTensor", "dtypes"])
    @pytest.mark.thorough(but=["ShardedTensor"])
    def test_collectives_do_not_grow_with_the_tensors(
        self, judged: Any, mesh: Any, kind: str
    ) -> None:
        """Forty tensors need as many collectives as four."""
        dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.bool]
        makers: dict[str, Callable[[int], Any]] = {
            "1-D": lambda i: dtensor(numbers(8, 2, salt=i), mesh(4), [S(0)]),
            "2-D": lambda i: dtensor(numbers(8, 2, salt=i), mesh(2, 2), [S(0), S(1)]),
            "ShardedTensor": lambda i: sharded_tensor(numbers(8, 2, salt=i), rows((8, 2), [2] * 4)),
            "dtypes": lambda i: dtensor(numbers(8, 2, dtype=dtypes[i % 4]), mesh(4), [S(0)]),
        }
        counts = []
        for number in (4, 40):
            leaves = {f"k{i}": makers[kind](i) for i in range(number)}
            with Collectives() as seen:
                judged(leaves)
            counts.append(seen.count)
        assert counts[0] == counts[1] > 0, f"collectives for 4 and for 40 tensors: {counts}"

    @pytest.mark.law("cost")
    @pytest.mark.should(BYTES)
    @pytest.mark.world(2)
    def test_tied_tensors_travel_once(self, judged: Any, mesh: Any) -> None:
        """A tensor under four names moves as many bytes as under one."""
        leaf = dtensor(numbers(512, 256), mesh(2), [S(0)])
        moved = []
        for names in ("a", "abcd"):
            with Collectives() as seen:
                judged(dict.fromkeys(names, leaf))
            moved.append(seen.bytes)
        assert moved[1] < moved[0] + ROOM, f"bytes under one name and under four: {moved}"

    @pytest.mark.law("cost")
    @pytest.mark.should(BYTES)
    @pytest.mark.world(2)
    def test_replicated_leaves_do_not_travel(self, judged: Any, mesh: Any) -> None:
        """A leaf that every rank holds whole is not moved."""
        with Collectives() as seen:
            judged({"w": dtensor(numbers(512, 256), mesh(2), [R]), "p": numbers(512, 256)})
        assert seen.bytes < ROOM, f"{seen.bytes} bytes moved"

    @pytest.mark.law("cost")
    @pytest.mark.should(BYTES)
    @pytest.mark.world(4)
    def test_a_replicated_mesh_dimension_moves_nothing(self, judged: Any, mesh: Any) -> None:
        """Over [Replicate, Shard(0)] a rank hands in its half, gets the whole, and no more."""
        full = numbers(512, 256)
        with Collectives() as seen:
            judged({"w": dtensor(full, mesh(2, 2), [R, S(0)])})
        most = full.nbytes // 2 + full.nbytes + ROOM
        assert seen.bytes < most, f"{seen.bytes} bytes moved, expected less than {most}"

    @pytest.mark.law("cost")
    @pytest.mark.should(BYTES)
    @pytest.mark.world(4)
    def test_a_rank_outside_ranks_only_only_sends(self, judged: Any, mesh: Any, rank: int) -> None:
        """A rank that gets no result moves about its own quarter, less than half of the tensor."""
        full = numbers(512, 512)
        with Collectives() as seen:
            judged({"w": dtensor(full, mesh(4), [S(0)])}, ranks_only=(1,), cpu_offload=True)
        if rank != 1:
            assert seen.bytes < full.nbytes // 2, f"{seen.bytes} bytes of {full.nbytes} moved"

    @pytest.mark.law("cost")
    @pytest.mark.should(BYTES)
    @pytest.mark.world(2)
    def test_a_rank_outside_ranks_only_pays_for_no_copy(
        self, judged: Any, mesh: Any, rank: int
    ) -> None:
        """A rank that gets no result copies no plain and no replicated tensor."""
        leaves = {"w": dtensor(numbers(512, 256), mesh(2), [R]), "p": numbers(512, 256)}
        with _Made() as made:
            judged(leaves, ranks_only=(0,), cpu_offload=True)
        if rank == 1:
            assert made.bytes < ROOM, f"{made.bytes} bytes allocated"
