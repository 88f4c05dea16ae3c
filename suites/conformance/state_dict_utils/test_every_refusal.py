"""Each documented error of the functions that ranks call together, on one rank and on all.

After it nothing is changed, and a call with what was wrong put right works.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from conformance.kit.agree import assert_raises_everywhere
from conformance.kit.compare import assert_same, fingerprint, local
from conformance.kit.data import numbers
from conformance.kit.functions import Function, each
from conformance.kit.layouts import S, dtensor, part, rows, sharded_tensor
from conformance.kit.refusals import MISSING, refused

KEY = "layer.odd"
FULL = (6, 4)
EACH_RANK = (0, 1, None)
"""Where it is wrong: on the first, on the last, on all."""

# What is wrong with a leaf: name -> (what stands in its place, given the mesh; words of the error).
LEAVES: dict[str, tuple[Callable[[Any], Any], tuple[type[Exception], ...]]] = {
    "a lock": (lambda _: threading.Lock(), MISSING),
    "an object": (lambda _: object(), MISSING),
    "a function in a list": (lambda _: [1, print], MISSING),
}

# What is wrong with a target.
TARGETS: dict[str, Callable[[Any], Any]] = {
    "another shape": lambda mesh: dtensor(numbers(4, 6), mesh, [S(0)]),
    "a dimension less": lambda mesh: dtensor(numbers(24), mesh, [S(0)]),
    "a ShardedTensor": lambda _: sharded_tensor(numbers(*FULL), rows(FULL, [3, 3])),
    "a number": lambda _: 3.0,
    "text": lambda _: "text",
    "memory that its elements share": lambda mesh: dtensor(
        numbers(*FULL), mesh, [S(0)], local=numbers(1, 4).expand(3, 4)
    ),
}

# What is wrong with the source's entry.
SOURCES: dict[str, Callable[[Any], Any]] = {
    "a DTensor": lambda mesh: dtensor(numbers(*FULL), mesh, [S(0)]),
    "a DTensor in columns": lambda mesh: dtensor(numbers(*FULL), mesh, [S(1)]),
    "a ShardedTensor": lambda _: sharded_tensor(numbers(*FULL), rows(FULL, [3, 3])),
    "a tensor on meta": lambda _: numbers(*FULL).to("meta"),
    "a complex tensor": lambda _: numbers(*FULL, dtype=torch.complex64),
    "a sparse tensor": lambda _: numbers(*FULL).to_sparse(),
    "a number": lambda _: 3.0,
    "another shape": lambda _: numbers(4, 6),
}


def _on_meta(mesh: Any) -> Any:
    return dtensor(numbers(*FULL), mesh, [S(0)], local=numbers(3, 4).to("meta"))


# Where every rank holds the full state dict one that is placed as its target is may land.
PLACED: dict[str, Callable[[Any], Any]] = {
    "a DTensor placed otherwise": lambda mesh: dtensor(numbers(*FULL), mesh, [S(1)]),
    "a DTensor on another mesh": lambda mesh: dtensor(
        numbers(*FULL), DeviceMesh(mesh.device_type, [1, 0]), [S(0)]
    ),
    "a DTensor on meta": _on_meta,
}


class _Stays:
    """Refuses to be pickled, with an error of its own."""

    def __reduce__(self) -> Any:
        raise LookupError("not this one")


_UNPICKLABLE: dict[str, Callable[[Any], Any]] = {
    "a lock": lambda _: threading.Lock(),
    "an object": lambda _: _Stays(),
}


def _target(mesh: Any) -> Any:
    return dtensor(torch.zeros(*FULL), mesh, [S(0)])


def _wrong(at: int | None, world: Any) -> bool:
    return at in (None, world.rank)


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherRefuses:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=30)
    def test_leaves(self, judged: Any, mesh: Any, world: Any) -> None:
        """A leaf that no checkpoint can hold must be refused by name on every rank."""
        for (name, (make, kinds)), at in product(LEAVES.items(), EACH_RANK):
            fine = dtensor(numbers(*FULL), mesh(2), [S(0)])
            value: dict[str, Any] = {"fine": fine, KEY: 3}
            if _wrong(at, world):
                value[KEY] = make(mesh(2))
            assert_raises_everywhere(
                world, partial(judged, value), KEY, kinds=kinds, name=f"{name} {at}"
            )
            value[KEY] = 3
            assert_same(judged(value)["fine"], numbers(*FULL), f"after {name}")

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=30)
    def test_on_meta_on_one_rank(self, judged: Any, mesh: Any, world: Any) -> None:
        """A leaf without data on one rank must be refused on each, whatever is beside it."""
        for at, before in product((0, 1), (False, True)):
            fine = dtensor(numbers(*FULL), mesh(2), [S(0)])
            if before:
                judged({"fine": fine, KEY: fine})
            odd = dtensor(numbers(*FULL, salt=1), mesh(2), [S(0)])
            value = {"fine": fine, KEY: odd.to("meta") if world.rank == at else odd}
            assert_raises_everywhere(
                world, partial(judged, value), KEY, kinds=MISSING, name=str(at)
            )


class _Landing:
    """Calls by which full tensors land; the class says whose."""

    talks = True
    beside: ClassVar[dict[str, Any]] = {}
    """What no tensor is, and lands beside them."""

    def call(
        self, judged: Any, subject: Any, world: Any, given: Any, into: Any, device: Any
    ) -> Callable[[], Any]:
        """The call on this rank, with `given` in the full state dict."""
        raise NotImplementedError

    def landed(self, into: Any) -> Any:
        """What has landed."""
        return into[KEY]

    @pytest.mark.law("all-or-nothing")
    @pytest.mark.world(2, collective=8, limit=40)
    def test_targets(
        self, judged: Any, mesh: Any, world: Any, subject: Any, device: torch.device
    ) -> None:
        """A target that cannot take its tensor must be refused by name, and nothing written."""
        for (name, make), at in product(self.targets().items(), EACH_RANK):
            into = {**self.beside, "fine": _target(mesh(2)), KEY: _target(mesh(2))}
            if _wrong(at, world):
                into[KEY] = make(mesh(2))
            new = dict.fromkeys(self.beside, 7)
            given = {**new, "fine": numbers(*FULL, salt=1), KEY: numbers(*FULL)}
            self._assert_refused(
                self.call(judged, subject, world, given, into, device),
                world,
                into,
                f"{name} {at}",
                wrong=_wrong(at, world),
            )
            into = {"fine": _target(mesh(2)), KEY: _target(mesh(2))}
            call = self.call(judged, subject, world, given, into, device)
            self._assert_lands(call, into, mesh, name)

    @pytest.mark.law("all-or-nothing")
    @pytest.mark.world(2, collective=8, limit=40)
    def test_sources(
        self, judged: Any, mesh: Any, world: Any, subject: Any, device: torch.device
    ) -> None:
        """What cannot land must be refused by name, and nothing written."""
        for name, make in self.sources().items():
            into = {**self.beside, "fine": _target(mesh(2)), KEY: _target(mesh(2))}
            new = dict.fromkeys(self.beside, 7)
            given = {**new, "fine": numbers(*FULL, salt=1), KEY: make(mesh(2))}
            call = self.call(judged, subject, world, given, into, device)
            self._assert_refused(call, world, into, name, wrong=True)
            given[KEY] = numbers(*FULL)
            call = self.call(judged, subject, world, given, into, device)
            self._assert_lands(call, into, mesh, name)

    def targets(self) -> dict[str, Callable[[Any], Any]]:
        """What may be wrong with a target."""
        return TARGETS

    def sources(self) -> dict[str, Callable[[Any], Any]]:
        """What may be wrong with an entry of the full state dict."""
        return SOURCES

    def _assert_refused(
        self, call: Callable[[], Any], world: Any, outputs: Any, name: str, *, wrong: bool
    ) -> None:
        before = fingerprint(outputs)
        if self.talks:
            assert_raises_everywhere(world, call, KEY, kinds=MISSING, name=name)
        elif wrong:
            refused(call, KEY, kinds=MISSING, what=name)
        else:
            return
        assert fingerprint(outputs) == before, f"{name}: something was written"

    def _assert_lands(self, call: Callable[[], Any], into: Any, mesh: Any, name: str) -> None:
        call()
        expected = part(numbers(*FULL), mesh(2), [S(0)])
        assert_same(local(self.landed(into)), expected, f"after {name}")


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastRefuses(_Landing):
    beside: ClassVar[dict[str, Any]] = {"step": 3}

    def call(
        self, judged: Any, subject: Any, world: Any, given: Any, into: Any, device: Any
    ) -> Callable[[], Any]:
        return partial(judged, given if world.rank == 0 else {}, into, device)

    def sources(self) -> dict[str, Callable[[Any], Any]]:
        return SOURCES | _UNPICKLABLE

    @pytest.mark.law("symmetry")
    @pytest.mark.world(3, collective=8, limit=30)
    def test_a_plain_target_of_another_shape(
        self, judged: Any, world: Any, device: torch.device
    ) -> None:
        """One on any single rank must be refused by name on every rank."""
        for at in range(3):
            into = {"fine": torch.zeros(FULL), KEY: torch.zeros(FULL)}
            if world.rank == at:
                into[KEY] = torch.zeros(4, 6)
            given = {key: numbers(*FULL) for key in into} if world.rank == 0 else {}
            call = partial(judged, given, into, device)
            assert_raises_everywhere(world, call, KEY, kinds=MISSING, name=f"rank {at}")


@pytest.mark.judges("_state_dict_utils._broadcast_tensors")
class TestBroadcastTensorsRefuses(_Landing):
    def call(
        self, judged: Any, subject: Any, world: Any, given: Any, into: Any, device: Any
    ) -> Callable[[], Any]:
        info = subject.function("_state_dict_utils._TensorInfo")
        source = {
            key: full if world.rank == 0 else info(torch.Size(FULL), torch.float32)
            for key, full in given.items()
        }
        return partial(judged, source, into, list(given), device)

    def sources(self) -> dict[str, Callable[[Any], Any]]:
        return SOURCES | _UNPICKLABLE

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=30)
    def test_a_key_that_is_missing(
        self, judged: Any, mesh: Any, world: Any, subject: Any, device: torch.device
    ) -> None:
        """A key that the full state dict lacks must be refused by name on every rank."""
        info = subject.function("_state_dict_utils._TensorInfo")
        full = numbers(*FULL)
        for at in EACH_RANK:
            source: dict[Any, Any] = {
                key: full if world.rank == 0 else info(full.shape, full.dtype)
                for key in ("fine", KEY)
            }
            if _wrong(at, world):
                del source[KEY]
            into = {"fine": _target(mesh(2)), KEY: _target(mesh(2))}
            call = partial(judged, source, into, ["fine", KEY], device)
            assert_raises_everywhere(world, call, KEY, kinds=MISSING, name=str(at))

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=30)
    def test_keys_that_differ(
        self, judged: Any, mesh: Any, world: Any, subject: Any, device: torch.device
    ) -> None:
        """Keys that only one rank names must be refused on every rank, whatever their types."""
        info = subject.function("_state_dict_utils._TensorInfo")
        full = numbers(*FULL)
        for odd, at in product(["other", 7, ("a", 1), None], (0, 1)):
            keys: list[Any] = ["fine", odd] if world.rank == at else ["fine"]
            source = {k: full if world.rank == 0 else info(full.shape, full.dtype) for k in keys}
            into = {key: _target(mesh(2)) for key in keys}
            call = partial(judged, source, into, keys, device)
            assert_raises_everywhere(world, call, repr(odd), kinds=MISSING, name=f"{odd!r} {at}")


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistributeRefuses(_Landing):
    talks = False
    beside: ClassVar[dict[str, Any]] = {"step": 3}

    def call(
        self, judged: Any, subject: Any, world: Any, given: Any, into: Any, device: Any
    ) -> Callable[[], Any]:
        return partial(judged, given, into, device)

    def targets(self) -> dict[str, Callable[[Any], Any]]:
        # What is not written may share what it likes.
        return {name: make for name, make in TARGETS.items() if "share" not in name}

    def sources(self) -> dict[str, Callable[[Any], Any]]:
        return {name: make for name, make in SOURCES.items() if name != "a DTensor"} | PLACED


@pytest.mark.judges("_state_dict_utils._all_gather_sharded_tensor")
class TestAllGatherRefuses:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(3, collective=8, limit=30)
    def test_shards_outside_the_group(self, judged: Any, world: Any) -> None:
        """A group that lacks the owner of a shard must be refused on each of its ranks."""
        tensor = sharded_tensor(numbers(6, 2), rows((6, 2), [2, 2, 2]))
        some = torch.distributed.new_group([0, 1])
        if world.rank == 2:
            return
        error = refused(lambda: judged(tensor, some))
        assert "2" in str(error), f"rank 2 is not named: {error}"


class _Closed(torch.Tensor):
    """Takes no values, and says so when it is to take them."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "copy_" in str(func):
            raise LookupError("closed")
        return super().__torch_function__(func, types, args, kwargs or {})


COMPANIONS: dict[str, Callable[[], torch.Tensor]] = {
    "memory that its elements share": lambda: torch.zeros(1).expand(3),
    "a class that refuses": lambda: torch.zeros(3).as_subclass(_Closed),
    "on meta": lambda: torch.zeros(3, device="meta"),
    "another shape": lambda: torch.zeros(4),
}
"""Name -> what cannot take three numbers."""


@pytest.mark.law("all-or-nothing")
@pytest.mark.world(1)
@each(lambda function: function.name in ("_copy_state_dict", "_iterate_state_dict"))
def test_companions(function: Function, subject: Any) -> None:
    """One that cannot take its tensor must be refused, nothing written, and all modes kept."""
    judged = subject.function(f"_state_dict_utils.{function.name}")
    value = {"fine": numbers(3), "odd": numbers(3, salt=1)}
    for (name, make), grad in product(COMPANIONS.items(), (True, False)):
        into = {"fine": torch.zeros(3), "odd": make()}
        if function.name == "_copy_state_dict":
            call = partial(judged, value, into)
        else:
            call = partial(judged, value, *[lambda t, *_: t] * 3, companion_obj=into)
        with torch.set_grad_enabled(grad):
            refused(call, "odd", what=name)
            assert torch.is_grad_enabled() is grad, f"{name}: the grad mode is another"
        assert_same(into["fine"], torch.zeros(3), f"{name}: a part was written")
