"""Tensor subclasses in and out of DTensors, and described, with no operation but upstream's.

The operations of each type are measured: torch's own function is called with a type that can do
everything, and what it asked for is what the type under test can do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

# The package has to come first: torch's module imports it, and it imports that.
import torch.distributed.fsdp
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp._common_utils import _FSDPDeviceHandle
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import _data_parallel_utils as upstream_utils
from torch.distributed.tensor.parallel import fsdp as upstream

from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.layouts import S, dtensor, part, rows, sharded_tensor
from conformance.kit.subclasses import (
    Pair,
    assert_holds_pair,
    inside,
    like_upstream,
    subclass_with,
)

KINDS = pytest.mark.parametrize("flatten", [True, False], ids=["traceable", "closed"])
"""With `__tensor_flatten__`, and without."""

GEOMETRY = pytest.mark.parametrize("policy", [None, "sizes"], ids=["fixed", "asked"])
"""Whether sizes and strides are stored, or questions that the type answers."""


def spoil(tensor: Any) -> None:
    """Change all that a tensor of such a type holds, in place."""
    local: Any = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    for mine in local.parts:
        mine.zero_()


@pytest.mark.judges("tensor.parallel._data_parallel_utils._flatten_tensor")
class TestFlattenTensor:
    @KINDS
    @GEOMETRY
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
    @pytest.mark.thorough(
        but=[
            "trained-fixed-closed",
            "trained-asked-traceable",
            "frozen-fixed-traceable",
            "frozen-asked-closed",
        ]
    )
    def test_the_local_tensor_of_the_type(
        self, judged: Any, mesh: Any, trains: bool, flatten: bool, policy: Any
    ) -> None:
        """A type with upstream's operations alone comes out of its DTensor, over its memory."""
        line, full = mesh(2), numbers(4, 3)
        mine = part(full, line, [S(0)])

        def given(kind: type[Pair]) -> DTensor:
            tensor = inside(kind.of(mine.clone()), full, line, [S(0)])
            return tensor.requires_grad_(trains)  # type: ignore[return-value]

        kind, _ = like_upstream(
            lambda k: upstream_utils._flatten_tensor(given(k)), flatten, policy=policy
        )
        tensor: Any = given(kind)
        got, spec = judged(tensor)
        assert spec == tensor._spec
        assert got.requires_grad is trains, f"requires_grad {got.requires_grad}"
        assert_holds_pair(got, kind, mine)
        spoil(tensor)
        assert_same(got.first, torch.zeros_like(mine), "after the DTensor changed")

    @KINDS
    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_what_is_pending_inside_is_finished(
        self, judged: Any, mesh: Any, flatten: bool
    ) -> None:
        """A local tensor that holds pending ones is waited for with all that it holds."""
        full = numbers(4, 3)
        kind = subclass_with(["aten.detach.default"], flatten)
        local = kind(AsyncCollectiveTensor(full), AsyncCollectiveTensor(full.neg()))
        for trains in (True, False):
            tensor = inside(local, full, mesh(1), [S(0)]).requires_grad_(trains)
            assert_holds_pair(judged(tensor)[0], kind, full)


@pytest.mark.judges("tensor.parallel._data_parallel_utils._unflatten_tensor")
class TestUnflattenTensor:
    @KINDS
    @GEOMETRY
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
    @pytest.mark.thorough(but=["trained-asked-closed", "trained-fixed-traceable"])
    def test_the_dtensor_around_the_type(
        self, judged: Any, mesh: Any, trains: bool, flatten: bool, policy: Any
    ) -> None:
        """A type with upstream's operations alone goes into the DTensor, and gets its gradient."""
        line, full = mesh(2), numbers(4, 3)
        mine, spec = part(full, line, [S(0)]), dtensor(full, line, [S(0)])._spec

        def there_and_back(unflatten: Callable[..., Any], kind: type[Pair]) -> tuple[Any, Any]:
            local: Any = kind.of(mine.clone()).requires_grad_(trains)
            got = unflatten(local, spec)
            if trains:
                got.backward(inside(kind.of(mine.clone()), full, line, [S(0)]))
            return got, local

        kind, _ = like_upstream(
            lambda k: there_and_back(upstream_utils._unflatten_tensor, k), flatten, policy=policy
        )
        got, local = there_and_back(judged, kind)
        assert got._spec == spec
        assert got.requires_grad is trains, f"requires_grad {got.requires_grad}"
        assert_holds_pair(got._local_tensor, kind, mine)
        if trains:
            assert_holds_pair(local.grad, kind, mine, "gradient")


@pytest.mark.judges("tensor.parallel._data_parallel_utils.sync_grad_hook")
class TestSyncGradHook:
    @KINDS
    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_what_is_pending_inside_is_finished(
        self, judged: Any, mesh: Any, flatten: bool
    ) -> None:
        """A gradient that holds pending ones is the same object, all of it finished."""
        full = numbers(4, 3)
        kind = subclass_with([], flatten)
        grad = kind(AsyncCollectiveTensor(full), AsyncCollectiveTensor(full.neg()))
        outer = inside(grad, full, mesh(1), [S(0)])
        for name, given in ("wrapper", grad), ("DTensor", outer):
            assert judged(given) is given, f"{name}: another object"
            assert_holds_pair(grad, kind, full, name)

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_a_dtensor_is_finished(self, judged: Any, mesh: Any) -> None:
        """A DTensor whose local tensor is pending is the same object, waited for."""
        full = numbers(4, 3)
        grad = inside(AsyncCollectiveTensor(full), full, mesh(1), [S(0)])
        assert judged(grad) is grad
        assert type(grad._local_tensor) is torch.Tensor, f"a {type(grad._local_tensor).__name__}"

    @KINDS
    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_a_pending_tensor_of_the_type(self, judged: Any, flatten: bool) -> None:
        """A pending tensor of a type with upstream's operations alone comes back finished."""
        full = numbers(4, 3)
        kind, _ = like_upstream(
            lambda k: upstream_utils.sync_grad_hook(AsyncCollectiveTensor(k.of(full))), flatten
        )
        assert_holds_pair(judged(AsyncCollectiveTensor(kind.of(full))), kind, full)


def asks_nothing(judged: Any, road: Callable[[Any, torch.Tensor], Any], mine: torch.Tensor) -> None:
    """`road` says of a type without any operation what it says of a plain tensor."""
    expected = road(judged, mine)
    for flatten in (True, False):
        got = road(judged, subclass_with([], flatten).of(mine))
        assert str(got) == str(expected), f"{flatten=}: {got}, expected {expected}"


class TestMetadata:
    @pytest.mark.judges("tensor.parallel.fsdp._get_box")
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_box(self, judged: Any, mesh: Any) -> None:
        """The box of a shard needs no operation of its type."""
        line, full = mesh(2), numbers(4, 3)
        mine = part(full, line, [S(0)])
        asks_nothing(judged, lambda f, t: f(inside(t, full, line, [S(0)])), mine)

    @pytest.mark.judges("tensor.parallel.fsdp._get_box_for")
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_box_for(self, judged: Any, mesh: Any) -> None:
        """The box of another rank's shard needs no operation of its type."""
        line, full = mesh(2), numbers(4, 3)
        mine = part(full, line, [S(0)])
        asks_nothing(judged, lambda f, t: f(inside(t, full, line, [S(0)]), 1), mine)

    @pytest.mark.judges("tensor.parallel.fsdp._get_local_box")
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_local_box(self, judged: Any, mesh: Any) -> None:
        """The box of this rank's shard needs no operation of its type."""
        line, full = mesh(2), numbers(4, 3)
        mine = part(full, line, [S(0)])
        asks_nothing(judged, lambda f, t: f(inside(t, full, line, [S(0)])), mine)

    @pytest.mark.judges("tensor.parallel.fsdp._create_shard_md_from_dt")
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_shard_metadata(self, judged: Any, mesh: Any, rank: int) -> None:
        """The metadata of a shard need no operation of its type."""
        line, full = mesh(2), numbers(4, 3)
        mine = part(full, line, [S(0)])
        asks_nothing(judged, lambda f, t: f(inside(t, full, line, [S(0)]), rank), mine)

    @pytest.mark.judges("tensor.parallel.fsdp._create_sharded_tensor_md_from_dt")
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_tensor_metadata(self, judged: Any, mesh: Any) -> None:
        """The metadata of all shards need no operation of their type."""
        line, full = mesh(2), numbers(4, 3)
        mine, pg = part(full, line, [S(0)]), line.get_group()
        asks_nothing(judged, lambda f, t: f(inside(t, full, line, [S(0)]), pg), mine)

    @pytest.mark.judges("tensor.parallel.fsdp._pre_load_state_dict")
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_shards_to_load(self, judged: Any, rank: int) -> None:
        """Shards of a type without operations come as they are."""
        full = numbers(4, 3)
        tensor = sharded_tensor(full, rows(full.shape, [2, 2]))
        kind = subclass_with([], flatten=True)
        tensor.local_shards()[0].tensor = kind.of(full.chunk(2)[rank].clone())
        _, (shard,) = judged(tensor)
        assert_holds_pair(shard.tensor, kind, full.chunk(2)[rank])


@pytest.mark.judges("tensor.parallel.fsdp.DTensorExtensions")
class TestExtensions:
    @KINDS
    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    @pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
    @pytest.mark.thorough(but=["closed"])
    def test_flattened_and_back(self, judged: Any, mesh: Any, flatten: bool, trains: bool) -> None:
        """A parameter of a type with upstream's operations alone goes into FSDP and comes back."""
        handle: Any = _FSDPDeviceHandle.from_device(torch.device("cpu"))
        line, full = mesh(2), numbers(4, 3)
        mine = part(full, line, [S(0)])

        def there_and_back(extensions: Any, kind: type[Pair]) -> tuple[Any, Any]:
            weight = torch.nn.Parameter(
                inside(kind.of(mine.clone()), full, line, [S(0)]), requires_grad=trains
            )
            local, extension = extensions.pre_flatten_transform(weight)
            return local, extensions.post_unflatten_transform(local, extension)

        kind, _ = like_upstream(
            lambda k: there_and_back(upstream.DTensorExtensions(handle), k), flatten
        )
        local, back = there_and_back(judged(handle), kind)
        assert_holds_pair(local, kind, mine, "flattened")
        assert local.requires_grad is trains, f"flattened: requires_grad {local.requires_grad}"
        assert_holds_pair(back._local_tensor, kind, mine, "back")
        assert back.requires_grad is trains, f"back: requires_grad {back.requires_grad}"
