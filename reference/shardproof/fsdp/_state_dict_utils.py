"""What FSDP1's hooks do with the model's state dict."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import _state_dict_utils as upstream
from torch.distributed.fsdp._common_utils import FSDP_PREFIX, _has_fsdp_params, _is_composable
from torch.distributed.fsdp._fsdp_extensions import _ext_post_unflatten_transform
from torch.distributed.tensor import DTensor

# Torch's own, whatever is installed: this module is imported before it is replaced.
_pre_load = upstream._sharded_pre_load_state_dict_hook


def _sharded_pre_load_state_dict_hook(
    module: nn.Module, fsdp_state: Any, state_dict: dict[str, Any], prefix: str
) -> None:
    """Gather what is loaded, and unshard the parameters for it.

    Args:
        module: with its own instance of FSDP.
        fsdp_state: of that.
        state_dict: what is loaded; the output.
        prefix: of the module's names there.

    The second name of a tied DTensor gets a DTensor, too: torch looks for its extension under the
    names that it flattens, which are the first ones.

    """
    _pre_load(module, fsdp_state, state_dict, prefix)
    if not _has_fsdp_params(fsdp_state, module):
        return
    if not _is_composable(fsdp_state):
        prefix += FSDP_PREFIX
    flat = fsdp_state._handle.flat_param
    extensions = {
        (owner, name): extension
        for (name, owner, _), extension in zip(
            flat._param_infos, flat._param_extensions, strict=True
        )
    }
    names = upstream._shared_param_name_infos(module, fsdp_state)
    for (name, _, _), info in zip(names, flat._shared_param_infos, strict=True):
        extension = extensions[info.prim_module, info.prim_param_name]
        value = state_dict.get(prefix + name)
        if value is not None and not isinstance(value, DTensor):
            state_dict[prefix + name] = _ext_post_unflatten_transform(
                value, extension, fsdp_state._fsdp_extension
            )
