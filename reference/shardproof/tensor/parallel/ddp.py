"""A tensor-parallel module between DistributedDataParallel and its own forward.

DDP and ``replicate`` reduce the gradients of plain Parameters; the forward of a tensor-parallel
module computes with DTensors. Between forwards the module therefore holds local Parameters, the
same objects for all its life, in the same places under the same names; for the time of a forward
it holds DTensors over the same memory, whose gradients arrive at those Parameters.

None of these functions communicates. See pytorch#120479 on the state of the integration upstream.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.distributed.tensor import DTensor

from shardproof.tensor.parallel import _forward_hooks, _local_parameters

__all__: list[str] = []


def _get_submodule_n_params(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Find the owner of a parameter.

    Args:
        module: where the path begins.
        path: the parameter's name as ``named_parameters()`` of ``module`` gives it.

    Returns:
        The module that owns the parameter, and the parameter's name there.

    Raises:
        AttributeError: there is no such path; the message names it, and where it ends.

    Local: any rank may call it alone.

    """
    *steps, name = path.split(".")
    owner = module
    for step in steps:
        child = owner._modules.get(step)
        if child is None and step:
            # A compiled module, and adapters like it, answer for what they wrap.
            child = getattr(owner, step, None)
        if not isinstance(child, nn.Module):
            raise AttributeError(
                f"{path!r}: {type(owner).__name__} has no submodule {step!r}; it has "
                f"{_listed(owner._modules)}"
            )
        owner = child
    if not name or not hasattr(owner, name):
        raise AttributeError(
            f"{path!r}: {type(owner).__name__} has no parameter {name!r}; it has "
            f"{_listed(owner._parameters)}"
        )
    return owner, name


def _update_module_param(param_list: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
    """Replace parameters, each in its place.

    Args:
        param_list: (owner, name there, the tensor that replaces the parameter). A tensor that is
            no ``nn.Parameter``, such as a DTensor on its way through a forward, is allowed. A
            buffer, and a tensor that is an attribute, is replaced as a parameter is.

    The order of ``named_parameters()`` and the registration stay. Where the replaced parameter
    has further names in the owners of the list, it is replaced there, too: ties stay.

    Raises:
        AttributeError: an owner has no tensor of that name; nothing is changed then.
        TypeError: what is to be set is no tensor; nothing is changed then.

    Local: any rank may call it alone.

    """
    tables: list[dict[str, Any]] = [
        owner._parameters if name in owner._parameters else _other_table(owner, name)
        for owner, name, _ in param_list
    ]
    for table, (owner, name, tensor) in zip(tables, param_list, strict=True):
        if name not in table:
            raise AttributeError(
                f"{type(owner).__name__} has no parameter {name!r}; it has "
                f"{_listed(owner._parameters)}"
            )
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"parameter {name!r} of {type(owner).__name__}: expected a tensor, not "
                f"{type(tensor).__name__}"
            )
    replaced = {
        id(old): tensor
        for table, (_, name, tensor) in zip(tables, param_list, strict=True)
        if (old := table[name]) is not None
    }
    named = {(id(owner), name) for owner, name, _ in param_list}
    ties = [
        (owner, name, replaced[id(old)])
        for owner in {id(owner): owner for owner, _, _ in param_list}.values()
        for name, old in owner._parameters.items()
        if id(old) in replaced and (id(owner), name) not in named
    ]
    for table, (owner, name, tensor) in zip(tables, param_list, strict=True):
        if type(owner).__setattr__ is _local_parameters.SETS_ITS_TABLES:
            table[name] = tensor
        else:
            _local_parameters.put_in(owner, table, name, tensor)
    for owner, name, tensor in ties:
        _local_parameters.put_in(owner, owner._parameters, name, tensor)


def _other_table(owner: nn.Module, name: str) -> dict[str, Any]:
    """What holds a tensor that is no parameter: the buffers, or the attributes."""
    if isinstance(owner.__dict__.get(name), torch.Tensor):
        return owner.__dict__
    buffers: dict[str, Any] = owner._buffers
    return buffers


@_disable_dynamo(recursive=True)
def _reconstruct_dtensor(module: nn.Module, _input: Any = None) -> None:
    """Let the module compute with DTensors: the forward pre-hook.

    Args:
        module: a module that ``_localize_dtensor`` has treated, or any other, which stays as it is.
        _input: what a hook is given; not used.

    Each local Parameter gives its place to the DTensor that it is a part of, over the same
    memory. The DTensor's gradient reaches the Parameter as a plain, finished tensor. Tied
    Parameters become one DTensor. Buffers are treated alike.

    Raises:
        ValueError: a Parameter was replaced by one of a shape that does not fit; the message names
            it, and nothing is changed.

    Local: no collective runs.

    """
    state = _forward_hooks.forward_state_of(module)
    if state is not None and state.inside:
        _forward_hooks.complete(module)
    else:
        _forward_hooks.enter_forward(module)


@_disable_dynamo(recursive=True)
def _localize_dtensor(
    module: nn.Module, *_: Any, ignored_params: Iterable[nn.Parameter] | None = None
) -> None:
    """Let data parallelism see plain Parameters: the forward hook, and the first step of a wrap.

    Args:
        module: any module.
        ignored_params: DTensor parameters to leave as they are, now and in later calls that say
            nothing of them, such as a hook's, also in copies and pickles of the module.

    What ``_reconstruct_dtensor`` put in gives its place back to the same local Parameter. A
    DTensor parameter that was not met before is replaced by a Parameter over the same memory,
    trainable where the DTensor was; tied ones by one Parameter; buffers alike.

    Optimizers that hold a replaced DTensor are given its Parameter, and their state with it; other
    lists that a caller made of the DTensors are not found.

    From then on the module's ``state_dict()`` holds DTensors, and ``load_state_dict()`` takes
    DTensors, full tensors and plain ones that are each rank's own part; hooks of others see whole
    tensors. ``state_dict(keep_vars=True)`` holds the local Parameters themselves. The
    module reconstructs and localizes itself around each of its forwards and those of its
    submodules, so that one that is called alone, or again by activation checkpointing, computes
    with DTensors, too; also when a forward raises, and compiled with ``fullgraph=True``. A
    function that activation checkpointing computes again finds them in the submodules that it
    calls, not in parameters that it reads itself.

    Raises:
        RuntimeError: the module's own forward has begun, as with the first of ``replicate`` with a
            ``process_group``, and the module itself holds a DTensor; nothing is changed then.

    Local: no collective runs. (Loading a DTensor that is laid out otherwise is one, see there.)

    """
    if ignored_params is not None:
        _forward_hooks.ignore(module, ignored_params)
    state = _forward_hooks.forward_state_of(module)
    if _ and state is not None and state.inside:
        # A forward hook. Ours comes after it, here or with a forward around this one.
        if state.depth and not _forward_hooks.calls_of(module):
            _forward_hooks.leave_forward(module)
        return
    submodules = _local_parameters.submodules_of(module)
    for submodule in submodules:
        if (state := _forward_hooks.forward_state_of(submodule)) is not None:
            state.inside = state.depth = 0
    late = ignored_params is not None and _has_begun(module)
    if late:
        _refuse_own(module)
    if _forward_hooks.localize(module, submodules, after_forward=bool(_)) and late:
        _forward_hooks.wait_for(module)


def _pre_dp_module_transform(module: nn.Module) -> None:
    """Make a tensor-parallel module ready for DDP or ``replicate``.

    Args:
        module: the module, after ``parallelize_module``; one without DTensor parameters stays as
            it is. A second call changes nothing.

    Its DTensor parameters become local Parameters in the same places, as ``_localize_dtensor``
    says; these are what an optimizer has to hold, and what one that was made before is given.

    The first forward under data parallelism raises a RuntimeError that names a parameter where
    the group of DDP or ``replicate`` has ranks that hold other parts of it.

    Local: no collective runs; every rank that holds the module must call it before the wrap.

    """
    _localize_dtensor(module)


def _has_begun(module: nn.Module) -> bool:
    """Whether a forward of the module is past the moment at which it would put DTensors in."""
    return _reconstruct_dtensor not in module._forward_pre_hooks.values() and bool(
        _forward_hooks.calls_of(module)
    )


def _refuse_own(module: nn.Module) -> None:
    ignored = _forward_hooks.ignored_in([module])
    for name, held in (*module._parameters.items(), *module._buffers.items()):
        if isinstance(held, DTensor) and id(held) not in ignored:
            raise RuntimeError(
                f"parameter {name!r} of {type(module).__name__}: data parallelism takes this "
                "DTensor's local tensor in a forward that has begun, and would compute with it; "
                "call _pre_dp_module_transform(module) before replicate(), or give replicate() a "
                "device_mesh= that is sliced from the mesh of data and tensor parallelism"
            )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
