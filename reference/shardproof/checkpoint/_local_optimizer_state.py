"""Optimizer state of the local Parameters that data parallelism holds for DTensors.

DDP and ``replicate`` train plain Parameters over the local tensors of tensor parallelism, so the
optimizer's state is plain, too. The model's state dict holds DTensors; so has the optimizer's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as upstream
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.optim import Optimizer

from shardproof.tensor.parallel._data_parallel_utils import wrap_local
from shardproof.tensor.parallel._local_parameters import local_part, records_of, slots_of

Specs = Mapping[nn.Parameter, DTensorSpec]


def specs_of(model: nn.Module) -> Specs:
    """The spec of each local Parameter of the model that stands in for a DTensor."""
    return {
        held: entry.spec
        for owner in model.modules()
        for name, entry in records_of(owner).items()
        if isinstance(held := slots_of(owner, name).get(name), nn.Parameter)
        and not isinstance(held, DTensor)
    }


def wrap(model: nn.Module, state_dict: dict[str, Any], specs: Specs) -> None:
    """Make DTensors of the state of local Parameters, in a nested state dict, by name."""
    for key, param in model.named_parameters():
        if (spec := specs.get(param)) is None:
            continue
        for name in upstream._get_fqns(model, key):
            entry = state_dict["state"].get(name)
            if entry is not None:
                state_dict["state"][name] = {
                    kind: wrap_local(value.detach(), spec) if _is_like(value, param) else value
                    for kind, value in entry.items()
                }


def _is_like(value: Any, param: nn.Parameter) -> bool:
    plain = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
    return plain and bool(value.dim()) and value.shape == param.shape


@contextlib.contextmanager
def unwrapping(optimizers: Sequence[Optimizer], specs: Specs) -> Iterator[None]:
    """Let each optimizer load this rank's parts of DTensors into the state of local Parameters.

    Torch hands over what it loads to ``optimizer.load_state_dict``; some optimizers override that
    without a word to the hooks of the class they inherit from.
    """
    if not specs:
        yield
        return
    before = [vars(optimizer).get("load_state_dict") for optimizer in optimizers]
    for optimizer in optimizers:
        load = upstream._state_dict_fn(optimizer, "load_state_dict")
        vars(optimizer)["load_state_dict"] = partial(_load, optimizer, load, specs)
    try:
        yield
    finally:
        for optimizer, held in zip(optimizers, before, strict=True):
            vars(optimizer).pop("load_state_dict", None)
            if held is not None:
                vars(optimizer)["load_state_dict"] = held


def _load(optimizer: Optimizer, load: Any, specs: Specs, state_dict: dict[str, Any]) -> None:
    state = dict(state_dict["state"])
    for mine, theirs in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        for param, name in zip(mine["params"], theirs["params"], strict=False):
            if param in specs and name in state:
                state[name] = {
                    kind: _local(value, param, specs[param]) for kind, value in state[name].items()
                }
    load(state_dict={**state_dict, "state": state})


def _local(value: Any, param: nn.Parameter, spec: DTensorSpec) -> Any:
    if not isinstance(value, torch.Tensor) or value.shape != spec.shape or not value.dim():
        return value
    if not isinstance(value, DTensor) and value.shape == param.shape:
        return value
    return local_part(value, spec)
