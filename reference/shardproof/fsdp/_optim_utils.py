"""The optimizer's state between FSDP1's flat parameters and the names of the model's.

FSDP1 over tensor parallelism flattens local tensors. What is known of the whole of each is its
extension: the spec of the DTensor.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.fsdp import ShardingStrategy, _optim_utils
from torch.distributed.fsdp._fsdp_extensions import _ext_chunk_dtensor, _ext_chunk_tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from shardproof._core.sharding.ranks import same_ranks
from shardproof._core.tensors.values import fresh_copy
from shardproof.tensor.parallel._data_parallel_utils import wrap_local
from shardproof.tensor.parallel._local_parameters import local_part
from shardproof.tensor.parallel._redistribution import move_by_dtensor

# Torch's own, whatever is installed: this module is imported before they are replaced.
_shard = _optim_utils._shard_orig_param_state
_gather_all = _optim_utils._gather_all_orig_param_state

State = dict[str, Any]


def _shard_orig_param_state(fsdp_param_info: Any, fqn: str, optim_state: State) -> State:
    """This rank's part of the state of one parameter (``use_orig_params``).

    Args:
        fsdp_param_info: of FSDP's instance that manages the parameter.
        fqn: the parameter's name.
        optim_state: its state: whole tensors, or DTensors.

    State of a parameter of tensor parallelism is first brought to the local tensor that FSDP has
    flattened, of which its offsets speak: a DTensor is gathered over FSDP's dimensions, a whole
    tensor is cut (SP-072).

    All ranks of the mesh have to call it with the same keys.

    """
    spec = _spec_of(fsdp_param_info, fqn)
    if spec is not None:
        extension = fsdp_param_info.state._fsdp_extension
        optim_state = {
            name: _local_of(value, spec, extension) for name, value in sorted(optim_state.items())
        }
    return dict(_shard(fsdp_param_info, fqn, optim_state))


def _unflatten_orig_param_states(
    fsdp_param_info: Any,
    output_states: dict[str, State],
    state_name: str,
    shard_state: bool,
    to_save: bool,
    cpu_offload: bool,
) -> None:
    """Give the gathered state of parameters their shapes (``use_orig_params``).

    Args:
        fsdp_param_info: of FSDP's instance that manages the parameters.
        output_states: by name, the state; the output. Views of the buffer that it was gathered in.
        state_name: which state.
        shard_state: make FSDP's chunks of it, else leave it whole.
        to_save: whether this rank keeps what it gets.
        cpu_offload: leave it in CPU memory.

    What tensor parallelism shards is chunked as the DTensor that it is, and a whole one is gathered
    by every rank, before those that do not save it leave (SP-073). All that comes out is in memory
    of its own: the next state is gathered into the same buffer (SP-083).

    All ranks of the mesh have to call it with the same keys.

    """
    state = fsdp_param_info.state
    shapes = fsdp_param_info.handle.flat_param._shapes
    for fqn, of_param in output_states.items():
        value = of_param[state_name]
        if not isinstance(value, DTensor):
            value = value.reshape(shapes[fsdp_param_info.param_indices[fqn]])
        if not shard_state:
            value = _whole(value)
        if not to_save:
            continue
        if shard_state:
            value = _chunk(value, state)
        device = torch.device("cpu") if cpu_offload else value.device
        if value.device != device:
            value = value.to(device)
        elif not shard_state:
            value = fresh_copy(value, device)
        of_param[state_name] = value


def _gather_all_orig_param_state(
    fsdp_param_info: Any,
    input_states: dict[str, State],
    shard_state: bool,
    to_save: bool,
    cpu_offload: bool,
) -> dict[str, State]:
    """The state of the parameters of one instance of FSDP, by name (``use_orig_params``).

    Args:
        fsdp_param_info: of the instance.
        input_states: by name, this rank's part.
        shard_state: give FSDP's chunks, else whole tensors.
        to_save: whether this rank keeps what it gets; else it gets nothing.
        cpu_offload: leave it in CPU memory.

    Where FSDP shards nothing, what tensor parallelism shards is a DTensor of tensor parallelism, or
    whole: torch gives this rank's part for the whole (as SP-069 under DDP).

    All ranks of the mesh have to call it with the same keys.

    """
    found: dict[str, State] = _gather_all(
        fsdp_param_info, input_states, shard_state, to_save, cpu_offload
    )
    if not _is_unsharded(fsdp_param_info.state):
        return found
    found = {}
    for fqn, of_param in input_states.items():
        found[fqn] = dict(of_param)
        if (spec := _spec_of(fsdp_param_info, fqn)) is None:
            continue
        shape = fsdp_param_info.handle.flat_param._shapes[fsdp_param_info.param_indices[fqn]]
        for name, value in sorted(of_param.items()):
            if isinstance(value, torch.Tensor) and value.dim() and value.shape == shape:
                whole = wrap_local(value.detach(), spec)
                found[fqn][name] = whole if shard_state else _whole(whole)
    return found if to_save else {}


def _broadcast_processed_state(
    fsdp_state: Any,  # noqa: ARG001
    optim_state: State,
    group: dist.ProcessGroup | None,
) -> State:
    """What there is to broadcast: the state, with its shape and dtype for a tensor with dimensions.

    Args:
        fsdp_state: not used.
        optim_state: of the first rank of the group, which keeps it as it is.
        group: the ranks that load it. It need not have global rank 0: that of FSDP has not, where
            tensor parallelism leaves it to the ranks of another column.

    """
    source = dist.get_rank(group) == 0
    told = [_described(optim_state) if source else None]
    dist.broadcast_object_list(told, group=group, group_src=0)
    return optim_state if source else cast("State", told[0])


def _broadcast_state(fsdp_state: Any, state: Any, group: dist.ProcessGroup | None) -> Any:
    """A value of the first rank of the group, on each of its ranks.

    Args:
        fsdp_state: says on which device.
        state: the value there, elsewhere what :func:`_broadcast_processed_state` said of it.
        group: the ranks that load it.

    """
    device = fsdp_state.compute_device
    if isinstance(state, _optim_utils._PosDimTensorInfo):
        state = torch.zeros(state.shape, dtype=state.dtype, device=device)
    elif not isinstance(state, torch.Tensor) or not state.dim():
        return state
    state = state.to(device)
    dist.broadcast(state, group=group, group_src=0)
    return state


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.dim():
            return _optim_utils._PosDimTensorInfo(value.shape, value.dtype)
        return value.cpu()
    if isinstance(value, dict):
        return {key: _described(one) for key, one in value.items()}
    return value


def _is_unsharded(state: Any) -> bool:
    return state.world_size == 1 or state.sharding_strategy == ShardingStrategy.NO_SHARD


def _spec_of(fsdp_param_info: Any, fqn: str) -> DTensorSpec | None:
    """Of which DTensor the parameter is a part; None if of none."""
    extensions = fsdp_param_info.handle.flat_param._param_extensions
    extension = extensions[fsdp_param_info.param_indices[fqn]]
    return extension if isinstance(extension, DTensorSpec) else None


def _local_of(value: Any, spec: DTensorSpec, extension: Any) -> Any:
    """The local tensor of tensor parallelism, of a state that may be larger or smaller."""
    if not isinstance(value, torch.Tensor) or not value.dim() or value.shape != spec.shape:
        return value
    if isinstance(value, DTensor):
        mesh = value.device_mesh
        if mesh.ndim > 1 and not same_ranks(mesh, spec.mesh):
            if tuple(spec.placements) == (value.placements[-1],):
                return extension.all_gather_dtensor(value, mesh)
            value = move_by_dtensor(value, lambda v: v.full_tensor())
    return local_part(value, spec)


def _whole(value: torch.Tensor) -> torch.Tensor:
    if isinstance(value, DTensor):
        return move_by_dtensor(value, lambda v: v.full_tensor())
    return value


def _chunk(value: torch.Tensor, state: Any) -> torch.Tensor:
    extension = state._fsdp_extension
    if getattr(state._optim_state_dict_config, "_use_dtensor", False):
        return _ext_chunk_dtensor(value, state.rank, state._device_mesh, extension)
    devices = state._device_handle.device_count()
    return _ext_chunk_tensor(
        value, state.rank, state.world_size, devices, state.process_group, extension
    )
