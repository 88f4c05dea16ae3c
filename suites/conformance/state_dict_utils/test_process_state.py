"""What a call leaves behind in its process, and what it finds there.

Grad mode, random numbers, defaults for devices and dtypes belong to the caller: a call changes
none of them, and is right under any. It keeps nothing of what it was given.
"""

from __future__ import annotations

import gc
import random
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from conformance.kit.compare import assert_same, fingerprint, local
from conformance.kit.data import numbers
from conformance.kit.layouts import R, S, dtensor
from conformance.kit.nested import spoil, storages, tensors
from conformance.kit.roads import ROADS, Make, Road


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# Name -> a context that callers may be in.
CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": torch.enable_grad,
    "no-grad": torch.no_grad,
    "default-device": lambda: torch.device("meta"),
    "default-dtype": lambda: _default_dtype(torch.bfloat16),
    "deterministic": _deterministic,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def _state() -> dict[str, Any]:
    """What the process holds that a call might change."""
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "random numbers of torch": torch.random.get_rng_state().tolist(),
        "random numbers of Python": random.getstate(),
        "threads of torch": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warning filters": list(warnings.filters),
        "process groups": len(dist.distributed_c10d._world.pg_map),
        "threads of Python": threading.active_count(),
    }


def _roads(request: pytest.FixtureRequest) -> dict[str, Make]:
    marker = request.node.get_closest_marker("judges")
    assert marker is not None
    return ROADS[marker.args[0].rpartition(".")[2]]


@pytest.fixture
def roads(
    request: pytest.FixtureRequest, mesh: Any, world: Any
) -> Callable[..., list[tuple[str, Road]]]:
    """`roads(full)`: (name, a new road) for each road of the function that is judged."""
    line = mesh(world.size)

    def make(full: torch.Tensor) -> list[tuple[str, Road]]:
        return [(name, one(full, line, world)) for name, one in _roads(request).items()]

    return make


class _State:
    """What each function is asked; its class says which."""

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_the_process_is_as_it_was(self, judged: Any, roads: Any) -> None:
        """Grad mode, random numbers, defaults and groups must be after a call as before."""
        for context, entered in CONTEXTS.items():
            for name, road in roads(numbers(5, 4)):
                torch.rand(1, device="cpu")  # or a call that seeds would leave the seed's state
                random.random()
                with entered():
                    before = _state()
                    road.call(judged)
                    after = _state()
                changed = [what for what in before if before[what] != after[what]]
                assert not changed, f"{name} under {context}: the call changed {changed}"

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("size", ["small", "large"])
    @pytest.mark.thorough(but=["small"])
    def test_right_under_any_state(self, judged: Any, roads: Any, size: str) -> None:
        """Values must be right whatever the caller's defaults and modes are."""
        full = numbers(6, 4) if size == "small" else numbers(1024, 1024)
        for context, entered in {**CONTEXTS, "inference": torch.inference_mode}.items():
            for name, road in roads(full):
                with entered():
                    got = road.call(judged)
                try:
                    road.check(got, full)
                except AssertionError as error:
                    raise AssertionError(f"{name} under {context}: {error}") from error

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_other_values_in_the_same_tensors(self, judged: Any, roads: Any) -> None:
        """A second call must see what training has made of the same tensors meanwhile."""
        full, other = numbers(6, 4), numbers(6, 4, salt=5)
        for (_, road), (_, later) in zip(roads(full), roads(other), strict=True):
            road.check(road.call(judged), full)
            news = tensors(later.inputs)
            for path, tensor in tensors(road.inputs).items():
                for old, new in zip(storages(tensor), storages(news[path]), strict=True):
                    old.copy_(new)
            road.check(road.call(judged), other)

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("size", ["small", "large"])
    @pytest.mark.thorough(but=["large"])
    def test_inputs_are_used_again_at_once(self, judged: Any, roads: Any, size: str) -> None:
        """What a caller writes into its tensors after the call must reach no result, anywhere."""
        full = numbers(6, 4) if size == "small" else numbers(1024, 1024)
        for _, road in roads(full):
            got = road.call(judged)
            spoil(road.inputs)
            road.check(got, full)

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_inputs_are_only_read(self, judged: Any, roads: Any) -> None:
        """The containers and tensors that a call reads must be as they were."""
        for name, road in roads(numbers(5, 4)):
            before = fingerprint(road.inputs)
            road.call(judged)
            assert fingerprint(road.inputs) == before, f"{name}: the call changed its input"

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_nothing_is_kept(self, judged: Any, roads: Any) -> None:
        """Once the caller lets go of its tensors they must be gone: no cache may hold them."""
        todo = roads(numbers(5, 4))
        while todo:
            name, road = todo.pop()
            gone: dict[Any, threading.Event] = {}
            for path in tensors(road.inputs):
                gone[path] = threading.Event()
                weakref.finalize(local(tensors(road.inputs)[path]), gone[path].set)
            got = road.call(judged)
            del road, got
            gc.collect()
            # A backend's own thread may let go of what it has sent a little later.
            until = time.monotonic() + 3
            for event in gone.values():
                event.wait(max(until - time.monotonic(), 0))
            kept = [path for path, event in gone.items() if not event.is_set()]
            assert not kept, f"{name}: {kept} are still held after the call"


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherState(_State):
    """To all, to the CPU, to one rank."""

    @pytest.mark.law("autograd")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("placement", [S(0), R], ids=str)
    @pytest.mark.thorough(but=["S(0)"])
    def test_gathered_parameters_do_not_require_grad(
        self, judged: Any, mesh: Any, placement: Any
    ) -> None:
        """What is gathered from parameters under no_grad must require no grad."""
        weight = nn.Parameter(dtensor(numbers(4, 3), mesh(2), [placement]))
        with torch.no_grad():
            got = judged({"w": weight})["w"]
        assert not got.requires_grad, "the gathered tensor requires grad"
        assert weight.requires_grad, "the parameter no longer does"


@pytest.mark.judges("_state_dict_utils._all_gather_sharded_tensor")
class TestAllGatherShardedTensorState(_State):
    """One ShardedTensor."""


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastState(_State):
    """Into shards, replicas, plain tensors and meta targets, one and many."""

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    @pytest.mark.thorough
    def test_a_large_source_is_used_again_at_once(
        self, judged: Any, rank: int, device: torch.device
    ) -> None:
        """What the source writes after the call must not arrive, were it still being sent."""
        for salt in range(4):
            full, local_state = numbers(4096, 1024, salt=salt), {"w": numbers(4096, 1024, salt=7)}
            source = full.clone()
            judged({"w": source} if rank == 0 else {}, local_state, device)
            source.fill_(-1)
            assert_same(local_state["w"], full, f"call {salt}")


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistributeState(_State):
    """The same, from full tensors on every rank."""


@pytest.mark.judges("_state_dict_utils._offload_state_dict_to_cpu")
class TestOffloadState(_State):
    """DTensors and plain tensors."""


@pytest.mark.judges("_state_dict_utils._copy_state_dict")
class TestCopyState(_State):
    """DTensors and plain tensors."""


@pytest.mark.judges("_state_dict_utils._iterate_state_dict")
class TestIterateState(_State):
    """DTensors and plain tensors, to the CPU."""
