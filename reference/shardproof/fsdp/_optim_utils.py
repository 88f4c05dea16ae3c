"""The optimizer's state between FSDP1's flat parameters and the names of the model's.

FSDP1 over tensor parallelism flattens local tensors. What is known of the whole of each is its
extension: the spec of the DTensor.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import _optim_utils
from torch.distributed.fsdp._fsdp_extensions import _ext_chunk_dtensor, _ext_chunk_tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from shardproof._core.sharding.ranks import same_ranks
from shardproof._core.tensors.values import fresh_copy
from shardproof.tensor.parallel._local_parameters import local_part
from shardproof.tensor.parallel._redistribution import move_by_dtensor

# Torch's own, whatever is installed: this module is imported before they are replaced.
_shard = _optim_utils._shard_orig_param_state
_flatten = _optim_utils._flatten_optim_state
_unflatten = _optim_utils._unflatten_optim_state
_map_keys = _optim_utils._map_param_key_to_optim_keys

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
    return dict(_shard(fsdp_param_info, fqn, _local_state(fsdp_param_info, fqn, optim_state)))


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


def _unflatten_optim_state(
    fsdp_param_info: Any,
    flat_param_state: State,
    to_save: bool,
    shard_state: bool,
    cpu_offload: bool,
) -> list[State]:
    """The state of a flat parameter, as that of the parameters in it (no ``use_orig_params``).

    Args:
        fsdp_param_info: of FSDP's instance that manages them.
        flat_param_state: this rank's part.
        to_save: whether this rank keeps what it gets; else it gets nothing.
        shard_state: make FSDP's chunks of it, else leave it whole.
        cpu_offload: leave it in CPU memory.

    As :func:`_unflatten_orig_param_states`.

    """
    if shard_state or not any(fsdp_param_info.handle.flat_param._param_extensions):
        return _unflatten(fsdp_param_info, flat_param_state, to_save, shard_state, cpu_offload)
    found = _unflatten(fsdp_param_info, flat_param_state, True, False, False)
    for of_param in found:
        for name, value in of_param.items():
            if isinstance(value, DTensor):
                value = _whole(value)
                of_param[name] = value.cpu() if cpu_offload else value
    return found if to_save else []


def _flatten_optim_state(
    fsdp_param_info: Any, unflat_osd_state: dict[str, State], unflat_param_names: list[str]
) -> State:
    """This rank's part of the state of a flat parameter (no ``use_orig_params``).

    Args:
        fsdp_param_info: of FSDP's instance that manages it.
        unflat_osd_state: by name, the state: whole tensors, or DTensors.
        unflat_param_names: the names of the parameters in it.

    As :func:`_shard_orig_param_state`.

    """
    local = {
        fqn: _local_state(fsdp_param_info, fqn, unflat_osd_state[fqn])
        for fqn in unflat_param_names
        if fqn in unflat_osd_state
    }
    return dict(_flatten(fsdp_param_info, local, unflat_param_names))


def _map_param_key_to_optim_keys(
    optim_state_dict: State,
    group: dist.ProcessGroup | None,
    param_key_to_param: dict[int | str, nn.Parameter],
    param_to_fqns: dict[nn.Parameter, list[str]],
    fqn_to_fsdp_param_info: dict[str, Any],
    merge_keys: bool = False,
) -> Any:
    """Which state there is, the same on all ranks of the group, and where on this one.

    Args:
        optim_state_dict: of the optimizer.
        group: the ranks that gather it.
        param_key_to_param: the optimizer's parameters.
        param_to_fqns: their names.
        fqn_to_fsdp_param_info: FSDP's instances.
        merge_keys: ask all ranks, not the first.

    All are asked in a group without global rank 0, too: torch would ask rank 0.

    """
    merge_keys = merge_keys or (group is not None and dist.get_global_rank(group, 0) != 0)
    return _map_keys(
        optim_state_dict,
        group,
        param_key_to_param,
        param_to_fqns,
        fqn_to_fsdp_param_info,
        merge_keys,
    )


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


def _local_state(fsdp_param_info: Any, fqn: str, state: State) -> State:
    """The state as it belongs to the local tensor that FSDP has flattened."""
    extensions = fsdp_param_info.handle.flat_param._param_extensions
    spec = extensions[fsdp_param_info.param_indices[fqn]]  # of which DTensor it is a part
    if not isinstance(spec, DTensorSpec):
        return state
    extension = fsdp_param_info.state._fsdp_extension
    return {name: _local_of(value, spec, extension) for name, value in sorted(state.items())}


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
