"""The tensors of a model by their own names, whatever wraps it: DDP, FSDP, compile, checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from shardproof._prove.reach import MODULE_OWN, attributes_of, reach

_UNNAMED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
WRAPPERS = (DistributedDataParallel, FullyShardedDataParallel)
"""What they hold beside the model is theirs, and partly a shadow of what C++ holds."""


@dataclass(frozen=True)
class FlatPiece:
    """One parameter's place in a flat parameter of FSDP1 on this rank."""

    handle: Any
    spec: Any
    """The DTensor spec of the parameter that was flattened; None of a plain one."""
    shape: tuple[int, ...]
    """Of the parameter on the ranks of one FSDP group."""
    offset: int
    """In the local shard of the flat parameter."""
    start: int
    """In the flattened parameter."""
    numel: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """This parameter's elements of a tensor that is laid out as the flat parameter."""
        return flat.view(-1)[self.offset : self.offset + self.numel]


class Modules:
    """A walk over a model, or over the parts of one that a rank of a pipeline has."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.models = models
        self.names: dict[int, list[str]] = {}
        """Of each module, by identity."""
        self.modules: list[tuple[str, nn.Module]] = []
        self.ddp: dict[int, Any] = {}
        """Modules below a DDP: that DDP."""
        for model in models:
            self._walk(model, "", frozenset(), None)
        self.flat = dict(self._flat_pieces())
        """(identity of the module, name of the parameter) -> its piece."""

    def reshard(self) -> None:
        """Have fully_shard's parameters in their sharded form, as every state dict asks for."""
        for _, module in self.modules:
            if isinstance(module, FSDPModule):
                module.reshard()

    def parameters(self) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
        """(full name, module, own name, parameter), tied ones under each name."""
        for prefix, module in self.modules:
            for key, param in module._parameters.items():
                if param is not None and key != "_flat_param":
                    yield prefix + key, module, key, param

    def flat_parameters(self) -> Iterator[tuple[str, FlatPiece]]:
        """(full name, piece) of each parameter that FSDP1 has in a flat one."""
        for (module, key), piece in self.flat.items():
            for prefix in self.names.get(module, []):
                yield prefix + key, piece

    def buffers(self) -> Iterator[tuple[str, nn.Module, torch.Tensor, bool]]:
        """(full name, module, buffer, whether state dicts have it)."""
        for prefix, module in self.modules:
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    yield (
                        prefix + key,
                        module,
                        buffer,
                        key not in module._non_persistent_buffers_set,
                    )

    def attributes(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(full name, tensor) of what is neither parameter nor buffer, however deep."""
        for name, found in self.reached():
            if isinstance(found, torch.Tensor):
                yield name, found

    def reached(self) -> Iterator[tuple[str, Any]]:
        """(full name, thing) of all that plain attributes lead to, but for what wrappers hold."""
        seen: set[int] = set()
        for prefix, module in self.modules:
            if isinstance(module, WRAPPERS):
                for state in _hook_states(module):
                    name = f"{prefix}{type(state).__name__}"
                    yield name, state
                    for key, value in attributes_of(state).items():
                        yield from reach(value, f"{name}.{key}", self.names.keys(), seen)
                continue
            for key, value in self.plain(module).items():
                yield from reach(value, prefix + key, self.names.keys(), seen)

    def plain(self, module: nn.Module) -> dict[str, Any]:
        """Attributes of a module that are neither every module's nor FSDP1's parameters."""
        return {
            key: value
            for key, value in vars(module).items()
            if key not in MODULE_OWN and (id(module), key) not in self.flat and key != "_flat_param"
        }

    def replicas(self, module: nn.Module) -> tuple[int, ...]:
        """The ranks on which DDP keeps what is below it; empty without one."""
        ddp = self.ddp.get(id(module))
        ranks = dist.get_process_group_ranks(ddp.process_group) if ddp is not None else ()
        return tuple(ranks)

    def extra_states(self) -> Iterator[tuple[str, nn.Module]]:
        """(key in the state dict, module) of those with a get_extra_state() of their own."""
        for prefix, module in self.modules:
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                yield f"{prefix}_extra_state", module

    def _walk(self, module: nn.Module, prefix: str, above: frozenset[int], ddp: Any) -> None:
        if id(module) in above:
            return
        if isinstance(module, DistributedDataParallel):
            ddp = module
        self.modules.append((prefix, module))
        self.names.setdefault(id(module), []).append(prefix)
        if ddp is not None:
            self.ddp[id(module)] = ddp
        for key, child in module._modules.items():
            if child is not None:
                unnamed = key in _UNNAMED or (
                    key == "module" and isinstance(module, DistributedDataParallel)
                )
                self._walk(
                    child, prefix if unnamed else f"{prefix}{key}.", above | {id(module)}, ddp
                )

    def _flat_pieces(self) -> Iterator[tuple[tuple[int, str], FlatPiece]]:
        seen = set()
        for _, module in self.modules:
            handle = getattr(module, "_handle", None)
            if not isinstance(module, FullyShardedDataParallel) or handle is None:
                continue
            if id(handle) in seen:
                continue
            seen.add(id(handle))
            flat = handle.flat_param
            pieces = []
            for info, shape, spec, (offset, start, numel) in zip(
                flat._param_infos,
                flat._shapes,
                flat._param_extensions,
                _shards(handle),
                strict=True,
            ):
                piece = FlatPiece(handle, spec, tuple(shape), offset, start, numel)
                pieces.append(((id(info.module), info.param_name), piece))
            yield from pieces
            named = dict(pieces)
            for shared in flat._shared_param_infos:
                prime = (id(shared.prim_module), shared.prim_param_name)
                if prime in named:
                    yield (id(shared.module), shared.param_name), named[prime]


def _hook_states(wrapper: nn.Module) -> list[Any]:
    """The states of its communication hooks; PowerSGD, say, keeps its errors in one."""
    own = vars(wrapper)
    states = [state for _, state in own.get("_comm_hooks", ())]  # DDP's
    if own.get("_comm_hook") is not None:  # FSDP1's
        states.append(own.get("_comm_hook_state"))
    return states


def local_shard(handle: Any) -> torch.Tensor:
    """This rank's part of a flat parameter of FSDP1, also while the whole is there."""
    flat = handle.flat_param
    if handle.uses_sharded_strategy and hasattr(flat, "_local_shard"):
        return flat._local_shard.detach()
    return flat.detach()


def _shards(handle: Any) -> Iterator[tuple[int, int, int]]:
    """(offset in the local shard, first element, how many) of each parameter."""
    flat = handle.flat_param
    if handle.uses_sharded_strategy:
        for info in flat._shard_param_infos:
            if info.in_shard:
                yield info.offset_in_shard, info.intra_param_start_idx, info.numel_in_shard
            else:
                yield 0, 0, 0
        return
    at = 0
    for numel, padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
        if not padding:
            yield at, 0, numel
        at += numel
