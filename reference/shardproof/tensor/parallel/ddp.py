"""A tensor-parallel module between DistributedDataParallel and its own forward.

DDP and ``replicate`` reduce the gradients of plain Parameters; the forward of a tensor-parallel
module computes with DTensors. Between forwards the module therefore holds local Parameters, the
same objects for all its life, in the same places under the same names; for the time of a forward
it holds DTensors over the same memory, whose gradients arrive at those Parameters.

None of these functions communicates. See pytorch#120479 on the state of the integration upstream.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.distributed.tensor import DTensor

from shardproof.tensor.parallel import _localized

__all__: list[str] = []

_SEAM = "_shardproof_seam"
_STATE_DICT = "_shardproof_seam_state_dict"
_IGNORED = "_shardproof_not_localized"


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
        if child is None:
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
            no ``nn.Parameter``, such as a DTensor on its way through a forward, is allowed.

    The order of ``named_parameters()`` and the registration stay. Where the replaced parameter
    has further names in the owners of the list, it is replaced there, too: ties stay.

    Raises:
        AttributeError: an owner has no parameter of that name; nothing is changed then.
        TypeError: what is to be set is no tensor; nothing is changed then.

    Local: any rank may call it alone.

    """
    for owner, name, tensor in param_list:
        if name not in owner._parameters:
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
        for owner, name, tensor in param_list
        if (old := owner._parameters[name]) is not None
    }
    named = {(id(owner), name) for owner, name, _ in param_list}
    ties = [
        (owner, name, replaced[id(old)])
        for owner in {id(owner): owner for owner, _, _ in param_list}.values()
        for name, old in owner._parameters.items()
        if id(old) in replaced and (id(owner), name) not in named
    ]
    for owner, name, tensor in (*param_list, *ties):
        owner._parameters[name] = tensor


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
    _enter(module)


@_disable_dynamo(recursive=True)
def _localize_dtensor(
    module: nn.Module, *_: Any, ignored_params: Iterable[nn.Parameter] | None = None
) -> None:
    """Let data parallelism see plain Parameters: the forward hook, and the first step of a wrap.

    Args:
        module: any module.
        ignored_params: DTensor parameters to leave as they are, now and in later calls with this
            module that say nothing of them, such as a hook's.

    What ``_reconstruct_dtensor`` put in gives its place back to the same local Parameter. A
    DTensor parameter that was not met before is replaced by a Parameter over the same memory,
    trainable where the DTensor was; tied ones by one Parameter; buffers alike.

    From then on the module's ``state_dict()`` holds DTensors, and ``load_state_dict()`` takes
    DTensors and full tensors. The module reconstructs and localizes itself around each of its
    forwards and those of its submodules, so that one that is called alone, or again by activation
    checkpointing, computes with DTensors, too; also when a forward raises.

    Local: no collective runs. (Loading a DTensor that is laid out otherwise is one, see there.)

    """
    if ignored_params is not None:
        module.__dict__[_IGNORED] = [weakref.ref(p) for p in ignored_params]
    left_out = {id(reference()) for reference in module.__dict__.get(_IGNORED, ())}

    made: dict[int, tuple[torch.Tensor, Any]] = {}
    found: list[tuple[nn.Module, str, DTensor]] = []
    inside: list[tuple[_localized.Slots, str, _localized.Localized]] = []
    parts = _localized.parts_of(module)
    for owner in parts:
        records = _localized.records_of(owner)
        tables: tuple[Any, Any] = owner._parameters, owner._buffers
        for slots in tables:
            for name, held in slots.items():
                if not isinstance(held, DTensor):
                    continue
                entry = records.get(name)
                if entry is not None and entry.inside is held:
                    inside.append((slots, name, entry))
                elif id(held) not in left_out:
                    if id(held) not in made:
                        made[id(held)] = _localized.localized(held)
                    found.append((owner, name, held))
    for slots, name, entry in inside:
        slots[name], entry.inside = entry.local, None
    for owner, name, held in found:
        _localized.record(owner, name, *made[id(held)])
    # Parts of it may have been localized, and hooked, on their own before.
    if made or _SEAM not in module.__dict__:
        _attach(_localized.parts_of(module))


def _pre_dp_module_transform(module: nn.Module) -> None:
    """Make a tensor-parallel module ready for DDP or ``replicate``.

    Args:
        module: the module, after ``parallelize_module``; one without DTensor parameters stays as
            it is. A second call changes nothing.

    Its DTensor parameters become local Parameters in the same places, as ``_localize_dtensor``
    says. Make the optimizer afterwards: it has to hold these.

    Local: no collective runs; every rank that holds the module must call it before the wrap.

    """
    _localize_dtensor(module)


class _Seam:
    """Around every forward of a module tree: DTensors in at the first, out at the last."""

    def __init__(self) -> None:
        self._holder: nn.Module | None = None
        self._depth = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> _Seam:
        return _Seam() if id(self) not in memo else memo[id(self)]

    @_disable_dynamo(recursive=True)
    def enter(self, module: nn.Module, _input: Any) -> None:
        if self._holder is None:
            if _enter(module):
                self._holder, self._depth = module, 1
        elif self._holder is module:
            # An interrupt leaves without hooks (Module calls them for an Exception only). What it
            # left open is taken over, unless this call really lies within the other.
            self._depth = self._depth + 1 if _is_running(module) else 1

    @_disable_dynamo(recursive=True)
    def leave(self, module: nn.Module, _input: Any, _output: Any) -> None:
        if self._holder is not module:
            return
        self._depth -= 1
        if self._depth == 0:
            self._holder = None
            _localize_dtensor(module)


def _enter(module: nn.Module) -> int:
    """Put DTensors into the places of local Parameters; how many places were changed."""
    built: dict[int, DTensor] = {}
    found: list[tuple[_localized.Slots, str, _localized.Localized, torch.Tensor]] = []
    for owner in _localized.parts_of(module):
        for name, entry in _localized.records_of(owner).items():
            slots = _localized.slots_of(owner, name)
            held = slots.get(name)
            if held is None or isinstance(held, DTensor):
                continue
            if id(held) not in built:
                built[id(held)] = _localized.as_dtensor(held, entry, name)
            found.append((slots, name, entry, held))
    for slots, name, entry, held in found:
        if entry.local is not held:
            entry.stand_in(held)
        entry.inside = slots[name] = built[id(held)]
    return len(found)


def _attach(parts: Mapping[nn.Module, bool]) -> None:
    """Hook every module of a tree that has localized parameters in or below it, once."""
    seam = _Seam()
    hooks = _localized.Hooks(seam.enter, seam.leave)
    for part, holds in parts.items():
        if not holds:
            continue
        if _SEAM not in part.__dict__:
            part.__dict__[_SEAM] = seam
            hooks.around_forward(part)
        if _localized.records_of(part) and _STATE_DICT not in part.__dict__:
            part.__dict__[_STATE_DICT] = True
            hooks.around_state_dict(part)


def _is_running(module: nn.Module) -> bool:
    """Whether an outer frame is a call of this module, apart from the one that asks."""
    frame, calls = sys._getframe(1), 0
    while frame is not None and calls < 2:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module:
            calls += 1
        frame = frame.f_back  # type: ignore[assignment]
    return calls == 2


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
