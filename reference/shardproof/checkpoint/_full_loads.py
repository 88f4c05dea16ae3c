"""Full loads of a model's state dict: strict where they shall be, and refused on every rank alike.

Before it loads, torch puts every key of the model into what is loaded, with the model's own values.
Strictness then finds nothing missing. And of a state dict that is broadcast rank 0 alone sees the
keys, so that it alone raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict as upstream
from torch.optim import Optimizer

from shardproof._core.comms.agreement import (
    Failure,
    agree_on_failure,
    exchange,
    first_failure,
    raise_failure,
)
from shardproof._core.sharding.domain import Domain, group_domain
from shardproof._core.sharding.simulated_ranks import simulates_ranks

_HAS_KEYS, _HAS_NONE = 1, 2
_RANK_0_LOADS, _OTHERS_LOAD = 1, 2
_NOT_EVERYWHERE = (
    "has no full state dict where others have one; expected it on every rank, or on rank 0 with "
    "broadcast_from_rank0=True"
)

Load = Callable[[nn.Module, dict[str, Any], Any], Any]


class _Given(dict[str, Any]):
    """A copy of what is loaded; of the model's own values, which torch adds, some may join it."""

    def __init__(self, given: Mapping[str, Any], may_join: Callable[[str, Any], bool]) -> None:
        super().__init__(given)
        if (metadata := getattr(given, "_metadata", None)) is not None:
            self._metadata = metadata  # versions of modules, for their load hooks
        self._may_join = may_join

    def update(self, own: Mapping[str, Any]) -> None:  # type: ignore[override]
        super().update({k: v for k, v in own.items() if k in self or self._may_join(k, v)})


def load_full(load: Load, model: nn.Module, state_dict: Mapping[str, Any], info: Any) -> Any:
    """Load a full state dict that this rank has.

    Args:
        load: torch's own function.
        model: the model.
        state_dict: what is loaded. Not changed.
        info: the options, as torch has worked them out.

    Torch may fill it with what the model holds where that hides nothing: without ``strict``, and
    keys that a save with the same options lacks, too. What FSDP1 holds are pieces, which cannot be
    loaded.

    Raises:
        RuntimeError: the same on every rank of FSDP1's groups, before it gathers: a rank has no
            state dict, where others have; or one lacks a key of a compiled model.

    Collectives besides torch's: two small ones over each group over which FSDP1 shards.

    """
    unsaved: set[str] | None = None

    def may_join(key: str, value: Any) -> bool:
        nonlocal unsaved
        if info.fsdp_modules or not info.strict:
            return not info.fsdp_modules
        if info.ignore_frozen_params and _is_frozen(value):
            return True
        if unsaved is None:
            saved = upstream._state_dict_fn(model, "state_dict")()
            unsaved = {name for name, _, _ in _names(model, info) if name not in saved}
        return key in unsaved

    domains = _fsdp_domains(info.fsdp_modules)
    if domains and not simulates_ranks():
        failure = _refusal(model, state_dict, info) if state_dict else None
        for domain in domains:
            mine = _HAS_KEYS if state_dict else _HAS_NONE
            _, flags = exchange(domain, None, None, flags=mine)
            if flags == _HAS_KEYS | _HAS_NONE and mine == _HAS_NONE:
                failure = Failure("RuntimeError", _NOT_EVERYWHERE)
        raise_failure(agree_on_failure(domains, failure))
    return load(model, _Given(state_dict, may_join), info)


def load_from_rank0(load: Load, model: nn.Module, state_dict: Mapping[str, Any], info: Any) -> Any:
    """Load a full state dict that rank 0 has; what one rank raises, all raise.

    Args:
        load: torch's own function.
        model: the model.
        state_dict: what is loaded, on rank 0. Not changed.
        info: the options, as torch has worked them out.

    Without a model on rank 0 nothing is loaded. Before and after it, one small collective over the
    default group.

    """
    if simulates_ranks():
        return load(model, dict(state_dict), info)
    domain = group_domain(dist.distributed_c10d._get_default_group())
    refusal, names, flag = None, None, _OTHERS_LOAD if info.handle_model else 0
    if dist.get_rank() == 0 and info.handle_model:
        flag = _RANK_0_LOADS
        refusal = _refusal(model, state_dict, info)
        if info.fsdp_modules and not info.strict:
            names = sorted(name for name, _, key in _names(model, info) if key in state_dict)
    refusal = refusal or _too_many_devices(model)
    replies, flags = exchange(domain, names, refusal, repr(names).encode(), flags=flag)
    if not flags:
        return load(model, {}, info)
    if flags == _OTHERS_LOAD:
        raise RuntimeError(
            "rank 0 has no model state dict to broadcast, but other ranks have one; expected it on "
            "rank 0"
        )
    info = replace(info, handle_model=True)
    raise_failure(first_failure(domain, replies))
    given = None if replies is None else set(replies[0][1])
    mine = error = failure = None
    try:
        mine = load(model, _Given(state_dict, lambda key, _: given is None or key in given), info)
    except Exception as raised:
        error, failure = raised, Failure.of(raised)
    told = first_failure(domain, exchange(domain, None, failure)[0])
    if error is not None:
        raise error
    raise_failure(told)
    return mine


def refuse_alike(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    state_dict: Mapping[str, Any],
    info: Any,
    group: dist.ProcessGroup | None,
) -> None:
    """Refuse an optimizer's state on every rank that is about to wait for one that refuses it.

    Torch looks for what each optimizer needs where there is a state dict: with a broadcast over
    `group`, or all ranks, on its first rank. So does this, before.
    """
    if info.broadcast_from_rank0:
        domains = [group_domain(group or dist.distributed_c10d._get_default_group())]
    else:
        domains = _fsdp_domains(info.fsdp_modules)
    if not domains or simulates_ranks():
        return
    failure: Failure | None = None
    nested = "state" in state_dict
    take: Any = upstream._split_optim_state_dict
    for optimizer in optimizers:
        upstream._init_optim_state(optimizer)
        try:
            if nested:
                take(model, optimizer, state_dict, info)
            elif state_dict:
                upstream._unflatten_optim_state_dict(optimizer, dict(state_dict), info)
        except Exception as error:
            failure = failure or Failure.of(error)
    raise_failure(agree_on_failure(domains, failure))


def _names(model: nn.Module, info: Any) -> Iterator[tuple[str, Any, str]]:
    """(name with the prefixes of wrappers, value, name without) of what the model can load."""
    modifiers = info.dsd_fqn_modifiers
    for key, value in upstream._iterate_valid_model_state(model, modifiers):
        short = upstream._get_fqns(model, key, modifiers)
        long = upstream._get_fqns(
            model, key, modifiers, skip_ddp_prefix=False, skip_compiler_prefix=False
        )
        for one, other in zip(short, long, strict=True):
            yield other, value, one


def _refusal(model: nn.Module, state_dict: Mapping[str, Any], info: Any) -> Failure | None:
    """What torch refuses on this rank alone before it loads: keys that wrappers' prefixes need."""
    if not info.strict:
        return None
    wrapped = [name for long, _, name in _names(model, info) if long != name]
    missing = [name for name in wrapped if state_dict.get(name) is None]
    listed = ", ".join(map(repr, missing))
    return Failure("RuntimeError", f"the full state dict lacks {listed}") if missing else None


def _too_many_devices(model: nn.Module) -> Failure | None:
    """Torch loads a full state dict into one device, besides meta."""
    found = {
        str(value.device)
        for _, value in upstream._iterate_valid_model_state(model)
        if isinstance(value, torch.Tensor) and value.dim() and not value.is_meta
    }
    if len(found) < 2:
        return None
    return Failure("ValueError", f"the model is on {', '.join(sorted(found))}, expected one device")


def _fsdp_domains(modules: Sequence[Any]) -> list[Domain]:
    """Each group over which FSDP gathers parameters."""
    groups = {
        module.process_group
        for module in modules
        if module._handle is not None and module._handle.uses_sharded_strategy
    }
    return sorted(map(group_domain, groups), key=lambda domain: domain.key)


def _is_frozen(value: Any) -> bool:
    return isinstance(value, nn.Parameter) and not value.requires_grad
