"""What results are good for: they are saved and loaded, written to, and their memory given back."""

from __future__ import annotations

import gc
import io
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.functions import Function, each
from conformance.kit.layouts import R, S, dtensor

_COPIES = {
    "_offload_state_dict_to_cpu": lambda judged, value: judged(value),
    "_create_cpu_state_dict": lambda judged, value: judged(value),
    "_iterate_state_dict": lambda judged, value: judged(
        value, *[lambda tensor, *_: tensor] * 3, cpu_offload=True
    ),
    "_gather_state_dict": lambda judged, value: judged(value),
}
_each_copy = each(lambda function: function.name in _COPIES)
_loads = each(lambda function: function.name in ("_broadcast_state_dict", "_distribute_state_dict"))


def _copied(function: Function, subject: Any, value: Any) -> Any:
    return _COPIES[function.name](subject.function(f"_state_dict_utils.{function.name}"), value)


class Output(OrderedDict[str, Any]):
    """A mapping that is filled by its items alone, as those of transformers."""

    def update(self, *_: Any, **__: Any) -> None:
        raise TypeError("set the items one by one")


@pytest.mark.law("structure")
@pytest.mark.world(1)
@_each_copy
def test_leaves_that_overlap_can_be_saved(function: Function, subject: Any) -> None:
    """A result whose leaves overlap must be saved and loaded like any other."""
    memory = numbers(4, 3)
    value = {"whole": memory, "row": memory[1], "turned": memory.t(), "other": numbers(2)}
    got, file = _copied(function, subject, value), io.BytesIO()
    torch.save(got, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for key, leaf in loaded.items():
        assert leaf.shape == value[key].shape, f"{key}: {leaf.shape}"
        if function.name != "_create_cpu_state_dict":
            assert_same(leaf, value[key], key)
    for key, leaf in got.items():
        assert not vars(leaf), f"{key}: has attributes {[*vars(leaf)]}"


@pytest.mark.law("isolation")
@pytest.mark.world(1)
@_each_copy
def test_a_copy_of_a_copy_holds_the_first_no_longer(function: Function, subject: Any) -> None:
    """Of leaves that overlap a copy of a copy must not keep the first copy alive."""
    memory = numbers(4, 3)
    first = _copied(function, subject, {"whole": memory, "row": memory[1]})
    second = _copied(function, subject, first)
    gone = [weakref.ref(leaf.untyped_storage()) for leaf in first.values()]
    del first
    gc.collect()
    assert not [g for g in gone if g() is not None], "the first copy's memory is held"
    assert {*second} == {"whole", "row"}


@pytest.mark.law("compatibility")
@pytest.mark.world(1)
@_each_copy
def test_memory_that_was_freed(function: Function, subject: Any) -> None:
    """A tensor whose storage was freed must come back with its shape, and the others whole."""
    for dtype, size in [(torch.float32, 4), (torch.complex64, 3), (torch.float32, 1 << 20)]:
        freed = numbers(size, dtype=dtype)
        value = {"freed": freed, "rest": freed[1:], "fine": numbers(3)}
        freed.untyped_storage().resize_(0)
        got = _copied(function, subject, value)
        assert not freed.untyped_storage().nbytes(), "the caller's memory was allocated again"
        for key in ("freed", "rest"):
            assert got[key].shape == value[key].shape, f"{dtype} {key}: {got[key].shape}"
            assert got[key].dtype == dtype, f"{key}: {got[key].dtype}"
            held = got[key].untyped_storage().nbytes() > 0
            # A buffer takes the values once they are there again.
            assert held is (function.name == "_create_cpu_state_dict"), f"{dtype} {key}: {held=}"
        if function.name != "_create_cpu_state_dict":
            assert_same(got["fine"], numbers(3), "the other")
        for key in ("freed", "rest"):
            alone = _copied(function, subject, {key: value[key], "fine": numbers(3)})[key]
            assert alone.shape == value[key].shape, f"{dtype} {key} alone: {alone.shape}"


@pytest.mark.law("structure")
@pytest.mark.world(1)
@each(
    lambda function: (
        function.name in ("_offload_state_dict_to_cpu", "_gather_state_dict", "_iterate_state_dict")
    )
)
def test_a_frozen_parameter_and_its_twin(function: Function, subject: Any, mesh: Any) -> None:
    """A frozen DTensor Parameter and its detached twin must each stay what they are."""
    frozen = nn.Parameter(dtensor(numbers(4), mesh(1), [S(0)]), requires_grad=False)
    held: dict[str, Any] = {"parameter": frozen, "twin": frozen.detach()}
    if function.name == "_gather_state_dict":  # what it gathers is no Parameter
        held = {key: value._local_tensor for key, value in held.items()}
        held["parameter"] = nn.Parameter(held["parameter"], requires_grad=False)
    for keys in ("parameter", "twin"), ("twin", "parameter"):
        got = _copied(function, subject, {key: held[key] for key in keys})
        for key in keys:
            assert isinstance(got[key], nn.Parameter) is (key == "parameter"), f"{key} of {keys}"


@pytest.mark.law("compatibility")
@pytest.mark.world(1)
@_loads
def test_a_mapping_that_refuses_update(
    function: Function, subject: Any, device: torch.device
) -> None:
    """A state dict whose class refuses `update` must be loaded, item by item."""
    judged = subject.function(f"_state_dict_utils.{function.name}")
    local = Output()
    local["w"], local["step"] = numbers(4, salt=1), 3
    judged({"w": numbers(4), "step": 4}, local, device)
    assert_same(local["w"], numbers(4), "w")
    assert local["step"] == 4


@pytest.mark.law("isolation")
@pytest.mark.world(1)
@each(lambda function: function.name in _COPIES and function.name != "_create_cpu_state_dict")
def test_what_was_copied_under_inference_mode_trains(
    function: Function, subject: Any, mesh: Any
) -> None:
    """A copy that is taken during an evaluation must be written and trained afterwards."""
    memory = numbers(4, 3)
    value = {"whole": memory, "row": memory[1], "sharded": dtensor(numbers(4), mesh(1), [S(0)])}
    value["parameter"] = nn.Parameter(numbers(2))
    with torch.inference_mode():
        got = _copied(function, subject, value)
    for key, leaf in got.items():
        held = leaf.to_local() if isinstance(leaf, DTensor) else leaf
        assert not held.is_inference(), f"{key}: made in inference mode"
        leaf.detach().add_(1)
        (leaf.detach().requires_grad_() * 2).sum().backward()


@pytest.mark.law("isolation")
@pytest.mark.world(1)
@_loads
def test_what_was_loaded_under_inference_mode_trains(
    function: Function, subject: Any, mesh: Any, device: torch.device
) -> None:
    """What a load under inference mode puts in must train; what was made there must be loaded."""
    judged = subject.function(f"_state_dict_utils.{function.name}")
    full = {"plain": numbers(4), "sharded": numbers(4)}
    plain, sharded = numbers(4, salt=1), dtensor(numbers(4, salt=1), mesh(1), [S(0)])
    local = {"plain": plain, "sharded": sharded}
    with torch.inference_mode():
        judged(full, local, device)
        made: dict[str, Any] = {"plain": plain + 1, "sharded": sharded + 1}
        again = {key: value.clone() for key, value in full.items()}
        judged(again, local_state_dict=made, device=device)
    for key, leaf in local.items():
        held = leaf.to_local() if isinstance(leaf, DTensor) else leaf
        if held.is_inference() and key == "sharded" and function.name == "_distribute_state_dict":
            continue  # torch's own new DTensor is
        assert not held.is_inference(), f"{key}: made in inference mode"
        leaf.add_(1)
        (leaf.detach().requires_grad_() * 2).sum().backward()
        assert_same(held, numbers(4) + 1, key)
        held = made[key].to_local() if isinstance(made[key], DTensor) else made[key]
        assert_same(held, numbers(4), f"{key}, made in inference mode")


@pytest.mark.judges("_state_dict_utils._copy_state_dict")
class TestBuffersAreFilled:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_an_expanded_view_of_another_leaf(self, judged: Any, subject: Any, mesh: Any) -> None:
        """Buffers for a tensor, and for an expanded view of it, must take the values of both."""
        create = subject.function("_state_dict_utils._create_cpu_state_dict")
        plain = numbers(2)
        sharded: Any = dtensor(numbers(2), mesh(1), [R])
        value = {"a": plain, "b": plain.expand(3, 2), "c": sharded, "d": sharded.expand(3, 2)}
        buffers = create(value)
        for salt in 0, 1:
            plain.copy_(numbers(2, salt=salt))
            sharded.to_local().copy_(numbers(2, salt=salt))
            got = judged(value, buffers)
            for key, leaf in got.items():
                held = leaf.to_local() if isinstance(leaf, DTensor) else leaf
                assert_same(held, numbers(2, salt=salt).expand(held.shape), f"{key}, call {salt}")


@pytest.mark.judges("_state_dict_utils._unflatten_state_dict")
class TestUnflattenMappings:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_a_mapping_that_refuses_update(self, judged: Any, subject: Any) -> None:
        """A mapping whose class refuses `update` must come back with its class and items."""
        flatten = subject.function("_state_dict_utils._flatten_state_dict")
        inner = Output()
        inner["w"], inner["v"] = numbers(4), 3
        got = judged(*flatten({"out": inner}))["out"]
        assert type(got) is Output, f"a {type(got).__name__}"
        assert [*got] == ["w", "v"]
        assert_same(got["w"], numbers(4), "w")


@pytest.mark.judges("tensor.parallel.ddp._localize_dtensor")
class TestIgnoredParametersAreUsed:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_they_are_converted(self, judged: Any, mesh: Any) -> None:
        """A module with ignored parameters must be converted to another dtype, and keep them."""
        module = nn.Module()
        module.a = nn.Parameter(dtensor(numbers(4), mesh(1), [S(0)]))
        module.b = nn.Parameter(dtensor(numbers(4, salt=1), mesh(1), [S(0)]))
        judged(module, ignored_params={module.a})
        module.double()
        judged(module)
        held: Any = module.a
        assert isinstance(held, DTensor), f"a {type(held).__name__}"
        assert_same(held.to_local().detach(), numbers(4).double(), "a")
        assert not isinstance(module.b, DTensor), "the other is not local"
