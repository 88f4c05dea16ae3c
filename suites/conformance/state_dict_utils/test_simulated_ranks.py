"""Ranks that are no processes: all of them are one process, in torch's `LocalTensorMode`.

Authors of parallelisms test that way. What torch does right there, every subject must do right.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
from torch.distributed.tensor import DTensor, distribute_tensor

from conformance.kit.compare import assert_same, local
from conformance.kit.data import numbers
from conformance.kit.layouts import R, S
from conformance.kit.refusals import MISSING, refused

CPU = torch.device("cpu")
WHOLE = {
    "even": numbers(8, 3, device=CPU),
    "odd": numbers(7, 3, device=CPU),
    "same": numbers(4, 2, device=CPU),
    "grid": numbers(8, 4, device=CPU),
    "plain": numbers(2, device=CPU),
}


def spread(mesh: Any, *, zero: bool = False) -> dict[str, Any]:
    """`WHOLE` over the ranks that are played; zeros in its place."""
    line, grid = mesh(4), mesh(2, 2)
    placed: dict[str, Any] = {
        "even": (line, [S(0)]),
        "odd": (line, [S(0)]),
        "same": (line, [R]),
        "grid": (grid, [S(0), S(1)]),
    }
    found: dict[str, Any] = {}
    for name, full in WHOLE.items():
        value = torch.zeros_like(full) if zero else full.clone()
        if name in placed:
            value = distribute_tensor(value, *placed[name], src_data_rank=None)
        found[name] = value
    return found


def _train_on(value: dict[str, Any]) -> None:
    """Write other values into all that a state dict holds."""
    for tensor in value.values():
        local(tensor).add_(1)


def assert_whole(got: Any) -> None:
    """Every rank that is played has the values of `WHOLE`."""
    assert list(got) == list(WHOLE), f"keys {list(got)}, expected {list(WHOLE)}"
    for name, value in got.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        ranks = full._local_tensors if isinstance(full, LocalTensor) else {0: full}
        for rank, mine in ranks.items():
            assert_same(mine, WHOLE[name], f"{name}, rank {rank}")


def refuse_another_shape(mesh: Any, load: Callable[[Any, Any], None]) -> None:
    """The second of two full tensors is refused by its key, and neither target has changed."""
    line, full = mesh(2), numbers(6, 2)
    held: dict[str, Any] = {
        name: distribute_tensor(torch.zeros(6, 2), line, [S(0)], src_data_rank=None)
        for name in ("first", "second")
    }
    into = dict(held)
    refused(lambda: load({"first": full, "second": full[:4]}, into), "'second'")
    for name, target in held.items():
        assert into[name] is target, f"{name}: replaced"
        assert_same(target.full_tensor().reconcile(), full * 0, name)


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGather:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("options", [{}, {"cpu_offload": True}], ids=str)
    @pytest.mark.thorough(but=["{'cpu_offload': True}"])
    def test_every_rank_is_played(self, judged: Any, mesh: Any, options: Any) -> None:
        """Every rank that is played must get the whole tensors."""
        mesh(4), mesh(2, 2)
        with LocalTensorMode(4):
            assert_whole(judged(spread(mesh), **options))

    @pytest.mark.law("isolation")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("options", [{}, {"cpu_offload": True}], ids=str)
    @pytest.mark.thorough(but=["{'cpu_offload': True}"])
    def test_the_result_is_apart(self, judged: Any, mesh: Any, options: Any) -> None:
        """What training writes later must reach no rank's result."""
        mesh(4), mesh(2, 2)
        with LocalTensorMode(4):
            value = spread(mesh)
            got = judged(value, **options)
            _train_on(value)
            assert_whole(got)

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_the_result_without_values_is_apart(self, judged: Any, mesh: Any) -> None:
        """Under `FakeTensorMode` no tensor of the result may be one of the state dict."""
        line = mesh(2)
        with FakeTensorMode():
            value = {
                "plain": torch.empty(4, 3),
                "same": DTensor.from_local(torch.empty(4, 3), line, [R], run_check=False),
            }
            got = judged(value)
        for name, leaf in value.items():
            ours, theirs = (local(tensor).untyped_storage()._cdata for tensor in (got[name], leaf))
            assert ours != theirs, f"{name} lies in the caller's memory"

    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    def test_what_else_a_state_dict_holds(self, judged: Any, mesh: Any, rank: int) -> None:
        """Values pass, tied tensors stay tied, takers alone get a result, and a lock is refused."""
        mesh(4), mesh(2, 2)
        with LocalTensorMode(4):
            value: dict[str, Any] = spread(mesh)
            value |= {"tied": value["odd"], "n": [3, {"x": None}]}
            got = judged(value)
            assert got["n"] == value["n"]
            assert got["n"][1] is not value["n"][1], "the caller's own dict"
            assert got["tied"] is got["odd"], "tied tensors came apart"
            value["lock"] = threading.Lock()
            refused(lambda: judged(value), "lock", kinds=MISSING)

    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_tensors_without_values(self, judged: Any, mesh: Any) -> None:
        """Under `FakeTensorMode` the result must have the whole shape, and be fake itself."""
        line = mesh(2)
        with FakeTensorMode():
            leaf = DTensor.from_local(torch.empty(4, 3), line, [S(0)], run_check=False)
            got = judged({"w": leaf, "n": 1})
        assert isinstance(got["w"], FakeTensor)
        assert tuple(got["w"].shape) == (8, 3)


@pytest.mark.judges("_state_dict_utils._offload_state_dict_to_cpu")
class TestOffload:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    def test_every_rank_is_played(self, judged: Any, mesh: Any) -> None:
        """The snapshot must hold the parts of every rank that is played."""
        mesh(4), mesh(2, 2)
        with LocalTensorMode(4):
            value = spread(mesh)
            got = judged(value)
            assert_whole(got)
            _train_on(value)
            assert_whole(got)


@pytest.mark.judges("_state_dict_utils._iterate_state_dict")
class TestIterate:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    def test_every_rank_is_played(self, judged: Any, mesh: Any) -> None:
        """The result must hold the parts of every rank that is played."""
        mesh(4), mesh(2, 2)
        same = (lambda tensor, *_: tensor,) * 3
        with LocalTensorMode(4):
            assert_whole(judged(spread(mesh), *same))


@pytest.mark.judges("_state_dict_utils._copy_state_dict")
class TestCopy:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    def test_every_rank_is_played(self, judged: Any, mesh: Any) -> None:
        """The parts of every rank that is played must be copied."""
        mesh(4), mesh(2, 2)
        with LocalTensorMode(4):
            into = spread(mesh, zero=True)
            judged(spread(mesh), into)
            assert_whole(into)


@pytest.mark.judges("_state_dict_utils._check_state_dict_similarity")
class TestSimilarity:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    def test_every_rank_is_played(self, judged: Any, mesh: Any) -> None:
        """State dicts of the same tensors must be found similar."""
        mesh(4), mesh(2, 2)
        with LocalTensorMode(4):
            assert judged(spread(mesh), spread(mesh, zero=True)) is True


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistribute:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    def test_every_rank_is_played(self, judged: Any, mesh: Any) -> None:
        """Every rank that is played must get its part."""
        mesh(4), mesh(2, 2)
        with LocalTensorMode(4):
            into = spread(mesh, zero=True)
            judged(dict(WHOLE), into, CPU)
            assert_whole(into)

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_another_dtype(self, judged: Any, mesh: Any) -> None:
        """A target keeps its dtype, and takes the full tensor's values in it."""
        line, full = mesh(2), numbers(6, 2)
        with LocalTensorMode(2):
            empty = torch.zeros(6, 2, dtype=torch.bfloat16)
            into: dict[str, Any] = {"w": distribute_tensor(empty, line, [S(0)], src_data_rank=None)}
            judged({"w": full}, into, CPU)
            assert into["w"].dtype == torch.bfloat16, f"{into['w'].dtype}"
            assert_same(into["w"].full_tensor().reconcile(), full.bfloat16())

    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_one_element_for_a_scalar(self, judged: Any, mesh: Any) -> None:
        """A full tensor of one element is taken for a scalar target, which stays one."""
        line = mesh(2)
        with LocalTensorMode(2):
            scalar = distribute_tensor(torch.zeros(()), line, [R], src_data_rank=None)
            into: dict[str, Any] = {"step": scalar}
            judged({"step": numbers(1) + 5}, into, CPU)
            assert_same(into["step"].full_tensor().reconcile(), numbers() + 5)

    @pytest.mark.law("all-or-nothing")
    @pytest.mark.world(2)
    def test_another_shape(self, judged: Any, mesh: Any) -> None:
        """A full tensor of another shape is refused by its key, before any target changes."""
        mesh(2)
        with LocalTensorMode(2):
            refuse_another_shape(mesh, lambda values, into: judged(values, into, CPU))


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcast:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_plain_tensors(self, judged: Any) -> None:
        """Plain tensors must land for the ranks that are played."""
        with LocalTensorMode(1):
            into = {name: torch.zeros_like(full) for name, full in WHOLE.items()}
            judged(dict(WHOLE), into, CPU)
            assert_whole(into)

    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    @pytest.mark.parametrize("options", [{}, {"cpu_offload": True}, {"strict": True}], ids=str)
    @pytest.mark.thorough(but=["{}", "{'strict': True}"])
    def test_every_rank_is_played(self, judged: Any, mesh: Any, options: Any) -> None:
        """Every rank that is played must get its part, and no key but those that it has."""
        mesh(4), mesh(2, 2)
        steps = [2.5]
        with LocalTensorMode(4):
            into = spread(mesh, zero=True)
            rest = {"steps": None, "none": None, "step": None, "extra": 1}
            full = WHOLE | {"steps": steps, "none": numbers(3), "step": numbers(), "other": 2}
            mine = into | rest
            judged(full, mine, CPU, **options)
            assert mine["steps"] == steps
            assert mine["steps"] is not steps, "the caller's own list"
            assert mine["none"] is None, "a tensor for what is None on purpose"
            assert_same(mine["step"], numbers())
            assert ("extra" in mine) is ("strict" not in options)
            assert_whole({name: mine[name] for name in WHOLE})
            assert "other" not in mine

    @pytest.mark.law("all-or-nothing")
    @pytest.mark.world(2)
    def test_another_shape(self, judged: Any, mesh: Any) -> None:
        """A full tensor of another shape is refused by its key, before any target changes."""
        mesh(2)
        with LocalTensorMode(2):
            refuse_another_shape(mesh, lambda values, into: judged(values, into, CPU))


@pytest.mark.judges("_state_dict_utils._distribute_tensors")
class TestDistributeTensors:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(4)
    def test_every_rank_is_played(self, judged: Any, mesh: Any) -> None:
        """Every rank that is played must get its part, in the memory that is there."""
        mesh(4), mesh(2, 2)
        with LocalTensorMode(4):
            into = spread(mesh, zero=True)
            held = {name: value for name, value in into.items() if isinstance(value, DTensor)}
            pairs: dict[str, Any] = {name: (held[name], WHOLE[name]) for name in held}
            judged(pairs, [*pairs, "missing"], CPU)
            assert all(pairs[name] is held[name] for name in held), "another object"
            assert_whole(pairs | {"plain": WHOLE["plain"]})

    @pytest.mark.law("all-or-nothing")
    @pytest.mark.world(2)
    def test_another_shape(self, judged: Any, mesh: Any) -> None:
        """A full tensor of another shape is refused by its key, before any target changes."""
        mesh(2)
        with LocalTensorMode(2):
            refuse_another_shape(
                mesh,
                lambda values, into: judged(
                    {name: (into[name], values[name]) for name in into}, [*into], CPU
                ),
            )
