"""Model and optimizer state of parallel models: torch's functions, and around them what they lack.

Each calls torch's own function, which does what it does today; what is said here is the difference.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict as upstream
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.optim import Optimizer

from shardproof._core.sharding.simulated_ranks import simulates_ranks
from shardproof.checkpoint import _full_loads, _local_optimizer_state, _optimizer_state

# Torch's own, whatever is installed: this module is imported before they are replaced.
_get_model = upstream._get_model_state_dict
_load_model = upstream._load_model_state_dict
_get_optim = upstream._get_optim_state_dict
_load_optim = upstream._load_optim_state_dict
_split_optim = upstream._split_optim_state_dict
_unflatten_optim = upstream._unflatten_optim_state_dict
_fsdp_group: Any = getattr(upstream, "_get_fsdp_process_group", None)


@torch.no_grad()
def _get_model_state_dict(model: nn.Module, info: Any) -> dict[str, Any]:
    """The model's state dict.

    Args:
        model: the model.
        info: the options, as torch has worked them out.

    Frozen parameters that ``ignore_frozen_params`` leaves out are left out where they are: a rank
    to which FSDP1 gives no state dict, a submodule alone, or a model that does not save them
    itself, is no error (SP-071).

    """
    if not info.ignore_frozen_params:
        return _get_model(model, info)
    kept = replace(info, ignore_frozen_params=False, full_state_dict=False, cpu_offload=False)
    state = _get_model(model, kept)
    prefixes = ["", *info.submodule_prefixes] if not info.keep_submodule_prefixes else [""]
    for key, param in model.named_parameters():
        for name in upstream._get_fqns(model, key) if not param.requires_grad else ():
            for prefix in prefixes:
                if name.startswith(prefix):
                    state.pop(name.removeprefix(prefix), None)
    return upstream._maybe_full_or_cpu_state_dict(state, info)


@torch.no_grad()
def _load_model_state_dict(model: nn.Module, state_dict: dict[str, Any], info: Any) -> Any:
    """Load the model's state dict.

    Args:
        model: the model.
        state_dict: what is loaded; with ``broadcast_from_rank0`` that of rank 0. Not changed.
        info: the options, as torch has worked them out.

    Returns:
        What ``Module.load_state_dict()`` says.

    With ``strict`` and ``full_state_dict``, a key that is missing on this rank raises (SP-077).
    Frozen parameters may be missing with ``ignore_frozen_params``, which leaves them out of what
    is saved, and so may what the model itself does not save. Without ``strict`` FSDP1 keeps what is
    missing, too.

    Raises:
        RuntimeError: with ``broadcast_from_rank0`` what any rank raises is raised by all, and names
            that rank (SP-078).

    ``set_state_dict()`` broadcasts the model also to ranks that gave it an empty state dict
    (SP-095).

    Collectives besides torch's: two small ones over the default group, where it broadcasts.

    """
    if info.broadcast_from_rank0 and (info.handle_model or _is_loaded_on_all_ranks(model, info)):
        return _full_loads.load_from_rank0(_load_model, model, state_dict, info)
    if info.full_state_dict and info.handle_model:
        return _full_loads.load_full(_load_model, model, state_dict, info)
    return _load_model(model, state_dict, info)


def _is_loaded_on_all_ranks(model: nn.Module, info: Any) -> bool:
    """Whether the optimizers' state goes to all ranks; FSDP1's goes to those of the model."""
    group = _get_fsdp_process_group(model, info) if _fsdp_group and info.fsdp_modules else None
    return group is None or dist.get_world_size(group) == dist.get_world_size()


@torch.no_grad()
def _get_optim_state_dict(
    model: nn.Module, optimizers: tuple[Optimizer, ...], info: Any
) -> dict[str, Any]:
    """The optimizers' state dict.

    Args:
        model: the model.
        optimizers: those of its parameters.
        info: the options, as torch has worked them out.

    State that has the shape of a local Parameter, which data parallelism holds for a DTensor of
    tensor parallelism, is a DTensor, as the parameter is in the model's state dict: whole in a full
    state dict, and true in a checkpoint (SP-069). State of another shape is this rank's own: it
    stays as it is.

    """
    info = replace(info, broadcast_from_rank0=False)  # of a load only
    specs = _local_optimizer_state.specs_of(model) if info.handle_optim else {}
    if not specs:
        return _get_optim(model, optimizers, info)
    options = {"full_state_dict": False, "cpu_offload": False}
    plain = replace(info, **options, flatten_optimizer_state_dict=False)
    state: Any = _get_optim(model, optimizers, plain)
    _local_optimizer_state.wrap(model, state, specs)
    if info.flatten_optimizer_state_dict:
        state = upstream._flatten_optim_state_dict(state)
    return upstream._maybe_full_or_cpu_state_dict(state, info)


def _get_fsdp_process_group(model: nn.Module, info: Any) -> dist.ProcessGroup | None:
    """The ranks among which FSDP1 gathers or broadcasts an optimizer's state; None: all.

    Args:
        model: the model.
        info: the options, as torch has worked them out.

    With ``broadcast_from_rank0`` all, if the model is on all: with tensor parallelism FSDP has
    several groups, and one of them has rank 0. With ``full_state_dict`` and ``cpu_offload``, too,
    which then give the state to rank 0. A model on some ranks is loaded from the first of them.

    """
    group: dist.ProcessGroup | None = _fsdp_group(model, info)
    sizes = [
        extension.mesh.size()
        for module in info.fsdp_modules
        for extension in (module._handle.flat_param._param_extensions if module._handle else ())
        if isinstance(extension, DTensorSpec)
    ]
    tensor_parallel = sizes[0] if sizes else 1
    on_all_ranks = tensor_parallel * dist.get_world_size(group) == dist.get_world_size()
    of_rank_0 = info.broadcast_from_rank0 or (sizes and info.full_state_dict and info.cpu_offload)
    return None if of_rank_0 and on_all_ranks else group


@torch.no_grad()
def _load_optim_state_dict(
    model: nn.Module, optimizers: tuple[Optimizer, ...], state_dict: dict[str, Any], info: Any
) -> None:
    """Load the optimizers' state dict.

    Args:
        model: the model.
        optimizers: those of its parameters.
        state_dict: what is loaded; with ``broadcast_from_rank0`` that of rank 0.
        info: the options, as torch has worked them out.

    Raises:
        RuntimeError: or what torch says of a state dict that does not have what the optimizers
            need: of one that is broadcast, or that FSDP1 loads, on every rank (as SP-078).

    A full state is taken nested and flat (SP-076). State of local Parameters is taken as
    :func:`_get_optim_state_dict` gives it, as DTensors of any placements, or as this rank's own
    plain tensors (SP-069). A full state without tensors is loaded as it is (SP-090).

    """
    if info.full_state_dict and not info.fsdp_modules:
        info = replace(info, flatten_optimizer_state_dict=False)
    if info.handle_optim:
        group = _get_fsdp_process_group(model, info) if _fsdp_group and info.fsdp_modules else None
        _full_loads.refuse_alike(model, optimizers, state_dict, info, group)
    specs = _local_optimizer_state.specs_of(model) if info.handle_optim else {}
    with _local_optimizer_state.unwrapping(optimizers, specs):
        rest = [
            optimizer
            for optimizer in optimizers
            if not _load_without_tensors(model, optimizer, state_dict, info)
        ]
        _load_optim(model, tuple(rest), state_dict, info)


def _load_without_tensors(
    model: nn.Module, optimizer: Optimizer, state_dict: dict[str, Any], info: Any
) -> bool:
    """Load a full state if neither it nor the optimizer has tensors to distribute; whether so."""
    full = info.handle_optim and info.full_state_dict and not info.fsdp_modules
    if not full or simulates_ranks():
        return False
    upstream._init_optim_state(optimizer)
    if any(map(_optimizer_state.has_tensors, optimizer.state.values())):
        return False
    take: Any = _split_optim_state_dict if "state" in state_dict else _unflatten_optim_state_dict
    arguments = (model, optimizer) if "state" in state_dict else (optimizer,)
    taken = take(*arguments, state_dict, info) if state_dict else None
    told = [None if taken is None or _optimizer_state.has_tensors(taken["state"]) else taken]
    if info.broadcast_from_rank0:
        dist.broadcast_object_list(told, src=0)
    if told[0] is None:
        return False
    as_it_is = replace(info, full_state_dict=False, broadcast_from_rank0=False)
    _load_optim(model, (optimizer,), told[0], as_it_is)
    return True


def _split_optim_state_dict(
    model: nn.Module, optim: Optimizer, optim_state_dict: dict[str, Any], info: Any
) -> dict[str, Any]:
    """What a nested state dict of all optimizers has for one of them.

    Args:
        model: the model.
        optim: the optimizer.
        optim_state_dict: the state dict. Not changed.
        info: the options, as torch has worked them out.

    An optimizer that holds no state, for all of its parameters or for some, needs none (SP-090).

    Raises:
        RuntimeError: with ``strict``, state is missing.

    """
    given = optim_state_dict
    if not given["state"] and _optimizer_state.by_name(given):
        given = {**given, "state": {"": {}}}  # torch takes an empty one for one by numbers
    taken: dict[str, Any] = _split_optim(model, optim, given, replace(info, strict=False))
    if info.strict and taken is not given:
        _optimizer_state.refuse_missing(optim, optim_state_dict, taken, info)
    return taken


def _unflatten_optim_state_dict(
    optim: Optimizer, state_dict: dict[str, Any], info: Any
) -> dict[str, Any]:
    """What a flat state dict of all optimizers has for one of them, nested.

    Args:
        optim: the optimizer.
        state_dict: the flat state dict.
        info: the options, as torch has worked them out.

    Which state a parameter has is asked of the state dict. Torch asks the optimizer, which may be
    new, or hold none for parameters of other ranks (SP-089).

    Raises:
        RuntimeError: with ``strict``, state that the optimizer holds is missing.

    """
    named: Any = _optimizer_state.Named.of(optim, state_dict, info)
    found: dict[str, Any] = _unflatten_optim(named, state_dict, info)
    found["state"] = {name: state for name, state in found["state"].items() if state}
    return found
