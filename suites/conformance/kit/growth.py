"""How far a call may raise the memory of a rank, for a model of many tensors, or of one.

The bound, for each rank of its own and for each device that tensors lie on:

    growth <= result + model / 2

`result` is what the caller is handed in memory that was not there before, on that device: nothing
where values land in memory that exists, where the result is on another device, or where this rank
is given none. `model` is all that the call is about, 96 MiB here: its half leaves room for two
buckets and what a backend takes to receive one, and for no second copy of anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from conformance.kit.layouts import dtensor
from conformance.kit.memory import MIB, peak_growth

WHOLE = 96 * MIB
SHARE = WHOLE // 4
"""What one of four ranks holds of a sharded model."""
BESIDES = WHOLE // 2

NAMES = [f"layer{n}.weight" for n in range(24)]

Model = dict[str, Any]
Call = Callable[[], Any]


def assert_grows(
    to: int, make: Callable[[Model], Call], device: torch.device, *, single: bool = False
) -> None:
    """The call that `make(model)` gives raises this rank's memory by `to` bytes and little more.

    A small model goes first, or the pages of code that a first call touches would count. `make`
    takes out of the model what is not to stay. `single`: the model is one tensor, under "weight".
    """
    grown = 0
    for length in (64, MIB // 4):
        model: Model = {
            name: torch.full((length, 4), float(n), device=device) for n, name in enumerate(NAMES)
        }
        if single:
            model = {"weight": torch.cat(list(model.values()))}
        call = make(model)
        grown = peak_growth(call, device)
        model.clear()
    said = f"{grown / MIB:.0f} MiB at the highest for a result of {to // MIB}"
    print(said)
    assert grown <= to + BESIDES, f"{said}; expected at most {BESIDES // MIB} more"


def result_on(device: torch.device, result: int, cpu_offload: bool) -> int:
    """The bytes of a result on the device that is measured."""
    return 0 if cpu_offload and device.type != "cpu" else result


def sharded(model: Model, mesh: Any, *placements: Any) -> Model:
    """The model as DTensors, and no longer whole."""
    return {name: dtensor(model.pop(name), mesh, placements) for name in list(model)}


def targets(model: Model, mesh: Any, placement: Any) -> Model:
    """DTensors for the model to land in, with other values."""
    return {name: dtensor(tensor + 1, mesh, [placement]) for name, tensor in model.items()}
