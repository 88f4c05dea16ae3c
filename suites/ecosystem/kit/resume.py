"""Oracles of a training that is saved, loaded and continued."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from conformance.kit.compare import assert_same
from ecosystem.parts import inner_tensors

Step = Callable[[int], torch.Tensor]
"""Trains on the batch of that number; the loss before the step."""


def whole(value: Any) -> Any:
    """A value with every DTensor gathered by torch's own redistribution, tensors copied."""
    if isinstance(value, Mapping):
        return {key: whole(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [whole(inner) for inner in value]
    if isinstance(value, DTensor):
        gathered: torch.Tensor = value.full_tensor()
        return gathered.detach().clone()
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter of the model, whole, under its name. Every rank must call."""
    return {name: whole(param) for name, param in model.named_parameters()}


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by the parameters' names, whole. Every rank must call."""
    return {
        name: {key: whole(value) for key, value in optimizer.state[param].items()}
        for name, param in model.named_parameters()
        if param in optimizer.state
    }


def assert_equal(got: Any, expected: Any, what: str) -> None:
    """Nested values are the same to the bit; a wrapper subclass has the same class and parts."""
    if isinstance(expected, Mapping):
        assert isinstance(got, Mapping), f"{what}: a {type(got).__name__}"
        missing, extra = expected.keys() - got.keys(), got.keys() - expected.keys()
        assert not missing, f"{what}: lacks {sorted(map(str, missing))}"
        assert not extra, f"{what}: has {sorted(map(str, extra))} besides"
        for key, value in expected.items():
            assert_equal(got[key], value, f"{what}: {key}")
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected), f"{what}: {len(got)} entries, expected {len(expected)}"
        for number, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert_equal(one, other, f"{what}: {number}")
    elif isinstance(expected, torch.Tensor):
        parts = inner_tensors(expected)
        if parts is None:
            wrapped = inner_tensors(got) if isinstance(got, torch.Tensor) else None
            assert wrapped is None, f"{what}: a {type(got).__name__}, expected a plain tensor"
            assert_same(got, expected, what)
            return
        assert type(got) is type(expected), (
            f"{what}: a {type(got).__name__}, expected {type(expected).__name__}"
        )
        assert_equal(inner_tensors(got), parts, what)
    else:
        assert got == expected, f"{what}: {got!r}, expected {expected!r}"


def assert_close(got: list[torch.Tensor], expected: list[torch.Tensor], what: str) -> None:
    """Losses of one training on two meshes: sums in another order, in float32."""
    torch.testing.assert_close(
        torch.stack(got), torch.stack(expected), rtol=1e-4, atol=1e-6, msg=lambda m: f"{what}: {m}"
    )
