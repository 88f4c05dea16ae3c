"""Local Parameters that stand in for a module's DTensors between its forwards.

Data parallelism knows plain tensors only. So between forwards each DTensor parameter of a
tensor-parallel module gives its place to a Parameter over its local tensor, and takes it again
for the time of a forward; buffers likewise. What belongs together is recorded on the module that
owns the parameter, not on the Parameter: so the record outlives ``copy.deepcopy``, ``Module.to``
and a Parameter that was replaced.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict, UserDict
from collections.abc import Callable, ValuesView
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.utils.hooks import RemovableHandle

from shardproof._core.sharding.blocks import cuts_of, spec_block, split_dims
from shardproof._core.sharding.dtensors import represented_dtensor
from shardproof._core.sharding.ranks import group_orders, my_shard_number
from shardproof._core.tensors.subclasses import wait_for_pending
from shardproof._core.tensors.values import allocate, put
from shardproof.tensor.parallel._data_parallel_utils import (
    _flatten_tensor,
    unflatten_eagerly,
    wrap_local,
)
from shardproof.tensor.parallel._redistribution import move_by_dtensor
from shardproof.tensor.parallel._subclasses import alias

_RECORDS = "_shardproof_localized"
_KEEP_VARS = "_shardproof_keep_vars"
_NONE: dict[str, Any] = {}


class Localized:
    """One DTensor of a module, and the local tensor that stands in for it.

    Args:
        local: the Parameter or buffer that the module holds between forwards.
        spec: what part of which global tensor it is.

    """

    def __init__(self, local: torch.Tensor, spec: DTensorSpec) -> None:
        self.spec = spec
        self.fits: torch.Size | None = None
        """The local shape that the spec gives to this rank, once it was asked."""
        self.inside: torch.Tensor | None = None
        """The DTensor that has the place now, during a forward."""
        self.stand_in(local)

    def stand_in(self, local: torch.Tensor) -> None:
        """Take note of the tensor, and mark it for those who see nothing else of the module.

        The mark has upstream's name. The state-dict functions read it: there a module's parameters
        arrive as bare values.
        """
        self.local = local
        local._st_info = self.spec  # type: ignore[attr-defined]

    def follow(self, held: torch.Tensor) -> None:
        """Take over the spec of a tensor that was recorded in another place, and has this one now.

        One without a mark, as a conversion makes, is taken for the same part as what it replaces.
        """
        spec = mark_of(held)
        if spec is not None and spec is not self.spec:
            self.local, self.spec, self.fits = held, spec, None

    def __deepcopy__(self, memo: dict[int, Any]) -> Localized:
        # A spec holds a mesh, and a mesh its process groups: these are not the module's to copy.
        return Localized(copy.deepcopy(self.local, memo), self.spec)


def mark_of(held: torch.Tensor) -> DTensorSpec | None:
    """What a tensor that stands in for a DTensor is a part of."""
    mark = getattr(held, "_st_info", None)
    return mark if isinstance(mark, DTensorSpec) else None


Slots = dict[str, torch.Tensor | None]


def slots_of(owner: nn.Module, name: str) -> Slots:
    """The table of this very module that has the name: its parameters, or its buffers."""
    tables: tuple[Any, Any] = owner._parameters, owner._buffers
    return tables[0] if name in tables[0] else tables[1]


SETS_ITS_TABLES = nn.Module.__setattr__
"""What a class has that keeps its tensors in its tables alone: these may be written at once."""


def put_in(owner: nn.Module, slots: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
    """Give a tensor the place of another one in a table of this very module.

    A class that overrides ``__setattr__`` may keep its tensors elsewhere as well, as an LSTM does:
    it is told as if somebody assigned the tensor. The order of the table stays.
    """
    if type(owner).__setattr__ is SETS_ITS_TABLES:
        slots[name] = tensor
        return
    if slots is owner.__dict__:
        setattr(owner, name, tensor)
        return
    ordered = {**slots}
    del slots[name]
    try:
        setattr(owner, name, tensor)
        ordered[name] = tensor
    finally:
        owner.__dict__.pop(name, None)
        slots.clear()
        slots.update(ordered)


def records_of(owner: nn.Module) -> dict[str, Localized]:
    """What is recorded on this very module, by parameter name; not on its children."""
    found: dict[str, Localized] = owner.__dict__.get(_RECORDS, _NONE)
    return found


def submodules_of(module: nn.Module) -> dict[nn.Module, bool]:
    """A module and all below it, each once, as ``modules()`` has them.

    With each whether anything is recorded on it or below. ``modules()`` makes up a name for each
    and hands it up through a generator a level; every forward walks here, twice.
    """
    found: dict[nn.Module, bool] = {}
    _holds(module, found)
    return found


def _holds(module: nn.Module, found: dict[nn.Module, bool]) -> bool:
    holds = found[module] = _RECORDS in module.__dict__
    for child in module._modules.values():
        if child is not None and (found[child] if child in found else _holds(child, found)):
            holds = found[module] = True
    return holds


def record(owner: nn.Module, name: str, local: torch.Tensor, spec: DTensorSpec) -> None:
    """Put a local tensor into the place of a DTensor, and remember the spec."""
    owner.__dict__.setdefault(_RECORDS, {})[name] = Localized(local, spec)
    slots = slots_of(owner, name)
    if slots.get(name) is not local:
        put_in(owner, slots, name, local)


def local_tensor_for(whole: DTensor) -> tuple[torch.Tensor, DTensorSpec]:
    """A tensor over the local tensor of a DTensor; of a Parameter one with all the user gave it.

    It trains where the DTensor does, carries its attributes, and a gradient that lies ready.
    """
    if torch.is_inference_mode_enabled():
        # The first forward may find us there, where a wrapper cannot be detached.
        with torch.inference_mode(mode=False):
            return local_tensor_for(whole)
    plain, spec = _flatten_tensor(whole)
    assert spec is not None
    if not isinstance(whole, nn.Parameter):
        return alias(plain), spec
    # A Parameter is over what it is given, but detached from it.
    local = nn.Parameter(plain, requires_grad=whole.requires_grad)
    local.__dict__.update(whole.__dict__)
    grad = whole.grad
    if grad is not None and isinstance(grad, DTensor) and grad.placements == spec.placements:
        local.grad = wait_for_pending(grad._local_tensor)
    return local, spec


def hand_gradients_on(whole: DTensor, local: torch.Tensor, spec: DTensorSpec) -> None:
    """Give a local Parameter the gradients that are still to reach the DTensor it replaces."""
    if not (whole.requires_grad and whole.is_leaf and torch.is_grad_enabled()):
        return
    placements = tuple(Replicate() if p.is_partial() else p for p in spec.placements)
    # A caller may lend the same DTensor to each forward: what stood in for it once is not kept.
    reference = weakref.ref(local)

    def hand_on(grad: DTensor) -> None:
        if (stand_in := reference()) is None:
            handle.remove()
            return
        with torch.no_grad():
            if grad.placements != placements:
                grad = grad.redistribute(placements=placements)
            part = wait_for_pending(grad.to_local())
            # The DTensor keeps what it is given, and autograd adds to that in place.
            stand_in.grad = part.clone() if stand_in.grad is None else stand_in.grad + part

    handle = whole.register_hook(hand_on)


def as_dtensor(value: torch.Tensor, entry: Localized, key: str) -> DTensor:
    """The DTensor around a local tensor; an error names the parameter."""
    if value.shape == entry.fits:
        return wrap_local(value, entry.spec)
    try:
        whole = unflatten_eagerly(value, entry.spec)
    except ValueError as error:
        raise ValueError(f"parameter {key!r}: {error}") from None
    entry.fits = whole._local_tensor.shape
    return whole


def local_part(value: torch.Tensor, spec: DTensorSpec) -> torch.Tensor:
    """This rank's part, as ``spec`` says, of a global tensor: a DTensor, or a full plain one.

    A full tensor is cut here, without communication. A DTensor that is laid out otherwise is
    redistributed, or gathered if it lies on another mesh; then every rank of its mesh must call.
    """
    value = value.detach()
    if isinstance(value, DTensor):
        # On a mesh that lists its ranks out of order a redistribution cuts by the coordinate.
        right = value.placements == spec.placements or not group_orders(spec.mesh)
        if value.device_mesh == spec.mesh and right:
            return move_by_dtensor(
                value, lambda v: v.redistribute(placements=spec.placements).to_local()
            )
        value = move_by_dtensor(value, lambda v: v.full_tensor())
    mine = my_shard_number(spec.mesh, split_dims(cuts_of(spec), spec.mesh.shape))
    if mine is None:
        return value.new_empty((0,))
    block = spec_block(spec, mine)
    part = allocate(block.shape, value.dtype, value.device)
    for there, here in block.regions(tuple((0, size) for size in block.shape)):
        put(part[here], value[there])
    return part


def move_hooks_last(hooks: Any, ours: Callable[..., None]) -> None:
    """Let our hook come after those that were registered since."""
    if hooks and hooks[next(reversed(hooks))] is ours:
        return
    for number in [number for number, hook in hooks.items() if hook is ours]:
        hooks[number] = hooks.pop(number)


def put_hook_first(hooks: Any, number: int, ours: Callable[..., Any]) -> None:
    """Let our hook come before those that are there.

    Not by OrderedDict.move_to_end(): a guard of Dynamo in torch 2.11 counts keys in the order in
    which they were put in, and finds another hook, SP-015.
    """
    others = {key: hook for key, hook in hooks.items() if key != number}
    hooks.clear()
    hooks[number] = ours
    hooks.update(others)


class Hooks:
    """Hooks of a module tree, put on one module after another.

    ``Module.register_*`` makes a handle for each, and wraps some: on a tree where nearly every
    module gets them that was a third of the time it took to localize it. Nobody takes these off
    again, so they share the number that one handle gave them.

    Args:
        enter: before a forward.
        leave: after it, also where it raises.

    """

    def __init__(self, enter: Callable[..., None], leave: Callable[..., None]) -> None:
        self._enter, self._leave = enter, leave
        self._number = RemovableHandle(OrderedDict()).id

    def around_forward(self, module: nn.Module) -> None:
        """Enter first of all, leave after all that are there."""
        before: Any = module._forward_pre_hooks
        if before:
            put_hook_first(before, self._number, self._enter)
        else:
            before[self._number] = self._enter
        module._forward_hooks[self._number] = self._leave
        module._forward_hooks_always_called[self._number] = True

    def around_state_dict(self, owner: nn.Module) -> None:
        """State dicts hold the DTensors that are recorded on the module, and load them.

        Hooks of others adapt whole tensors: ours comes first after saving, last before loading.
        """
        owner._state_dict_pre_hooks[self._number] = state_dict_pre_hook
        saved: Any = owner._state_dict_hooks
        if saved:
            put_hook_first(saved, self._number, state_dict_hook)
        else:
            saved[self._number] = state_dict_hook
        # Module's own setattr would look for a parameter first, for longer than the rest takes.
        owner.__dict__["_load_state_dict_pre_hooks"] = _LoadHooks(owner)


class _LoadHooks(UserDict[int, Any]):
    """A module's hooks before loading: those that it has, those that are to come, then ours.

    Over the dict that was there: handles that were given out remove from that.
    """

    def __init__(self, module: nn.Module) -> None:
        self.data = module._load_state_dict_pre_hooks
        # As torch wraps a hook that wants its module: its copy belongs to the module's copy.
        self._module = weakref.ref(module)

    def values(self) -> ValuesView[Any]:
        return ValuesView({**self.data, None: self._load})

    def _load(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        module = self._module()
        assert module is not None
        load_state_dict_hook(module, state_dict, prefix, *others)

    def __getstate__(self) -> Any:
        return self.data, self._module()

    def __setstate__(self, state: Any) -> None:
        self.data, module = state
        self._module = weakref.ref(module)


def state_dict_pre_hook(module: nn.Module, _prefix: str, keep_vars: bool) -> None:
    """Take note of what the hook after it is not told."""
    module.__dict__[_KEEP_VARS] = keep_vars


def state_dict_hook(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: dict[str, Any]
) -> None:
    """Give a state dict the DTensors that the module's local tensors are parts of.

    With ``keep_vars=True`` it is asked for the module's own Parameters and buffers, as the
    optimizer and data parallelism hold them: for their identity, their gradient, or to change them.
    These are the local ones, and stay. The mark on each tells the state-dict functions the whole.
    """
    keep_vars = module.__dict__.pop(_KEEP_VARS, False)
    for name, entry in records_of(module).items():
        key = prefix + name
        value = state_dict.get(key)
        held = slots_of(module, name).get(name)
        if keep_vars and value is held:
            continue
        if held is not None and held is not entry.local:
            entry.follow(held)
        if isinstance(value, torch.Tensor) and not isinstance(value, DTensor):
            state_dict[key] = as_dtensor(value, entry, key)


# As torch marks those that change the state dict in place and return nothing.
state_dict_hook._from_public_api = True  # type: ignore[attr-defined]


def load_state_dict_hook(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    _metadata: dict[str, Any],
    _strict: bool,
    _missing_keys: list[str],
    _unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Cut this rank's parts out of what is loaded, a full tensor or a DTensor."""
    for name, entry in records_of(module).items():
        key = prefix + name
        # A model that is loaded in part is handed its own tensors for the rest.
        value = represented_dtensor(state_dict.get(key))
        held = slots_of(module, name).get(name)
        if not isinstance(value, torch.Tensor) or held is None or isinstance(held, DTensor):
            continue
        if held is not entry.local:
            entry.follow(held)
        if value.shape == (1,) and not entry.spec.shape:
            value = value[0]  # as Module takes it for a scalar
        if tuple(value.shape) == tuple(entry.spec.shape):
            state_dict[key] = local_part(value, entry.spec)
            continue
        if not isinstance(value, DTensor) and value.shape == held.shape:
            continue  # this rank's part
        error_msgs.append(
            f"size mismatch for {key}: copying a param with shape {tuple(value.shape)} from "
            f"checkpoint, the shape in current model is {tuple(entry.spec.shape)}, of which this "
            f"rank holds {tuple(held.shape)}."
        )
        state_dict[key] = held.detach()  # said already; Module would say it with the local shape
