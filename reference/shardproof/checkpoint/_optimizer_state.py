"""Which state an optimizer is given by a state dict, where it holds none or another itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

_STATE, _GROUPS, _PARAMS = "state", "param_groups", "params"


@dataclass
class Named:
    """Stands for an optimizer that holds state under the names that a flat state dict has."""

    param_groups: list[dict[str, Any]]
    state: dict[nn.Parameter, list[Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, optim: Optimizer, state_dict: Mapping[str, Any], info: Any) -> Named:
        """The optimizer, and what the state dict has for each of its parameters.

        Raises:
            RuntimeError: with ``strict``, a parameter that trains and has state lacks it.

        """
        keys: dict[str, list[str]] = {}
        fqns = {name for param in _params(optim) for name in info.fqn_param_mapping[param]}
        for key in state_dict:
            kind, *parts = key.split(".")
            for at in range(1, len(parts)) if kind == _STATE else ():
                if (fqn := ".".join(parts[:at])) in fqns:
                    keys.setdefault(fqn, []).append(".".join(parts[at:]))
        made = cls(optim.param_groups)
        for param in _params(optim):
            own = optim.state.get(param, {})
            found = [key for fqn in info.fqn_param_mapping[param] for key in keys.get(fqn, ())]
            if own and not found and info.strict and param.requires_grad:
                raise _missing(info, param)
            made.state[param] = list(dict.fromkeys(_name(key, own) for key in found))
        return made


def _name(key: str, own: Mapping[Any, Any]) -> Any:
    """Of which state a key is: one of the optimizer's own, whose name may have dots, or its first.

    The rest of a key is of dicts within that state.
    """
    found = [name for name in own if key == str(name) or key.startswith(f"{name}.")]
    # The longest: one state may be called as another is, and a dot and more.
    return max(found, key=lambda name: len(str(name)), default=key.partition(".")[0])


def refuse_missing(
    optim: Optimizer, state_dict: Mapping[str, Any], taken: Mapping[str, Any], info: Any
) -> None:
    """Refuse a nested state dict that lacks state which there should be.

    Args:
        optim: the optimizer.
        state_dict: what is loaded.
        taken: what was taken of it for the optimizer.
        info: the options, as torch has worked them out.

    None need be for a parameter for which the optimizer holds none, while it holds some for others,
    or if there is none for any of the parameters with which it was saved in a group: so saves SGD
    without momentum (SP-090).

    Raises:
        RuntimeError: a parameter that trains lacks it.

    """
    state, groups = state_dict[_STATE], state_dict[_GROUPS]
    bare = {
        fqn
        for group in groups
        if not any(name in state for name in group[_PARAMS])
        for fqn in group[_PARAMS]
    }
    wanted = {name for group in taken[_GROUPS] for name in group[_PARAMS]}
    for param in _params(optim):
        for fqn in info.fqn_param_mapping[param] if param.requires_grad else ():
            excused = not optim.state.get(param) and (fqn in bare or any(optim.state.values()))
            if fqn in wanted and fqn not in state and not excused:
                raise _missing(info, param)


def has_tensors(state: Any) -> bool:
    """Whether there is a tensor with dimensions, which would have to be distributed."""
    if isinstance(state, torch.Tensor):
        return state.dim() > 0
    return isinstance(state, Mapping) and any(map(has_tensors, state.values()))


def by_name(state_dict: Mapping[str, Any]) -> bool:
    """Whether parameters are called by their names: a raw state dict has numbers."""
    return any(isinstance(name, str) for group in state_dict[_GROUPS] for name in group[_PARAMS])


def _params(optim: Optimizer) -> Iterator[nn.Parameter]:
    return (param for group in optim.param_groups for param in group[_PARAMS])


def _missing(info: Any, param: nn.Parameter) -> RuntimeError:
    names = " or ".join(repr(name) for name in sorted(info.fqn_param_mapping[param]))
    return RuntimeError(
        f"Missing optimizer state for parameter {names}, which trains; expected it in the state "
        "dict, or StateDictOptions(strict=False)"
    )
