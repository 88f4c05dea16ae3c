"""Optimizers that hold DTensors which local Parameters have replaced.

These would never see a gradient again: the module trains other Parameters from then on, and the
optimizer would do nothing, without a word. ``replicate`` localizes in the first forward only, so
with it that is the usual order.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardproof.tensor.parallel._data_parallel_utils import _flatten_tensor


def update_optimizers(replaced: list[tuple[DTensor, torch.Tensor]]) -> None:
    """Give the local Parameters to every optimizer that holds the DTensors they replace.

    Args:
        replaced: (DTensor, local Parameter). The list is emptied: what nobody else holds is gone
            then, and there is nothing to look for.

    Groups, their order and their settings stay; state is localized as the parameter is. Lists that
    a caller made of the module's parameters are not the optimizer's, and stay as they are.

    """
    references = [(weakref.ref(w), p) for w, p in replaced if isinstance(p, nn.Parameter)]
    replaced.clear()
    local = {id(w): p for reference, p in references if (w := reference()) is not None}
    if not local:
        return
    for optimizer in _optimizers():
        for group in optimizer.param_groups:
            params = group["params"]
            for at, held in enumerate(params):
                if id(held) in local:
                    params[at] = local[id(held)]
                    if held in optimizer.state:
                        optimizer.state[params[at]] = _localized(optimizer.state.pop(held), held)


def _localized(state: dict[str, Any], like: Any) -> dict[str, Any]:
    return {
        key: _flatten_tensor(value)[0].detach()
        if isinstance(value, DTensor) and value._spec.placements == like._spec.placements
        else value
        for key, value in state.items()
    }


def _optimizers() -> list[Optimizer]:
    # An isinstance of every object would ask proxies, some of which answer with an import.
    everything = gc.get_objects()
    kinds = {kind for kind in set(map(type, everything)) if issubclass(kind, Optimizer)}
    return [thing for thing in everything if type(thing) in kinds] if kinds else []
