"""The twin of ``torch.distributed._state_dict_utils``: state dicts between sharded and whole."""

from shardproof._state_dict_utils.copying import (
    _check_state_dict_similarity,
    _copy_state_dict,
    _offload_state_dict_to_cpu,
)
from shardproof._state_dict_utils.flatten import (
    CONTAINER_TYPE,
    FLATTEN_MAPPING,
    OBJ_PATH,
    PATH_ITEM,
    STATE_DICT_TYPE,
    _flatten_state_dict,
    _set_element,
    _traverse_state_dict,
    _unflatten_state_dict,
)
from shardproof._state_dict_utils.staging import _create_cpu_state_dict
from shardproof._state_dict_utils.traverse import (
    CompanionMismatch,
    _identity_func,
    _iterate_state_dict,
)

__all__ = [
    "CONTAINER_TYPE",
    "FLATTEN_MAPPING",
    "OBJ_PATH",
    "PATH_ITEM",
    "STATE_DICT_TYPE",
    "CompanionMismatch",
    "_check_state_dict_similarity",
    "_copy_state_dict",
    "_create_cpu_state_dict",
    "_flatten_state_dict",
    "_identity_func",
    "_iterate_state_dict",
    "_offload_state_dict_to_cpu",
    "_set_element",
    "_traverse_state_dict",
    "_unflatten_state_dict",
]
