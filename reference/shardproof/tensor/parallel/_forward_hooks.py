"""Hooks around every forward of a tensor-parallel module: DTensors in before, out after.

The hooks stand on each module that has localized parameters in or below it, so that one that is
called alone, or again by activation checkpointing, computes with DTensors. Within the forward of
another they have nothing to do, and say so in two plain lines: ``torch.compile`` traces these into
a block's graph with ``fullgraph=True``, too. What they do otherwise lies outside of graphs.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.distributed.tensor import DTensor

from shardproof.tensor.parallel import _local_parameters, _optimizers, _replicate_groups

FORWARD_STATE = "_shardproof_seam"
_IGNORED = "_shardproof_not_localized"
_STATE_DICT = "_shardproof_seam_state_dict"
_ONE_AT_A_TIME = threading.RLock()
"""Held while DTensors go in or out: another thread may evaluate, or save, what one trains."""


class ForwardState:
    """What a hooked module knows of the forwards around it; a copy of it knows of none."""

    def __init__(self) -> None:
        self.inside = 0
        """How many forwards hold DTensors in this module: its own, and those around it."""
        self.depth = 0
        """Within how many forwards of this very module we are, if the outermost put them in."""
        self.waiting: nn.Module | None = None
        """A module around this one that was localized after its forward had begun."""

    def __reduce__(self) -> tuple[type[ForwardState], tuple[()]]:
        return ForwardState, ()


def pre_forward_hook(module: Any, _input: Any) -> None:
    """Put DTensors in, unless they are: the forward pre-hook."""
    state = module._shardproof_seam
    if state.inside and not state.depth:
        return
    enter_forward(module)


def post_forward_hook(module: Any, _input: Any, _output: Any) -> None:
    """Take them out where this module's forward put them in: the forward hook."""
    if module._shardproof_seam.depth:
        leave_forward(module)


@_disable_dynamo(recursive=True)
def enter_forward(module: nn.Module) -> None:
    with _ONE_AT_A_TIME:
        _enter_forward(module)


def _enter_forward(module: nn.Module) -> None:
    state = forward_state_of(module)
    if state is None:
        enter(module)
        return
    if state.depth and calls_of(module) > 1:
        state.depth += 1
        if torch.is_grad_enabled():
            _let_train(module)
        return
    if state.depth:
        # An interrupt left without hooks (Module calls them for an Exception only).
        state.depth = 0
        leave(module)
    if not state.inside:
        around, state.waiting = state.waiting, None
        if around is None or not calls_of(around):
            around = module
        if enter(around):
            around.__dict__[FORWARD_STATE].depth = 1
            _local_parameters.move_hooks_last(around._forward_hooks, post_forward_hook)


@_disable_dynamo(recursive=True)
def leave_forward(module: nn.Module) -> None:
    with _ONE_AT_A_TIME:
        state = module.__dict__[FORWARD_STATE]
        state.depth -= 1
        if not state.depth:
            leave(module)


def enter(module: nn.Module) -> bool:
    """Put DTensors into the places of local Parameters; whether there were any."""
    submodules = _local_parameters.submodules_of(module)
    _replicate_groups.prepare(submodules)
    if not _put_dtensors_in(module, submodules):
        return False
    for submodule in submodules:
        if (state := forward_state_of(submodule)) is not None:
            state.inside += 1
    return True


def _let_train(module: nn.Module) -> None:
    """Renew DTensors that a forward around this one, or in another thread, put in without grad."""
    renewed: dict[int, DTensor] = {}
    for owner in _local_parameters.submodules_of(module):
        for name, entry in _local_parameters.records_of(owner).items():
            slots, held, local = _local_parameters.slots_of(owner, name), entry.inside, entry.local
            if held is None or slots.get(name) is not held:
                continue
            if local.requires_grad and not held.requires_grad:
                if id(local) not in renewed:
                    renewed[id(local)] = _local_parameters.as_dtensor(local, entry, name)
                entry.inside = renewed[id(local)]
                _local_parameters.put_in(owner, slots, name, entry.inside)


def complete(module: nn.Module) -> None:
    """The same within a forward, for what is not there."""
    submodules = _local_parameters.submodules_of(module)
    if _put_dtensors_in(module, submodules):
        for submodule in submodules:
            if (state := forward_state_of(submodule)) is not None:
                state.inside = state.inside or 1


def _put_dtensors_in(module: nn.Module, submodules: Mapping[nn.Module, bool]) -> bool:
    if _record_others(submodules):
        submodules = _local_parameters.submodules_of(module)
        attach(submodules)
    built: dict[int, DTensor] = {}
    found: list[tuple[nn.Module, Any, str, _local_parameters.Localized, Any]] = []
    arrived = False
    for owner in submodules:
        for name, entry in _local_parameters.records_of(owner).items():
            slots = _local_parameters.slots_of(owner, name)
            held = slots.get(name)
            if held is None or isinstance(held, DTensor):
                arrived = arrived or held is not entry.inside
                continue
            if held is not entry.local:
                entry.follow(held)
            if id(held) not in built:
                built[id(held)] = _local_parameters.as_dtensor(held, entry, name)
            found.append((owner, slots, name, entry, held))
    for owner, slots, name, entry, held in found:
        if entry.local is not held:
            entry.stand_in(held)
        entry.inside = whole = built[id(held)]
        if type(owner).__setattr__ is _local_parameters.SETS_ITS_TABLES:
            slots[name] = whole
        else:
            _local_parameters.put_in(owner, slots, name, whole)
    return bool(found) or arrived


def _record_others(submodules: Iterable[nn.Module]) -> bool:
    """Record local Parameters that have another place now, or one more; whether there are any.

    A parametrization that comes later moves them, and who ties weights late gives them a second.
    """
    found = False
    for owner in submodules:
        records = _local_parameters.records_of(owner)
        tables: tuple[Any, Any] = owner._parameters, owner._buffers
        for slots in tables:
            for name, held in slots.items():
                if name in records or not hasattr(held, "_st_info"):
                    continue
                assert held is not None
                if (spec := _local_parameters.mark_of(held)) is not None:
                    _local_parameters.record(owner, name, held, spec)
                    found = True
    return found


def leave(module: nn.Module) -> None:
    """Take the DTensors out of all parts that no other forward holds them in."""
    submodules = []
    for submodule in _local_parameters.submodules_of(module):
        state = forward_state_of(submodule)
        if state is not None and state.inside:
            state.inside -= 1
        if state is None or not state.inside:
            submodules.append(submodule)
    localize(module, submodules, after_forward=True)


def localize(module: nn.Module, submodules: Iterable[nn.Module], *, after_forward: bool) -> bool:
    """Put local Parameters into the places of DTensors in some parts of a module.

    The first time for a DTensor this makes the Parameter, and hooks the module; whether it did.
    A forward that computed with DTensors before they were met has their gradients still to come.
    """
    left_out = ignored_in(submodules)
    made: dict[int, tuple[Any, Any]] = {}
    found: list[tuple[nn.Module, str, DTensor]] = []
    inside: list[tuple[nn.Module, Any, str, _local_parameters.Localized]] = []
    for owner in submodules:
        records = _local_parameters.records_of(owner)
        tables: tuple[Any, Any] = owner._parameters, owner._buffers
        for slots in tables:
            for name, held in slots.items():
                if not isinstance(held, DTensor):
                    continue
                entry = records.get(name)
                if entry is not None and entry.inside is held:
                    inside.append((owner, slots, name, entry))
                elif id(held) not in left_out:
                    if id(held) not in made:
                        made[id(held)] = _local_parameters.local_tensor_for(held)
                        if after_forward:
                            _local_parameters.hand_gradients_on(held, *made[id(held)])
                    found.append((owner, name, held))
    for owner, slots, name, entry in inside:
        entry.inside = None
        if type(owner).__setattr__ is _local_parameters.SETS_ITS_TABLES:
            slots[name] = entry.local
        else:
            _local_parameters.put_in(owner, slots, name, entry.local)
    for owner, name, held in found:
        _local_parameters.record(owner, name, *made[id(held)])
    # Parts of it may have been localized, and hooked, on their own before.
    if made or FORWARD_STATE not in module.__dict__:
        attach(_local_parameters.submodules_of(module))
    if made:
        replaced = [(held, made[id(held)][0]) for _, _, held in found]
        del held, found
        _optimizers.update_optimizers(replaced)
    return bool(made)


def wait_for(module: nn.Module) -> None:
    """Let the first part that is called enter the module: its own forward began without."""
    for submodule in _local_parameters.submodules_of(module):
        if submodule is not module and (state := forward_state_of(submodule)) is not None:
            state.waiting = module


def attach(submodules: Mapping[nn.Module, bool]) -> None:
    """Hook every module of a tree that has localized parameters in or below it, once."""
    # Dynamo has been imported by now, to disable it. It traces a hook that it meets in a module's
    # call, and starts with none: before a compiled module of `fullgraph=True` they run as they are.
    from torch._dynamo.eval_frame import skip_code

    skip_code(pre_forward_hook.__code__)
    skip_code(post_forward_hook.__code__)
    hooks = _local_parameters.Hooks(pre_forward_hook, post_forward_hook)
    for submodule, holds in submodules.items():
        if not holds:
            continue
        if FORWARD_STATE not in submodule.__dict__:
            submodule.__dict__[FORWARD_STATE] = ForwardState()
            hooks.around_forward(submodule)
        if _local_parameters.records_of(submodule) and _STATE_DICT not in submodule.__dict__:
            submodule.__dict__[_STATE_DICT] = True
            hooks.around_state_dict(submodule)


class _Ignored(dict[str, "int | None"]):
    """The names of an owner's DTensors that stay, and the id of each: another one is localized.

    A weak reference in place of the id would keep `swap_tensors`, and so `Module.double()`, from
    working on the tensor. Without one, a DTensor that is made where one that is gone lay, and gets
    its name, is taken for it. A copy or a pickle of the module has other tensors: their ids are
    taken when they are first asked for.
    """

    def __reduce__(self) -> tuple[type[_Ignored], tuple[dict[str, None]]]:
        return _Ignored, (dict.fromkeys(self),)


_NONE_IGNORED = _Ignored()


def ignore(module: nn.Module, parameters: Iterable[torch.Tensor]) -> None:
    """Remember which DTensors of a module are not to be localized, each on its owner."""
    left_out = {id(parameter) for parameter in parameters}
    for owner in _local_parameters.submodules_of(module):
        held = (*owner._parameters.items(), *owner._buffers.items())
        ignored = _Ignored((name, id(tensor)) for name, tensor in held if id(tensor) in left_out)
        if ignored:
            owner.__dict__[_IGNORED] = ignored
        else:
            owner.__dict__.pop(_IGNORED, None)


def ignored_in(submodules: Iterable[nn.Module]) -> set[int]:
    """Identities of the DTensors that are not to be localized."""
    found = set()
    for owner in submodules:
        ignored: _Ignored = owner.__dict__.get(_IGNORED, _NONE_IGNORED)
        for name, known in ignored.items():
            tensor = _local_parameters.slots_of(owner, name).get(name)
            if tensor is not None and known in (None, id(tensor)):
                ignored[name] = id(tensor)
                found.add(id(tensor))
    return found


def forward_state_of(module: nn.Module) -> ForwardState | None:
    found: ForwardState | None = module.__dict__.get(FORWARD_STATE)
    return found


def calls_of(module: nn.Module) -> int:
    """How many frames, of any thread, are calls of this module; we look for two at most."""
    calls = 0
    for top in sys._current_frames().values():
        frame: FrameType | None = top
        while frame is not None and calls < 2:
            code = frame.f_code
            if code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module:
                calls += 1
            frame = frame.f_back
    return calls
