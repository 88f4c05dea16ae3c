"""Values that are no tensors, and 0-dim tensors: what lands is the target's own, on every rank.

The source's full dict is the caller's. Were one list in it and in the local dict, a change of the
one would be a change of the other, on the source alone, and the ranks would part in silence.
"""

from __future__ import annotations

import io
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from conformance.kit.cases import every_second
from conformance.kit.compare import assert_same, fingerprint, shares_memory
from conformance.kit.containers import Settings, Tags, dashed
from conformance.kit.data import numbers
from conformance.kit.landing import assert_landed, target
from conformance.kit.layouts import S
from conformance.kit.nested import Pair


class Schedule:
    """An object of a class of the caller's own, as trainers keep them in a state dict."""

    def __init__(self) -> None:
        self.steps = [1, 2, 3]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.steps == other.steps

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Schedule({self.steps})"


def _buffer() -> io.BytesIO:
    buffer = io.BytesIO(b"bytes of a pickle")
    buffer.seek(3)
    return buffer


# Name -> a value that its holder can change.
VALUES: dict[str, Callable[[], Any]] = {
    "list": lambda: [1, [2]],
    "dict": lambda: {"lr": [0.5], 1: {}},
    "OrderedDict": lambda: OrderedDict(a=[1]),
    "defaultdict": lambda: defaultdict(list, {"a": [1]}),
    "set": lambda: {1, 2},
    "bytearray": lambda: bytearray(b"bytes"),
    "BytesIO": _buffer,
    "an object": Schedule,
    "dict subclass": lambda: Settings(a=[1]),
    "list subclass": lambda: Tags([[1]]),
    "tuple around a list": lambda: ([1], 2),
    "namedtuple around a dict": lambda: Pair({"a": 1}, 2),
    "list around a tensor": lambda: [numbers(3), {"x": numbers(2)}],
}
CASES = [pytest.param(make, id=dashed(name)) for name, make in VALUES.items()]


def _parts(value: Any) -> list[Any]:
    """The value and all that it holds, of what can be changed."""
    found = [value]
    inner: Any = ()
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, (list, tuple)):
        inner = value
    elif isinstance(value, Schedule):
        inner = [value.steps]
    for item in inner:
        found += _parts(item)
    return [part for part in found if not isinstance(part, (int, float, str, tuple, type(None)))]


def _said(value: Any) -> str:
    """The value in words, contents of buffers and tensors included."""
    if isinstance(value, io.BytesIO):
        return f"BytesIO({value.getvalue()!r}) at {value.tell()}"
    if isinstance(value, dict):
        return f"{type(value).__name__} {[(k, _said(v)) for k, v in value.items()]}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} {[*map(_said, value)]}"
    return f"{type(value).__name__} {value!r}"


def _assert_own(got: Any, full: Any, expected: Any, what: str) -> None:
    assert _said(got) == _said(expected), f"{what}: {_said(got)}, expected {_said(expected)}"
    theirs = {id(part) for part in _parts(full)}
    lent = [part for part in _parts(got) if id(part) in theirs]
    assert not lent, f"{what}: {lent} is the full dict's own object"
    for mine in (p for p in _parts(got) if isinstance(p, torch.Tensor)):
        for other in (p for p in _parts(full) if isinstance(p, torch.Tensor)):
            assert not shares_memory(mine, other), f"{what}: a tensor in the full dict's memory"


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastOwnObjects:
    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("make", CASES)
    @pytest.mark.thorough(but=[f"w2-{case.id}" for case in CASES[::2]])
    def test_values_that_can_be_changed(
        self, judged: Any, rank: int, device: torch.device, make: Any
    ) -> None:
        """A value that lands must be the target's own on every rank, the source's included."""
        for given in ({}, {"strict": True}, {"cpu_offload": True}):
            full = {"value": make(), "w": numbers(4)}
            local: dict[str, Any] = {"value": None, "w": numbers(4, salt=1), "gone": 1}
            judged(full if rank == 0 else {}, local, device, **given)
            _assert_own(local["value"], full["value"], make(), f"rank {rank}, {given}")

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("first", ["w", "value"])
    def test_what_was_there_is_not_written(
        self, judged: Any, rank: int, device: torch.device, first: str
    ) -> None:
        """A value that lands must replace the old one, and not be written into it."""
        old = {"value": {"lr": [1]}, "w": numbers(3)}
        kept = {key: fingerprint(value) for key, value in old.items()}
        local = {first: old[first], **old}
        full = {"value": {"lr": [2], "x": 1}, "w": numbers(3, salt=1)}
        judged(full if rank == 0 else {}, local, device)
        assert local["value"] == {"lr": [2], "x": 1}, f"{local['value']} landed"
        assert fingerprint(old["value"]) == kept["value"], f"the old value is {old['value']} now"

    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("kind", ["plain", "meta", "sharded", "number", "strict"])
    @pytest.mark.thorough(but=["w1-number", "w2-plain", "w2-meta", "w2-sharded", "w2-strict"])
    def test_a_0dim_tensor(
        self, judged: Any, mesh: Any, world: Any, device: torch.device, kind: str
    ) -> None:
        """A 0-dim tensor that lands must lie in memory of its own, on the source as well."""
        full = {"step": numbers(salt=4), "w": numbers(4)}
        held: Any = numbers()
        if kind == "meta":
            held = held.to("meta")
        elif kind == "number":
            held = 0.0
        local = {"step": held, "w": numbers(4, salt=1)}
        if kind == "sharded":
            local["w"] = target(full["w"], mesh(world.size), [S(0)])
        judged(full if world.rank == 0 else {}, local, device, strict=kind == "strict")
        got = local["step"]
        assert not shares_memory(got, full["step"]), "the result lies in the full dict's memory"
        full["step"].fill_(9)
        assert_same(got.cpu(), numbers(salt=4).cpu(), "step")

    @pytest.mark.law("isolation")
    @pytest.mark.world(2)
    def test_one_value_under_two_keys(self, judged: Any, rank: int, device: torch.device) -> None:
        """A list under two keys must land equal under both, on every rank alike."""
        groups = [1]
        full = {"a": groups, "b": groups}
        local: dict[str, Any] = {"a": None, "b": None}
        judged(full if rank == 0 else {}, local, device)
        assert local == {"a": [1], "b": [1]}, f"{local} landed"
        assert local["a"] is not groups, "the full dict's own list landed"

    @pytest.mark.law("values")
    @pytest.mark.world(2)
    def test_only_the_first_rank_is_read(
        self, judged: Any, mesh: Any, rank: int, device: torch.device
    ) -> None:
        """A full dict of another rank, which may be of another step, must be left alone."""
        given: list[dict[str, Any]] = [
            {"step": 3, "lr": 0.5, "c": 1j, "on": True, "name": "a", "raw": b"a", "list": [1],
             "dtype": torch.float32, "none": None, "scalar": numbers(), "w": numbers(4)},
            {"step": 4, "lr": 0.25, "c": 2j, "on": False, "name": "b", "raw": b"b", "list": [2],
             "dtype": torch.int64, "none": 5, "scalar": numbers() + 9, "w": numbers(4) + 9},
        ]  # fmt: skip
        full = {**given[rank], "sharded": numbers(4, salt=rank)}
        local: dict[str, Any] = dict.fromkeys(given[0])
        local |= {"scalar": 0.0, "w": torch.zeros(4)}
        local["sharded"] = target(numbers(4), mesh(2), [S(0)])
        judged(full, local, device)
        for key, expected in given[0].items():
            if isinstance(expected, torch.Tensor):
                assert_same(torch.as_tensor(local[key]), expected, key)
            else:
                assert local[key] == expected, f"{key}: {local[key]!r}, expected {expected!r}"
        assert_landed(local["sharded"], numbers(4), mesh(2), [S(0)], "sharded")

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("at", ["the source", "the other", "both"])
    @pytest.mark.thorough(but=["the other"])
    def test_none_stays_none(self, judged: Any, rank: int, device: torch.device, at: str) -> None:
        """A local None must stay None where a tensor with dimensions is offered."""
        full = {"bias": numbers(3), "w": numbers(4)}
        bare = at == "both" or (rank == 0) == (at == "the source")
        local = {"bias": None if bare else numbers(3, salt=1), "w": numbers(4, salt=1)}
        judged(full if rank == 0 else {}, local, device)
        assert_same(local["w"], numbers(4), "w")
        if bare:
            assert local["bias"] is None, f"None became {local['bias']}"
        else:
            assert_same(local["bias"], numbers(3), "bias")


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistributeOwnObjects:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_none_stays_none(self, judged: Any, device: torch.device) -> None:
        """A local None must stay None where a tensor with dimensions is offered."""
        local = {"bias": None, "w": numbers(4, salt=1)}
        judged({"bias": numbers(3), "w": numbers(4)}, local, device)
        assert_same(local["w"], numbers(4), "w")
        assert local["bias"] is None, f"None became {local['bias']}"

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", CASES)
    @every_second(CASES)
    def test_values_that_can_be_changed(self, judged: Any, device: torch.device, make: Any) -> None:
        """A value that lands must be the target's own."""
        full = {"value": make(), "w": numbers(4)}
        local: dict[str, Any] = {"value": None, "w": numbers(4, salt=1)}
        judged(full, local, device)
        _assert_own(local["value"], full["value"], make(), "value")

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("kind", ["plain", "meta", "number"])
    def test_a_0dim_tensor(self, judged: Any, device: torch.device, kind: str) -> None:
        """A 0-dim tensor that lands must lie in memory of its own."""
        full = {"step": numbers(salt=4)}
        held: Any = {"plain": numbers(), "meta": numbers().to("meta"), "number": 0.0}[kind]
        local = {"step": held}
        judged(full, local, device)
        assert not shares_memory(local["step"], full["step"]), "in the full dict's memory"
        full["step"].fill_(9)
        assert_same(local["step"].cpu(), numbers(salt=4).cpu(), "step")


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherOwnObjects:
    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", CASES)
    @every_second(CASES, start=1)
    @pytest.mark.thorough(but=["defaultdict"])
    def test_values_that_can_be_changed(self, judged: Any, make: Any) -> None:
        """A value in the result must not be the state dict's own."""
        value = {"value": make(), "w": numbers(4)}
        got = judged(value, type_check=False)
        _assert_own(got["value"], value["value"], make(), "value")


@pytest.mark.judges("_state_dict_utils._offload_state_dict_to_cpu")
class TestOffloadOwnObjects:
    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", CASES)
    @every_second(CASES)
    def test_values_that_can_be_changed(self, judged: Any, make: Any) -> None:
        """A value in the snapshot must not be the state dict's own."""
        value = {"value": make(), "w": numbers(4)}
        got = judged(value, type_check=False)
        _assert_own(got["value"], value["value"], make(), "value")


@pytest.mark.judges("_state_dict_utils._copy_state_dict")
class TestCopyOwnObjects:
    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("make", CASES)
    @every_second(CASES, start=1)
    def test_values_that_can_be_changed(self, judged: Any, make: Any) -> None:
        """A value in the result must not be the source's own, but for tensors, the target's."""
        value, into = {"value": make()}, {"value": make()}
        got = judged(value, into, type_check=False)
        _assert_own(got["value"], value["value"], make(), "value")
