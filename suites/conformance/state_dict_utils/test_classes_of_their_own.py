"""Leaves and containers whose class somebody else wrote: what they are and bear comes back."""

from __future__ import annotations

import io
import pickle
import threading
from collections import ChainMap, OrderedDict
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.functions import Function, each

_same = [lambda tensor, *_: tensor] * 3
_SNAPSHOTS = {
    "_offload_state_dict_to_cpu": lambda judged, value: judged(value),
    "_iterate_state_dict": lambda judged, value: judged(value, *_same, cpu_offload=True),
    "_gather_state_dict": lambda judged, value: judged(value),
}
_each_snapshot = each(lambda function: function.name in _SNAPSHOTS)


def _taken(function: Function, subject: Any, value: Any) -> Any:
    return _SNAPSHOTS[function.name](subject.function(f"_state_dict_utils.{function.name}"), value)


class Scale(nn.Parameter):
    """A Parameter of a class of its own."""


class Tagged(torch.Tensor):
    """A tensor of a class of its own, which changes no operation."""


class Slotted(torch.Tensor):
    """The same, with a slot."""

    __slots__ = ("unit",)


class Doubling(list[Any]):
    """A list that makes something else of what it is extended by."""

    def extend(self, items: Iterable[Any]) -> None:
        super().extend([*items] * 2)


class Reversed(tuple[Any, ...]):
    """A tuple whose constructor turns what it is given around."""

    __slots__ = ()

    def __new__(cls, items: Iterable[Any]) -> Reversed:
        return super().__new__(cls, [*items][::-1])


class Mirrored(OrderedDict[str, Any]):
    """A mapping whose items are attributes as well, as those of transformers are."""

    w: torch.Tensor

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class Called(dict[str, Any]):
    """A dict whose class asks for an argument."""

    def __new__(cls, _name: str, **_items: Any) -> Called:
        return super().__new__(cls)

    def __init__(self, name: str, **items: Any) -> None:
        super().__init__(**items)
        self.name = name


class Counted(list[Any]):
    """A list whose class asks for an argument."""

    def __new__(cls, _length: int) -> Counted:
        return super().__new__(cls)

    def __init__(self, length: int) -> None:
        super().__init__(numbers(2, salt=index) for index in range(length))


class Registry(dict[str, Any]):
    """A dict that has something beside its items that cannot be copied."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.locks = {"items": threading.Lock()}


class Locked(io.BytesIO):
    """Bytes with something that cannot be copied."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.lock = threading.Lock()


@pytest.mark.law("compatibility")
@pytest.mark.world(1)
@_each_snapshot
def test_the_class_and_the_attributes_of_a_tensor(function: Function, subject: Any) -> None:
    """A tensor of a class of its own must come back with its class and what was written on it."""
    leaves: dict[str, Any] = {"parameter": Scale(numbers(3)), "frozen": Scale(numbers(3), False)}
    leaves["tagged"] = numbers(3).as_subclass(Tagged)
    leaves["slotted"] = numbers(3).as_subclass(Slotted)
    for leaf in leaves.values():
        leaf.unit = "m"
    got = _taken(function, subject, {**leaves, "plain": numbers(2)})
    for name, leaf in leaves.items():
        made = got[name]
        assert type(made) is type(leaf), f"{name}: a {type(made).__name__}"
        assert made.unit == "m", f"{name}: the attribute is lost"
        assert made.requires_grad is leaf.requires_grad, f"{name}: {made.requires_grad=}"
        assert_same(made.detach().as_subclass(torch.Tensor), numbers(3), name)


@pytest.mark.law("compatibility")
@pytest.mark.world(1)
@_each_snapshot
@pytest.mark.parametrize("first", ["buffer", "view"])
def test_a_buffer_and_a_view_of_it(function: Function, subject: Any, first: str) -> None:
    """Of a tensor with attributes and a bare view of it each must stay what it is."""
    buffer: Any = nn.Buffer(numbers(3))
    value = {"buffer": buffer, "view": buffer.detach()}
    got = _taken(function, subject, {key: value[key] for key in (first, *value)})
    assert isinstance(got["buffer"], nn.Buffer), "the buffer is none any more"
    assert not isinstance(got["view"], nn.Buffer), "the view is a buffer"


@pytest.mark.judges("_state_dict_utils._iterate_state_dict")
class TestIterateTwins:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_each_of_two_tied_leaves_is_itself(self, judged: Any) -> None:
        """A walk with functions that change nothing must give each object its own place."""
        one = nn.Parameter(numbers(3))
        other = nn.Parameter(one.data)
        other.grad = numbers(3)
        got = judged({"one": one, "other": other, "again": one}, *_same)
        assert got["one"] is one, "one"
        assert got["again"] is one, "again"
        assert got["other"] is other, "the second object is gone, and its gradient"


@pytest.mark.law("compatibility")
@pytest.mark.world(1)
@_each_snapshot
def test_sequences_that_make_something_else(function: Function, subject: Any) -> None:
    """A list or tuple whose class changes what it is given must hold the same items."""
    value: dict[str, Any] = {
        "list": Doubling(),
        "tuple": Reversed((numbers(2, salt=2), numbers(2, salt=1))),
    }
    value["list"].append(numbers(2))
    got = _taken(function, subject, value)
    assert len(got["list"]) == 1, f"list: {got['list']}"
    assert_same(got["list"][0], numbers(2), "list")
    for index in 0, 1:
        assert_same(got["tuple"][index], numbers(2, salt=index + 1), f"tuple {index}")


@pytest.mark.law("compatibility")
@pytest.mark.world(1)
@_each_snapshot
def test_bytes_that_cannot_be_copied(function: Function, subject: Any) -> None:
    """A closed file in memory, or one with a lock, must come back as it is."""
    closed = io.BytesIO(b"x")
    closed.close()
    got = _taken(function, subject, {"closed": closed, "locked": Locked(b"y"), "w": numbers(2)})
    assert got["closed"].closed
    assert got["locked"].getvalue() == b"y"


@pytest.mark.law("isolation")
@pytest.mark.world(1)
@_each_snapshot
def test_versions_of_modules_are_apart(function: Function, subject: Any) -> None:
    """The `_metadata` of a result must be its own, versions included."""
    value: Any = nn.Linear(2, 2).state_dict()
    before = value._metadata[""]["version"]
    _taken(function, subject, value)._metadata[""]["version"] = 7
    assert value._metadata[""]["version"] == before


def _not_to_be_made() -> dict[str, Any]:
    return {"o": Called("x", w=numbers(2)), "l": Counted(2), "r": Registry(w=numbers(2))}


def _assert_plain(got: Any) -> None:
    assert [type(got[key]) for key in "olr"] == [dict, list, dict], got
    assert [len(got[key]) for key in "olr"] == [1, 2, 1], got
    pickle.dumps(got)


@pytest.mark.law("compatibility")
@pytest.mark.world(1)
@_each_snapshot
def test_containers_that_cannot_be_made_again(function: Function, subject: Any) -> None:
    """One whose class asks for more than its items must come back plain, and can be saved."""
    got = _taken(function, subject, _not_to_be_made())
    _assert_plain(got)
    assert_same(got["o"]["w"], numbers(2))
    assert_same(got["l"][1], numbers(2, salt=1))


@pytest.mark.judges("_state_dict_utils._unflatten_state_dict")
class TestUnflattenPlain:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_containers_that_cannot_be_made_again(self, judged: Any, subject: Any) -> None:
        """One whose class asks for more than its items must come back plain, and can be saved."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        _assert_plain(judged(*flatten(_not_to_be_made())))


@pytest.mark.judges("_state_dict_utils._create_cpu_state_dict")
class TestBuffers:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_a_chain_of_mappings(self, judged: Any) -> None:
        """A ChainMap must come back as one, with its items."""
        got = judged({"o": ChainMap({"a": 1}, {"b": 2})})["o"]
        assert type(got) is ChainMap, f"a {type(got).__name__}"
        assert dict(got) == {"a": 1, "b": 2}

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_containers_that_cannot_be_made_again(self, judged: Any) -> None:
        """One whose class asks for more than its items must come back plain, and can be saved."""
        _assert_plain(judged(_not_to_be_made()))


@pytest.mark.judges("_state_dict_utils._copy_state_dict")
class TestSizesAndTuples:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_each_takes_the_other(self, judged: Any) -> None:
        """A torch.Size and a tuple of the same numbers must be companions of each other."""
        kinds = (torch.Size([2, 3]), (2, 3))
        for mine, theirs in (kinds, kinds[::-1]):
            assert judged({"s": mine}, {"s": theirs}) == {"s": (2, 3)}, f"{mine} into {theirs}"


@pytest.mark.judges("_state_dict_utils._check_state_dict_similarity")
class TestSizesAreTuples:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_each_is_like_the_other(self, judged: Any) -> None:
        """A torch.Size and a tuple of the same length must be found alike, others not."""
        for mine, theirs in ((torch.Size([2, 3]), (2, 3)), ((2, 3), torch.Size([2, 3]))):
            assert judged({"s": mine}, {"s": theirs}), f"{mine} and {theirs}"
            assert not judged({"s": mine}, {"s": theirs[:1]}), f"{mine} and {theirs[:1]}"


@pytest.mark.judges("_state_dict_utils._unflatten_state_dict")
class TestMirroredItems:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_attributes_follow_the_items(self, judged: Any, subject: Any) -> None:
        """A mapping whose items are attributes too must have the new items as attributes."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        inner = Mirrored()
        inner["w"] = numbers(2)
        flat, mapping = flatten({"o": inner})
        got = judged({key: value * 2 for key, value in flat.items()}, mapping)["o"]
        assert type(got) is Mirrored, f"a {type(got).__name__}"
        assert got.w is got["w"], "the attribute is another tensor than the item"
        assert_same(got["w"], numbers(2) * 2, "w")
