"""What leaves say of themselves, and the local data contradict: refused, on every rank alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from conformance.kit.agree import assert_raises_everywhere
from conformance.kit.claims import FULL, OF_DTENSORS, OF_SHARDS, PLACEMENTS, sound, sound_shards
from conformance.kit.compare import assert_same, fingerprint, local
from conformance.kit.data import numbers
from conformance.kit.functions import Function, each
from conformance.kit.layouts import S, dtensor, part
from conformance.kit.refusals import MISSING, refused

EACH_RANK = (0, 1, None)
"""Who tells the lie: the first, the last, all."""
KEY = "layer.odd"


def _dtensors(
    mesh: Any, world: Any, at: int | None, value: float = 1.0
) -> list[tuple[str, bool, Any]]:
    """(name, whether this rank tells a lie, the leaf) for each lie about each placement."""
    found = []
    for where, placements in PLACEMENTS.items():
        for name, lie in OF_DTENSORS.items():
            leaf = sound(mesh, placements, value)
            lies = at in (None, world.rank)
            if lies:
                lie(leaf)
            found.append((f"{where}: {name}, {at}", lies, leaf))
    return found


def _each_rank(mesh: Any, world: Any) -> list[tuple[str, bool, Any]]:
    return [case for at in EACH_RANK for case in _dtensors(mesh, world, at)]


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherClaims:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=40)
    def test_of_dtensors(self, judged: Any, mesh: Any, world: Any) -> None:
        """A DTensor around something else than it says must be refused by name everywhere."""
        for name, _, leaf in _each_rank(mesh(2), world):
            value = {"fine": sound(mesh(2), PLACEMENTS["rows"]), KEY: leaf}
            assert_raises_everywhere(
                world,
                partial(judged, value),
                KEY,
                kinds=MISSING,
                name=name,
            )

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=40)
    def test_of_shards(self, judged: Any, world: Any) -> None:
        """A ShardedTensor that says something else than its shards must be refused everywhere."""
        _assert_shards_refused(world, lambda tensor: judged({KEY: tensor}), KEY)


@pytest.mark.judges("_state_dict_utils._all_gather_sharded_tensor")
class TestAllGatherClaims:
    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=40)
    def test_of_shards(self, judged: Any, world: Any) -> None:
        """A ShardedTensor that says something else than its shards must be refused everywhere."""
        _assert_shards_refused(world, judged)


def _assert_shards_refused(world: Any, call: Callable[[Any], Any], *mentions: str) -> None:
    for at in EACH_RANK:
        for name, lie in OF_SHARDS.items():
            tensor = sound_shards()
            if at in (None, world.rank):
                lie(tensor)
            assert_raises_everywhere(
                world, partial(call, tensor), *mentions, kinds=MISSING, name=f"{name}, {at}"
            )


class _IntoTargets:
    """Targets that are not what they say; its class says whose."""

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=40)
    def test_of_targets(
        self, judged: Any, mesh: Any, world: Any, subject: Any, device: torch.device
    ) -> None:
        """Such a target must be refused by name, where ranks talk on all, and nothing written."""
        for name, lies, leaf in _each_rank(mesh(2), world):
            if "the width" in name:  # values of the same kind: see below
                continue
            fine = sound(mesh(2), PLACEMENTS["rows"])
            into: dict[str, Any] = {"fine": fine, KEY: leaf}
            call = self.call(judged, subject, world, into, device)
            before = fingerprint(into)
            if self.talks:
                assert_raises_everywhere(world, call, KEY, name=name)
            elif lies:
                refused(call, KEY, what=name)
            if self.talks or lies:
                assert fingerprint(into) == before, f"{name}: something was written"

    @pytest.mark.law("compatibility")
    @pytest.mark.world(2, collective=8, limit=40)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("rows", [8, 1 << 18], ids=["small", "large"])
    @pytest.mark.thorough(but=["small-torch.float64", "large-torch.bfloat16"])
    def test_a_local_part_of_another_width(
        self,
        judged: Any,
        mesh: Any,
        world: Any,
        subject: Any,
        device: torch.device,
        rows: int,
        dtype: torch.dtype,
    ) -> None:
        """A local part of another floating dtype than its target says must get the values."""
        full = numbers(rows, 8)
        for name, placements in PLACEMENTS.items():
            leaf = dtensor(torch.zeros(rows, 8), mesh(2), placements)
            leaf._local_tensor = leaf._local_tensor.to(dtype)
            into: dict[str, Any] = {"fine": sound(mesh(2), PLACEMENTS["rows"]), KEY: leaf}
            self.call(judged, subject, world, into, device, {**_source(), KEY: full})()
            got = local(self.landed(into)[KEY])
            assert_same(got.float(), part(full, mesh(2), placements), f"{name}: the local part")

    talks = True

    def call(
        self,
        judged: Any,
        subject: Any,
        world: Any,
        into: dict[str, Any],
        device: torch.device,
        source: dict[str, Any] | None = None,
    ) -> Callable[[], Any]:
        """The call on this rank, of the first rank's state dict."""
        raise NotImplementedError

    def landed(self, into: dict[str, Any]) -> dict[str, Any]:
        """Where the results are after the call."""
        return into


def _source() -> dict[str, Any]:
    return {KEY: numbers(*FULL), "fine": numbers(*FULL, salt=1)}


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastClaims(_IntoTargets):
    def call(
        self,
        judged: Any,
        subject: Any,
        world: Any,
        into: dict[str, Any],
        device: torch.device,
        source: dict[str, Any] | None = None,
    ) -> Callable[[], Any]:
        given = (source or _source()) if world.rank == 0 else {}
        return lambda: judged(given, into, device)


@pytest.mark.judges("_state_dict_utils._broadcast_tensors")
class TestBroadcastTensorsClaims(_IntoTargets):
    def call(
        self,
        judged: Any,
        subject: Any,
        world: Any,
        into: dict[str, Any],
        device: torch.device,
        source: dict[str, Any] | None = None,
    ) -> Callable[[], Any]:
        info = subject.function("_state_dict_utils._TensorInfo")
        given = source or _source()
        if world.rank:
            given = {key: info(full.shape, full.dtype) for key, full in given.items()}
        return lambda: judged(given, into, list(into), device)

    @pytest.mark.law("symmetry")
    @pytest.mark.world(2, collective=8, limit=30)
    @pytest.mark.parametrize("what", ["size", "dtype"])
    def test_of_the_source(
        self, judged: Any, mesh: Any, world: Any, subject: Any, device: torch.device, what: str
    ) -> None:
        """Another size or dtype than the source's, told on one rank, must be refused on all."""
        info = subject.function("_state_dict_utils._TensorInfo")
        full = numbers(*FULL)
        into = {KEY: sound(mesh(2), PLACEMENTS["rows"])}
        told, words = info(torch.Size((6, 8)), full.dtype), "6, 8"
        if what == "dtype":
            told, words = info(full.shape, torch.int32), str(full.dtype)
        source = {KEY: full if world.rank == 0 else told}
        assert_raises_everywhere(world, lambda: judged(source, into, [KEY], device), KEY, words)


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistributeClaims(_IntoTargets):
    talks = False

    def call(
        self,
        judged: Any,
        subject: Any,
        world: Any,
        into: dict[str, Any],
        device: torch.device,
        source: dict[str, Any] | None = None,
    ) -> Callable[[], Any]:
        return lambda: judged(source or _source(), into, device)


@pytest.mark.judges("_state_dict_utils._distribute_tensors")
class TestDistributeTensorsClaims(_IntoTargets):
    talks = False

    def call(
        self,
        judged: Any,
        subject: Any,
        world: Any,
        into: dict[str, Any],
        device: torch.device,
        source: dict[str, Any] | None = None,
    ) -> Callable[[], Any]:
        full = source or _source()
        self.pairs: dict[str, Any] = {key: (into[key], full[key]) for key in into}
        return lambda: judged(self.pairs, list(self.pairs), device)

    def landed(self, into: dict[str, Any]) -> dict[str, Any]:
        return self.pairs


@pytest.mark.judges("_state_dict_utils._copy_state_dict")
class TestCopyClaims:
    @pytest.mark.law("values")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("side", ["source", "target"])
    def test_of_dtensors(self, judged: Any, mesh: Any, world: Any, side: str) -> None:
        """A DTensor around something else than the other says must be refused by path."""
        for name, _, leaf in _dtensors(mesh(2), world, None):
            placements = PLACEMENTS[name.partition(":")[0]]
            other = sound(mesh(2), placements, 2.0)
            one, two = (leaf, other) if side == "source" else (other, leaf)
            source, into = {"fine": numbers(3), KEY: one}, {"fine": numbers(3, salt=1), KEY: two}
            before = fingerprint(into)
            refused(partial(judged, source, into), KEY, what=name)
            assert fingerprint(into) == before, f"{name}: something was written"


_PAIRS: dict[str, Callable[..., Any]] = {
    "_copy_state_dict": lambda judged, given, into: judged(given, into),
    "_check_state_dict_similarity": lambda judged, given, into: judged(given, into),
    "_iterate_state_dict": lambda judged, given, into: judged(
        given, *[lambda tensor, *_: tensor] * 3, companion_obj=into
    ),
}


@pytest.mark.law("symmetry")
@pytest.mark.world(2)
@each(lambda function: function.name in _PAIRS)
def test_global_shapes_that_differ(function: Function, subject: Any, mesh: Any, world: Any) -> None:
    """DTensors of other shapes must not pass on ranks where the parts are of one shape."""
    judged = subject.function(f"_state_dict_utils.{function.name}")
    for sizes in ((5, 6), (6, 5), (1, 2), (2, 1), (3, 4)):
        given, into = ({KEY: dtensor(numbers(size, 2), mesh(2), [S(0)])} for size in sizes)
        before = fingerprint(into)
        if function.name == "_check_state_dict_similarity":
            assert judged(given, into) is False, f"{sizes}: similar on rank {world.rank}"
        else:
            refused(partial(_PAIRS[function.name], judged, given, into), KEY, what=str(sizes))
        assert fingerprint(into) == before, f"{sizes}: something was written"
