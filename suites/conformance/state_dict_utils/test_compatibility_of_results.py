"""What callers rely on today: attributes of results, pickles, None, and no process group."""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.functions import Function, Place, each
from conformance.kit.layouts import S, dtensor
from conformance.kit.nested import tensors

SAME = (lambda tensor, *_: tensor,) * 3


def _written_on() -> dict[str, torch.Tensor]:
    """Tensors that bear attributes, as libraries write them; nn.Buffer is one of these."""
    parameter = nn.Parameter(numbers(3))
    tied = numbers(2)
    value = {"parameter": parameter, "plain": numbers(4), "tied": tied, "twin": tied}
    for tensor in value.values():
        tensor.__dict__["partition_dim"] = 0
    return {**value, "buffer": nn.Buffer(numbers(2))}


def _assert_written_on(got: dict[str, Any]) -> None:
    for name, tensor in got.items():
        if name != "buffer":
            found = getattr(tensor, "partition_dim", None)
            assert found == 0, f"{name}.partition_dim is {found}, expected 0"
    assert isinstance(got["buffer"], nn.Buffer), "the buffer is no nn.Buffer any more"


@contextmanager
def _without_a_group() -> Iterator[None]:
    dist.destroy_process_group()
    try:
        yield
    finally:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)


_ALONE = ("plain", "frozen", "strided")


@pytest.mark.law("compatibility")
@pytest.mark.world(1)
@each(lambda function: "broadcast" not in function.name and "plain" in function.kinds())
def test_no_process_group(
    function: Function, world: Any, subject: Any, device: torch.device
) -> None:
    """A process that is no part of a job must get what needs no other rank, of plain tensors."""
    place = Place(world, None, subject, device)
    call = function.call(place, {kind: (kind, numbers(3, 2)) for kind in _ALONE})
    with _without_a_group():
        got = call.run()
    call.check(got)


def _with_local_factory(flat: dict[str, Any]) -> dict[str, Any]:
    return {
        "seen": defaultdict(lambda: 0, flat),
        "deep": [defaultdict(lambda: 0, {"again": flat["w"]})],
    }


@pytest.mark.law("compatibility")
@pytest.mark.world(1)
@each(lambda f: f.nested and f.name not in ("_check_state_dict_similarity", "_traverse_state_dict"))
def test_a_factory_that_cannot_be_pickled(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device
) -> None:
    """A defaultdict with a local factory must not prevent the result from being saved."""
    place = Place(world, mesh(1), subject, device)
    got = function.call(place, {"w": ("plain", numbers(3))}, _with_local_factory).run()
    found = tensors(pickle.loads(pickle.dumps(got)))
    assert len(found) == 2, f"tensors at {list(found)}, expected two"
    for path, tensor in found.items():
        assert tensor.shape == (3,), f"{path}: {tensor.shape}"
        if function.values:
            assert_same(tensor, numbers(3), str(path))


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGathered:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("cpu_offload", [False, True], ids=["device", "cpu_offload"])
    def test_attributes_of_tensors(self, judged: Any, cpu_offload: bool) -> None:
        """Tensors that every rank holds whole must keep the attributes written on them."""
        _assert_written_on(judged(_written_on(), cpu_offload=cpu_offload))

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("cpu_offload", [False, True], ids=["device", "cpu_offload"])
    def test_without_a_process_group(self, judged: Any, cpu_offload: bool) -> None:
        """A process that is no part of a job must get the state dict of its plain tensors."""
        with _without_a_group():
            got = judged({"w": numbers(3), "step": 4}, cpu_offload=cpu_offload)
        assert_same(got["w"], numbers(3), "w")
        assert got["step"] == 4, f"step is {got['step']}"

    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_no_mapping_for_one_rank(self, judged: Any, mesh: Any, rank: int) -> None:
        """Of a list, or of one tensor, a rank outside `ranks_only` must get None."""
        full = numbers(5, 2)
        sharded = dtensor(full, mesh(2), [S(0)])
        several, single = judged([sharded], ranks_only=(0,)), judged(sharded, ranks_only=(0,))
        if rank:
            assert (several, single) == (None, None), f"got {several} and {single}"
        else:
            assert_same(several[0], full, "in a list")
            assert_same(single, full, "alone")


@pytest.mark.judges("_state_dict_utils._offload_state_dict_to_cpu")
class TestOffloaded:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_attributes_of_tensors(self, judged: Any, mesh: Any) -> None:
        """Tensors must keep the attributes written on them, DTensors, too."""
        sharded = dtensor(numbers(5, 2), mesh(1), [S(0)])
        sharded.__dict__["partition_dim"] = 0
        _assert_written_on(judged({**_written_on(), "sharded": sharded}))

    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_no_mapping_for_one_rank(self, judged: Any, rank: int) -> None:
        """Of a list, or of one tensor, a rank outside `ranks_only` must get None."""
        got = judged([numbers(2)], ranks_only=(0,)), judged(numbers(2), ranks_only=(0,))
        assert rank == 0 or got == (None, None), f"got {got}"


@pytest.mark.judges("_state_dict_utils._iterate_state_dict")
class TestIterated:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_attributes_of_tensors(self, judged: Any) -> None:
        """Tensors that are offloaded must keep the attributes written on them."""
        _assert_written_on(judged(_written_on(), *SAME, cpu_offload=True))
