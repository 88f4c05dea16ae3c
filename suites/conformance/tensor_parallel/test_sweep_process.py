"""What a call to a function of `tensor.parallel` finds in its process, and what it leaves there."""

from __future__ import annotations

import gc
import random
import weakref
from typing import Any

import pytest
import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.nn.parallel import DistributedDataParallel

from conformance.kit import fsdp1
from conformance.kit.compare import assert_same, local
from conformance.kit.data import numbers
from conformance.kit.effects import Watched
from conformance.kit.layouts import R, S
from conformance.kit.nested import storages
from conformance.kit.tensor_parallel import backward, net
from conformance.kit.tp_kinds import Seat, laid
from conformance.kit.tp_process import CONTEXTS, changed, flags, process
from conformance.kit.tp_roads import FUNCTIONS, Function, functions


def _state_stays(function: Function, judged: Any, seat: Seat) -> None:
    full = numbers(8, 4)
    for context, enter in CONTEXTS.items():
        for name, road in function.roads(full, seat):
            what = f"{name}, {context}"
            torch.rand(1, device="cpu")  # or a call that seeds would leave the seed's state
            random.random()
            inputs = {key: flags(tensor) for key, tensor in road.inputs.items()}
            with enter():
                before = process()
                got = road.call(judged)
                if context != "inference":
                    assert not _for_inference(got), f"{what}: nothing that trains can use it"
                assert not changed(before, process()), f"{what}: {changed(before, process())}"
            for key, tensor in road.inputs.items():
                found = changed(inputs[key], flags(tensor))
                assert not found, f"{what}: the {found} of the input {key} changed"
            try:
                road.check(got, full)
            except AssertionError as error:
                raise AssertionError(f"{what}: {error}") from None


def _nothing_is_kept(function: Function, judged: Any, seat: Seat) -> None:
    todo = list(function.roads(numbers(8, 4), seat))
    while todo:
        name, road = todo.pop()
        watched = Watched(dict(road.inputs))
        got = road.call(judged)
        road.check(got, numbers(8, 4))
        results = Watched(dict(enumerate(_tensors(got))))
        del road, got
        kept = watched.kept() + [f"result {name}" for name in results.kept()]
        assert not kept, f"{name}: {', '.join(kept)}: held after the call"


def _tensors(got: Any) -> list[torch.Tensor]:
    found = got if isinstance(got, (tuple, list)) else [got]
    return [t for t in found if isinstance(t, torch.Tensor)]


def _for_inference(got: Any) -> bool:
    held = [part for tensor in _tensors(got) for part in storages(tensor)]
    return any(part.is_inference() for part in held if not isinstance(part, ShardedTensor))


@pytest.mark.judges("tensor.parallel.fsdp._chunk_dtensor")
class TestChunksApart:
    @pytest.mark.law("isolation")
    @pytest.mark.world(4)
    def test_what_is_left_whole(self, judged: Any, seat: Seat) -> None:
        """Training must not change what was chunked, also where nothing could be cut."""
        root = seat.root()
        tp = fsdp1.tp_mesh(root)
        for shape in ((), (1,), (1, 1), (2, 1), (3, 5)):
            full = numbers(*shape)
            for leaf in (full.clone(), laid(full, tp, [R])):
                got = judged(leaf, fsdp1.fsdp_rank(root), fsdp1.fsdp_mesh(root))
                kept = local(got).clone()
                local(leaf).add_(1)
                assert_same(local(got), kept, f"{shape} of a {type(leaf).__name__}")


class TestProcess:
    @pytest.mark.law("isolation")
    @functions(2)
    def test_the_process_and_the_inputs_stay(
        self, function: Function, judged: Any, seat: Seat
    ) -> None:
        """In any of the caller's modes a call must be right, change no state and keep nothing."""
        _state_stays(function, judged, seat)
        _nothing_is_kept(function, judged, seat)

    @pytest.mark.law("isolation")
    @functions(4)
    def test_the_process_and_what_is_cut_stay(
        self, function: Function, judged: Any, seat: Seat
    ) -> None:
        """In any of the caller's modes a call must be right, change no state and keep nothing."""
        _state_stays(function, judged, seat)
        _nothing_is_kept(function, judged, seat)


def _root_of_its_own(device: torch.device) -> DeviceMesh:
    """No other mesh is equal to it, so that caches of torch do not stand in for it."""
    ranks = torch.arange(2, device="cpu").view(1, 2)
    return DeviceMesh(device.type, ranks, mesh_dim_names=("given", "back"))


def _unflatten(judged: Any, root: DeviceMesh) -> None:
    meta = TensorMeta(torch.Size((8, 4)), (4, 1), torch.float32)
    spec = DTensorSpec(root["back"], (S(0),), meta)
    judged(numbers(4, 4), spec, device_handle=None, compute_stream=None)


_ON_MESHES = {
    "_unflatten_tensor": _unflatten,
    "_chunk_dtensor": lambda judged, root: judged(numbers(8, 4), 0, root["given"]),
}


@pytest.mark.law("isolation")
@pytest.mark.should("torch remembers of its own operations on DTensors the meshes, too")
@pytest.mark.world(2)
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(function, id=function.name, marks=pytest.mark.judges(function.path))
        for function in FUNCTIONS
        if function.name in _ON_MESHES
    ],
)
def test_meshes_are_given_back(function: Function, judged: Any, device: torch.device) -> None:
    """A mesh must be gone once the caller lets go of it, and of what lies on it."""

    def call_on_a_mesh_of_its_own() -> weakref.ref[DeviceMesh]:
        root = _root_of_its_own(device)
        _ON_MESHES[function.name](judged, root)
        return weakref.ref(root)

    mesh = call_on_a_mesh_of_its_own()
    gc.collect()
    assert mesh() is None, "the mesh is held after the call"


@pytest.mark.judges("tensor.parallel.ddp._pre_dp_module_transform")
class TestWrappers:
    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_they_are_given_back(self, judged: Any, mesh: Any) -> None:
        """A module and what DDP puts around it must be gone once the caller lets go of them."""

        def train() -> list[weakref.ref[Any]]:
            root = mesh(1, 2)
            module = net(root["tp"])
            judged(module)
            wrapped = DistributedDataParallel(module, process_group=root["dp"].get_group())
            backward(wrapped)
            return [weakref.ref(wrapped), weakref.ref(module)]

        held = train()
        gc.collect()
        kept = [type(found).__name__ for ref in held if (found := ref()) is not None]
        assert not kept, f"{kept} are held after training"
