"""The model as it is given: one module, or the stages of a pipeline that a rank has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from shardproof._prove.modules import Modules
from shardproof._prove.roads import owners_of


def models_in(model: Any) -> list[nn.Module]:
    """The modules of what prove is given as a model."""
    if isinstance(model, nn.Module):
        return [model]
    if isinstance(model, (list, tuple)) and model:
        for number, one in enumerate(model):
            if not isinstance(one, nn.Module):
                raise TypeError(
                    f"prove takes a list of torch.nn.Module as model: item {number} is "
                    f"{type(one).__name__}"
                )
        return list(model)
    raise TypeError(
        "prove takes a torch.nn.Module as model, or a list of them: got "
        + (type(model).__name__ if not isinstance(model, list) else "an empty list")
    )


def check_models(models: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise ValueError where prove, or torch, could not take them."""
    places: dict[str, int] = {}
    for number, model in enumerate(models):
        modules = Modules([model])
        tensors = {name: tensor for name, _, _, tensor in modules.parameters()}
        tensors.update((name, tensor) for name, _, tensor, _ in modules.buffers())
        for name, tensor in tensors.items():
            if places.setdefault(name, number) != number:
                raise ValueError(
                    f"models {places[name]} and {number} both have {name!r}: the stages of a "
                    "pipeline have names of their own, and others need a module around them"
                )
            if nn.parameter.is_lazy(tensor):
                raise ValueError(f"{name} is not initialized: run its lazy module before prove")
            if tensor.is_meta:
                raise ValueError(
                    f"{name} is on the meta device: give it memory and values (to_empty() and a "
                    "load) before prove"
                )
    for number, owners in enumerate(owners_of(models, optimizers)):
        if len(owners) > 1:
            raise ValueError(
                f"optimizer {number} has parameters of models {sorted(owners)}: torch saves an "
                "optimizer with one model, so make one for each"
            )
