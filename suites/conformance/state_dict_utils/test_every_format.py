"""Memory formats: channels_last images and transposed matrices, small and large, in every kind.

Small tensors may be copied together, large ones each in a way of its own: the format of a model is
not lost in either.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from conformance.kit.compare import assert_same, local
from conformance.kit.data import numbers
from conformance.kit.functions import COPIES, Function, each
from conformance.kit.layouts import R, S, part
from conformance.kit.levels import STRIDES


def _images(*shape: int) -> torch.Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return numbers(*shape).to(memory_format=formats[len(shape)])


# Name -> a whole tensor that does not go along its rows in memory.
WHOLES: dict[str, Callable[[], torch.Tensor]] = {
    "images": lambda: _images(4, 6, 2, 5),
    "large images": lambda: _images(64, 16, 32, 32),
    "volumes": lambda: _images(4, 6, 2, 3, 2),
    "transposed": lambda: numbers(6, 4).t(),
    "large and transposed": lambda: numbers(1024, 640).t(),
    "turned": lambda: numbers(6, 2, 4).permute(2, 0, 1),
}
PLACED = {"rows": S(0), "columns": S(1), "replica": R}


def _as_dtensor(full: torch.Tensor, line: Any, placement: Any, *, device: str = "") -> DTensor:
    """A DTensor whose local tensor has the format of the whole one, and that says so."""
    mine = part(full, line, [placement]).clone()
    if device:
        mine = torch.empty_like(mine, device=device)
    return DTensor.from_local(
        mine, line, [placement], run_check=False, shape=full.shape, stride=full.stride()
    )


def _assert_format(got: Any, like: Any, what: str) -> None:
    assert local(got).stride() == local(like).stride(), (
        f"{what}: strides {local(got).stride()}, expected {local(like).stride()}"
    )
    assert got.stride() == like.stride(), f"{what}: it says {got.stride()}, not {like.stride()}"


_COPIES = COPIES | {"_gather_state_dict": lambda judged, value: judged(value)}


@pytest.mark.law("structure")
@pytest.mark.should(STRIDES)
@pytest.mark.world(2)
@each(lambda function: function.name in _COPIES)
def test_copies_keep_it(function: Function, subject: Any, mesh: Any) -> None:
    """A copy must lie in memory as the original does, plain, as a Parameter or as a DTensor."""
    judged, line = subject.function(f"_state_dict_utils.{function.name}"), mesh(2)
    value: dict[str, Any] = {}
    for name, make in WHOLES.items():
        value |= {f"{name}, plain": make(), f"{name}, trained": nn.Parameter(make())}
        if not function.talks:
            for kind, placement in PLACED.items():
                leaf = _as_dtensor(make(), line, placement)
                value |= {f"{name}, {kind}": leaf, f"{name}, {kind}, trained": nn.Parameter(leaf)}
    got = _COPIES[function.name](judged, value)
    for name, leaf in value.items():
        _assert_format(got[name], leaf, name)
        if function.values:
            assert_same(local(got[name]).detach(), local(leaf).detach(), name)


def _into(
    function: Function, subject: Any, full: dict[str, Any], mine: dict[str, Any], first: bool
) -> Callable[[torch.device], Any]:
    """The call that loads `full` into `mine`; after it `mine` holds what landed."""
    judged = subject.function(f"_state_dict_utils.{function.name}")
    info = subject.function("_state_dict_utils._TensorInfo")
    if function.name == "_broadcast_tensors":
        told = full if first else {key: info(t.shape, t.dtype) for key, t in full.items()}
        return lambda device: judged(told, mine, list(full), device)
    if function.name == "_distribute_tensors":
        pairs: dict[str, Any] = {key: (mine[key], full[key]) for key in full}

        def call(device: torch.device) -> None:
            judged(pairs, list(pairs), device)
            mine.update(pairs)

        return call
    return lambda device: judged(full if first or not function.talks else {}, mine, device)


@pytest.mark.law("structure")
@pytest.mark.should(STRIDES)
@pytest.mark.world(2)
@pytest.mark.parametrize("meta", [False, True], ids=["real", "meta"])
@each(lambda function: function.name.startswith(("_broadcast", "_distribute")))
@pytest.mark.thorough(but=["real"])
def test_targets_keep_it(
    function: Function, subject: Any, mesh: Any, rank: int, device: torch.device, meta: bool
) -> None:
    """What lands in a DTensor must lie in memory as its local tensor did, or was to do on meta."""
    line = mesh(2)
    full: dict[str, torch.Tensor] = {}
    mine: dict[str, Any] = {}
    before: dict[str, Any] = {}
    for (name, make), (kind, placement) in product(WHOLES.items(), PLACED.items()):
        key = f"{name}, {kind}"
        full[key] = make().contiguous()
        before[key], mine[key] = (
            _as_dtensor(make().neg(), line, placement, device="meta" if meta else "")
            for _ in range(2)
        )
    _into(function, subject, full, mine, rank == 0)(device)
    for key, leaf in mine.items():
        assert_same(local(leaf), part(full[key], line, leaf.placements), key)
        _assert_format(leaf, before[key], key)
