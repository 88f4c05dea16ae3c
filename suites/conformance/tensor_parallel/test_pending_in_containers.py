"""Tensors of a type that holds pending ones in containers of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._pytree import tree_leaves

from conformance.kit.compare import assert_same, assert_type
from conformance.kit.data import numbers
from conformance.kit.layouts import S
from conformance.kit.subclasses import inside, subclass_with

HOLDS: dict[str, Callable[..., Any]] = {
    "list": lambda one, two: [one, two],
    "tuple": lambda one, two: (one, two),
    "dict": lambda one, two: {"one": one, "two": two},
    "nested": lambda one, two: {"one": [one, {"two": (two, 1)}]},
}


@pytest.mark.judges("tensor.parallel._data_parallel_utils.sync_grad_hook")
class TestSyncGradHookContainers:
    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_what_is_pending_in_containers_is_finished(self, judged: Any) -> None:
        """Tensors that the gradient's type holds in lists, tuples and dicts are finished, too."""
        full = numbers(4, 3)
        kind = subclass_with([], flatten=False)
        for name, hold in HOLDS.items():
            grad: Any = kind(full, full.neg())
            grad.more = hold(AsyncCollectiveTensor(full), AsyncCollectiveTensor(full.neg()))
            assert judged(grad) is grad, f"{name}: another object"
            one, two = (v for v in tree_leaves(grad.more) if isinstance(v, torch.Tensor))
            assert_type(one, torch.Tensor, name)
            assert_type(two, torch.Tensor, name)
            assert_same(one, full, name)
            assert_same(two, full.neg(), name)


@pytest.mark.judges("tensor.parallel._data_parallel_utils._flatten_tensor")
class TestFlattenTensorContainers:
    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_what_is_pending_in_containers_is_waited_for(
        self, judged: Any, mesh: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What the local tensor's type holds in lists, tuples and dicts is waited for, too."""
        full = numbers(4, 3)
        kind = subclass_with(["aten.detach.default"], flatten=False)
        waited: set[int] = set()
        for name in ("wait", "trigger_wait"):
            wait = getattr(AsyncCollectiveTensor, name)

            def note(tensor: Any, wait: Callable[[Any], Any] = wait) -> Any:
                waited.add(id(tensor))
                return wait(tensor)

            monkeypatch.setattr(AsyncCollectiveTensor, name, note)
        for name, hold in HOLDS.items():
            pending = AsyncCollectiveTensor(full), AsyncCollectiveTensor(full.neg())
            local: Any = kind(full, full.neg())
            local.more = hold(*pending)
            waited.clear()
            judged(inside(local, full, mesh(1), [S(0)]))
            assert waited >= set(map(id, pending)), f"{name}: not waited for"
