"""The twin of ``torch.distributed._state_dict_utils``: state dicts between sharded and whole.

A module for each family of functions; what they are made of is in :mod:`shardproof._core`.

- ``iterate``: a state dict rebuilt with one function applied to each kind of tensor.
- ``flatten``: from a nested state dict to a flat one with dotted keys, and back.
- ``copying``: snapshots, copies into another state dict, and comparison, on one rank.
- ``staging``: CPU buffers with the structure of a state dict.
- ``gather``: from a sharded state dict to a whole one.
- ``distribute``: from full tensors that every rank holds to each rank's shards.
- ``broadcast``: from one rank's full state dict to every rank's local one.
"""

from shardproof._core.containers.typed_paths import (
    CONTAINER_TYPE,
    FLATTEN_MAPPING,
    OBJ_PATH,
    PATH_ITEM,
    STATE_DICT_TYPE,
)
from shardproof._core.containers.walk import CompanionMismatch
from shardproof._state_dict_utils.broadcast import (
    _broadcast_state_dict,
    _broadcast_tensors,
    _TensorInfo,
)
from shardproof._state_dict_utils.copying import (
    _check_state_dict_similarity,
    _copy_state_dict,
    _offload_state_dict_to_cpu,
)
from shardproof._state_dict_utils.distribute import _distribute_state_dict, _distribute_tensors
from shardproof._state_dict_utils.flatten import (
    _flatten_state_dict,
    _set_element,
    _traverse_state_dict,
    _unflatten_state_dict,
)
from shardproof._state_dict_utils.gather import _all_gather_sharded_tensor, _gather_state_dict
from shardproof._state_dict_utils.iterate import _identity_func, _iterate_state_dict
from shardproof._state_dict_utils.staging import _create_cpu_state_dict

__all__ = [
    "CONTAINER_TYPE",
    "FLATTEN_MAPPING",
    "OBJ_PATH",
    "PATH_ITEM",
    "STATE_DICT_TYPE",
    "CompanionMismatch",
    "_TensorInfo",
    "_all_gather_sharded_tensor",
    "_broadcast_state_dict",
    "_broadcast_tensors",
    "_check_state_dict_similarity",
    "_copy_state_dict",
    "_create_cpu_state_dict",
    "_distribute_state_dict",
    "_distribute_tensors",
    "_flatten_state_dict",
    "_gather_state_dict",
    "_identity_func",
    "_iterate_state_dict",
    "_offload_state_dict_to_cpu",
    "_set_element",
    "_traverse_state_dict",
    "_unflatten_state_dict",
]
