"""What a call leaves behind in the process, on what it was given, and in memory."""

from __future__ import annotations

import gc
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh

from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.effects import (
    Watched,
    differing,
    finish,
    mark,
    of_the_process,
    on_what_was_given,
)
from conformance.kit.functions import FUNCTIONS, Call, Function, Place, each, each_with_kinds
from conformance.kit.meanwhile import Meanwhile, after_each_write
from conformance.kit.nested import leaves, storages, tensors

_OPENED = {"open files", "threads of Python"}
"""What a first call may leave: a backend's connections, and who looks after them."""
_TRAINED = {"rows that train", "Parameter"}


@pytest.mark.law("isolation")
@pytest.mark.world(2)
@each_with_kinds()
@pytest.mark.thorough(but=["unusual"])
def test_as_it_was(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device, usual: bool
) -> None:
    """The process, and all that a call reads, must be after it as before, for every kind of leaf.

    A first call may open connections.
    """
    place = Place(world, mesh(2), subject, device)
    dtypes = {"conjugated rows": torch.complex64}  # of others Gloo moves none that is complex
    leaves = {
        name: (name, numbers(5, 4, dtype=dtypes.get(name, torch.float32)))
        for name in function.kinds(usual=usual)
    }
    first = function.call(place, leaves)
    process = of_the_process()
    first.run()
    changed = [name for name in differing(process, of_the_process()) if name not in _OPENED]
    assert not changed, f"the first call changed {changed}"
    call = function.call(place, leaves)
    mark(call.inputs)
    mark(call.outputs or {})
    process, given = of_the_process(), on_what_was_given(call.inputs)
    got = call.run()
    after = of_the_process()
    changed = differing(process, after)
    assert not changed, f"the call changed {changed}"
    changed = differing(given, on_what_was_given(call.inputs))
    assert not changed, f"the call changed, of what it was given, {changed}"
    call.check(got)
    for path, tensor in tensors([got, call.outputs]).items():
        inference = any(map(torch.is_inference, storages(tensor)))
        assert not inference, f"{path}: nothing that trains can use it: made in inference mode"


@contextmanager
def _another_state() -> Iterator[None]:
    """All that a caller may switch is switched to what it is not at first."""
    limits, limit, dtype = gc.get_threshold(), sys.getrecursionlimit(), torch.get_default_dtype()
    gc.disable()
    gc.set_threshold(500, 5, 5)
    sys.setrecursionlimit(limit + 100)
    torch.set_default_dtype(torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    warnings.filterwarnings("ignore", "what nobody says")
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            yield
    finally:
        gc.enable()
        gc.set_threshold(*limits)
        sys.setrecursionlimit(limit)
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(False)


@pytest.mark.law("isolation")
@pytest.mark.world(2)
@each()
def test_as_it_was_in_another_state(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device
) -> None:
    """What the caller has switched off, or to another value, must be so after a call as well."""
    place = Place(world, mesh(2), subject, device)
    first, call = (function.each_kind(place, numbers(5, 4), usual=True) for _ in range(2))
    with warnings.catch_warnings(), _another_state():
        process = of_the_process()
        first.run()
        after = of_the_process()
        got = call.run()
        changed = differing(after, of_the_process())
    opened = [name for name in differing(process, after) if name not in _OPENED]
    assert not opened, f"the first call changed {opened}"
    assert not changed, f"the call changed {changed}"
    call.check(got)


def _memory(value: Any) -> list[tuple[torch.Tensor, Any]]:
    """The plain tensors of a state dict, each with its memory as an array of NumPy."""
    found = []
    for tensor in tensors(value).values():
        for plain in storages(tensor):
            memory = torch.empty(0, dtype=torch.uint8).set_(plain.untyped_storage())
            found.append((plain, memory.numpy()))
    return found


@pytest.mark.law("isolation")
@pytest.mark.world(2)
@each(lambda function: function.values and not function.same_objects)
def test_memory_stays_where_it_is(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device
) -> None:
    """A pointer into a tensor must stay one after the call, and must reach no result."""
    place = Place(world, mesh(2), subject, device)
    for size in ((5, 4), (1024, 640)):
        call = function.each_kind(place, numbers(*size), usual=True)
        held = _memory(call.inputs)
        got = call.run()
        for plain, array in held:
            if plain.is_contiguous():
                plain.detach().view(-1)[:1].add_(1)  # copies what is shared until it is written
            at = plain.untyped_storage().data_ptr()
            assert at == array.ctypes.data, f"{size}: a tensor {plain.shape} has other memory now"
        for array in {array.ctypes.data: array for _, array in held}.values():
            array[:] = ~array
        call.check(got)


@pytest.mark.law("isolation")
@pytest.mark.world(2)
@each_with_kinds()
@pytest.mark.thorough(but=["unusual"])
def test_nothing_is_kept(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device, usual: bool
) -> None:
    """What a call was given, and what it gave, must be gone once the caller lets go of it."""
    place = Place(world, mesh(2), subject, device)
    for _ in range(2):
        call = function.each_kind(place, numbers(5, 4), usual=usual)
        watched = [Watched(call.inputs), Watched(call.outputs or {})]
        got = call.run()
        if isinstance(got, dict):
            watched.append(Watched(got))
        finish(call.inputs)  # torch holds what a collective writes until somebody waits for it
        del call, got
        for each_watched in watched:
            kept = each_watched.kept()
            assert not kept, f"{kept} are still held after the call"


@pytest.mark.law("isolation")
@pytest.mark.should("the garbage collector gives back the memory, too, where and when it runs")
@pytest.mark.world(2)
@each()
def test_nothing_waits_for_the_garbage_collector(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device
) -> None:
    """What nobody holds must be gone at once: trainings switch the garbage collector off."""
    place = Place(world, mesh(2), subject, device)
    full = numbers(5, 4)
    function.each_kind(place, full, usual=True).run()
    gc.disable()
    try:
        call = function.each_kind(place, full, usual=True)
        watched = [Watched(call.inputs), Watched(call.outputs or {})]
        got = call.run()
        if isinstance(got, dict):
            watched.append(Watched(got))
        finish(call.inputs)
        del call, got
        kept = [name for one in watched for name in one.kept(patience=1, collect=False)]
    finally:
        gc.enable()
    assert not kept, f"{kept} are held until the garbage collector runs"


@pytest.mark.law("symmetry")
@pytest.mark.world(2)
@each(lambda function: not function.talks)
def test_alone(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device
) -> None:
    """What needs no other rank must be done where one calls alone, whatever group it is given."""
    call = function.each_kind(Place(world, mesh(2), subject, device), numbers(5, 4), usual=True)
    if world.rank == 1:
        call.check(call.run())
    if world.rank == 0 and function.name == "_distribute_state_dict":
        judged = subject.function("_state_dict_utils._distribute_state_dict")
        into = {"w": numbers(5, 4)}
        judged({"w": numbers(5, 4, salt=1)}, into, device, torch.distributed.group.WORLD)
        assert_same(into["w"], numbers(5, 4, salt=1))


@pytest.mark.law("autograd")
@pytest.mark.world(2)
@each(lambda function: not function.same_objects and bool(_TRAINED & function.kinds().keys()))
def test_a_target_keeps_its_gradient(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device
) -> None:
    """A target that stays must keep `.grad`, hooks and attributes; a new tensor has none."""
    kinds = sorted(_TRAINED & function.kinds().keys())
    place = Place(world, mesh(2), subject, device)
    call = function.call(place, {kind: (kind, numbers(5, 4)) for kind in kinds})
    mark(call.inputs)
    mark(call.outputs or {})
    before = {key: _held(leaf) for key, leaf in (call.outputs or {}).items()}
    got = call.run()
    after = call.outputs or {}
    for key, held in before.items():
        if id(_leaf(after[key])) == held[0]:
            assert _held(after[key]) == held, f"{key}: its gradient or its attributes changed"
        else:
            assert _leaf(after[key]).grad is None, f"{key}: a new tensor has a gradient"
    if call.outputs is None and isinstance(got, dict):
        for key, leaf in got.items():
            assert leaf.grad is None, f"{key}: a new tensor has a gradient"
            assert leaf.grad_fn is None, f"{key}: a new tensor has a graph"


def _leaf(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def _held(value: Any) -> tuple[Any, ...]:
    leaf = _leaf(value)
    hooks = tuple(leaf._backward_hooks or ())
    return id(leaf), id(leaf.grad), leaf.requires_grad, hooks, vars(leaf).get("owner")


@pytest.mark.law("isolation")
@pytest.mark.world(2)
@each()
def test_a_thread_that_trains_meanwhile(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device
) -> None:
    """Training in another thread must go on with gradients, and calls must be right beside it."""
    place = Place(world, mesh(2), subject, device)
    over, wrong = threading.Event(), []

    def train() -> None:
        weight = torch.ones(16, 16, requires_grad=True)
        while not over.is_set():
            loss = (weight @ weight).sum()
            if not loss.requires_grad:
                wrong.append("no graph was recorded")
                return
            loss.backward()
            if weight.grad is None or not torch.equal(weight.grad, torch.full((16, 16), 32.0)):
                wrong.append(f"the gradient is {weight.grad}")
                return
            weight.grad = None

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(4):
            call = function.each_kind(place, numbers(5, 4), usual=True)
            call.check(call.run())
    finally:
        over.set()
        thread.join()
    assert not wrong, f"in the other thread {wrong[0]}"


class _Over:
    """The subject, whose functions that talk do so over a group."""

    def __init__(self, subject: Any, group: Any) -> None:
        self._subject, self._group = subject, group

    def function(self, name: str) -> Any:
        talking = {each_one.name for each_one in FUNCTIONS if each_one.talks}
        found = self._subject.function(name)
        return partial(found, pg=self._group) if name.rpartition(".")[2] in talking else found


@pytest.mark.law("isolation")
@pytest.mark.world(2, collective=15, limit=40)
@each(lambda function: function.values and not function.same_objects)
def test_a_thread_that_calls_meanwhile(
    function: Function, world: Any, subject: Any, device: torch.device
) -> None:
    """Calls of two threads, each over a group of its own, must each get their own values."""
    places = []
    for name in ("one", "other"):
        group: Any = dist.new_group([0, 1])
        line = DeviceMesh.from_group(group, device.type, mesh_dim_names=(name,))
        places.append(Place(world, line, _Over(subject, group), device))

    def made(number: int) -> Call:
        leaves = {
            f"{kind} {n}": (kind, numbers(6, 4, salt=2 * n + number))
            for kind in function.kinds(usual=True)
            for n in range(2)
        }
        return function.call(places[number], leaves)

    def call_beside() -> None:
        beside = made(1)
        beside.check(beside.run())

    call = made(0)
    other = Meanwhile(call_beside, places[1].mesh.get_group())
    other.start()
    try:
        with after_each_write(other.make_one):
            got = call.run()
    finally:
        other.end()
    call.check(got)


@pytest.mark.law("isolation")
@pytest.mark.should("torch remembers of its own operations on DTensors the meshes, too")
@pytest.mark.world(2)
@each()
def test_meshes_are_given_back(
    function: Function, world: Any, subject: Any, device: torch.device
) -> None:
    """A mesh must be gone once the caller lets go of it, and of what lies on it."""

    def call_on_a_mesh_of_its_own() -> weakref.ref[DeviceMesh]:
        # No other mesh is equal to it, so that caches of torch do not stand in for it.
        line = DeviceMesh(device.type, torch.arange(2), mesh_dim_names=("given back",))
        place = Place(world, line, subject, device)
        function.each_kind(place, numbers(5, 4), usual=True).run()
        return weakref.ref(line)

    mesh = call_on_a_mesh_of_its_own()
    gc.collect()
    assert mesh() is None, "the mesh is held after the call"


@pytest.mark.law("isolation")
@pytest.mark.world(2)
@each(lambda function: "shards" in function.kinds() and not function.talks)
def test_metadata_stay(
    function: Function, mesh: Any, world: Any, subject: Any, device: torch.device
) -> None:
    """What a ShardedTensor says of itself must be after a call as before, flags included."""
    call = function.call(Place(world, mesh(2), subject, device), {"w": ("shards", numbers(5, 4))})
    given = [leaf for _, leaf in leaves(call.inputs) if isinstance(leaf, ShardedTensor)]
    for tensor in given:
        tensor.metadata().tensor_properties.requires_grad = True
        for shard in tensor.local_shards():
            shard.tensor.requires_grad_()
    before = [repr(tensor.metadata()) for tensor in given]
    got = call.run()
    after = [repr(tensor.metadata()) for tensor in given]
    assert given, "nothing was given"
    assert after == before, f"{after}, was {before}"
    if not function.same_objects:
        copies = [leaf for _, leaf in leaves(got) if isinstance(leaf, ShardedTensor)]
        for one, other in zip(copies, given, strict=False):
            assert one.metadata().tensor_properties is not other.metadata().tensor_properties
