"""What FSDP1 flattens, and the gradients that it shows: methods of ``FlatParamHandle``."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp._flat_param import FlatParamHandle
from torch.distributed.tensor import DTensor
from torch.torch_version import TorchVersion

Method = Callable[..., Any]

# Torch's own, whatever is installed: this module is imported before they are replaced.
_to_cpu: Method = vars(FlatParamHandle)["to_cpu"]
_use_grad_views: Method = vars(FlatParamHandle)["_use_unsharded_grad_views"]
_use_views: Method = vars(FlatParamHandle)["_use_unsharded_views"]
_init_flat_param: Method = vars(FlatParamHandle)["_init_flat_param_and_metadata"]


@contextlib.contextmanager
def to_cpu(self: Any) -> Iterator[None]:
    """Have the unsharded flat parameter in CPU memory for the time of a block.

    Where it is there already it stays: torch frees it, for it takes the parameter for its copy
    (SP-070).
    """
    if self.flat_param.device.type == "cpu":
        yield
        return
    with _to_cpu(self):
        yield


def _use_unsharded_views(self: Any, as_params: bool) -> None:
    """Put views of the unsharded flat parameter into the places of the parameters.

    Args:
        self: the handle.
        as_params: as Parameters, and not as tensors of a graph.

    The second place of a tied DTensor gets the Parameter of the first: torch would make it the data
    of a plain one.

    """
    flat = self.flat_param
    infos, shared = flat._shared_param_infos, flat._shared_params
    if not (as_params and self._use_orig_params and infos):
        _use_views(self, as_params)
        return
    of = {(m, n): e for (n, m, _), e in zip(flat._param_infos, flat._param_extensions, strict=True)}
    pairs = list(zip(infos, shared, strict=True))
    plain = [pair for pair in pairs if of[pair[0].prim_module, pair[0].prim_param_name] is None]
    flat._shared_param_infos = tuple(info for info, _ in plain)
    flat._shared_params = [param for _, param in plain]
    try:
        _use_views(self, as_params)
    finally:
        flat._shared_param_infos, flat._shared_params = infos, shared
    for info in infos:
        first = getattr(info.prim_module, info.prim_param_name)
        if isinstance(first, DTensor):
            self._setattr_param(info.module, info.param_name, first)


def _use_unsharded_grad_views(self: Any) -> None:
    """Show each parameter's part of the unsharded gradient as its gradient.

    That of a plain Parameter, which FSDP holds for a DTensor, is plain (SP-079).
    """
    flat = self.flat_param
    extensions = flat._param_extensions
    flat._param_extensions = tuple(
        extension if isinstance(getattr(module, name, None), DTensor) else None
        for extension, (name, module, _) in zip(extensions, flat._param_infos, strict=True)
    )
    try:
        _use_grad_views(self)
    finally:
        flat._param_extensions = extensions


def _init_flat_param_and_metadata(
    self: Any, params: list[Any], module: nn.Module, aligned_numel: int, use_orig_params: bool
) -> None:
    """Flatten the parameters of a module, tied ones once.

    Args:
        self: the handle.
        params: the parameters.
        module: what holds them, itself or below.
        aligned_numel: to how many elements each is padded.
        use_orig_params: whether the module keeps Parameters over the parts.

    Torch looks for ties under the parameter, and notes them under the local tensor that it flattens
    for a DTensor. So a tied DTensor gives its places to that tensor first (SP-081).

    """
    extension = self._fsdp_extension
    tied = _tied_dtensors(params, module) if extension is not None else {}
    if not tied:
        _init_flat_param(self, params, module, aligned_numel, use_orig_params)
        return
    local = {param: extension.pre_flatten_transform(param) for param in tied}
    for param, places in tied.items():
        for owner, name in places:
            owner._parameters[name] = local[param][0]
    params[:] = [local[param][0] if param in local else param for param in params]
    self._fsdp_extension = _WithLocalized(extension, dict(local.values()))
    try:
        _init_flat_param(self, params, module, aligned_numel, use_orig_params)
    finally:
        self._fsdp_extension = extension


def _tied_dtensors(
    params: list[Any], module: nn.Module
) -> dict[DTensor, list[tuple[nn.Module, str]]]:
    """The DTensors that FSDP would meet several times, with their places."""
    wanted = {param for param in params if isinstance(param, DTensor)}
    met: Counter[DTensor] = Counter()
    places: dict[DTensor, dict[tuple[nn.Module, str], None]] = {}
    for _, owner in module.named_modules(remove_duplicate=False):
        for name, param in owner._parameters.items():
            if isinstance(param, DTensor) and param in wanted:
                met[param] += 1
                places.setdefault(param, {})[owner, name] = None
    return {param: list(found) for param, found in places.items() if met[param] > 1}


class _WithLocalized:
    """FSDP's extension, which also knows local tensors that it has made before."""

    def __init__(self, extension: Any, made: dict[torch.Tensor, Any]) -> None:
        self._extension, self._made = extension, made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._extension, name)

    def pre_flatten_transform(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        if tensor in self._made:
            return tensor, self._made[tensor]
        found: tuple[torch.Tensor, Any] = self._extension.pre_flatten_transform(tensor)
        return found


METHODS: dict[type, dict[str, Method]] = {
    FlatParamHandle: {
        "_use_unsharded_views": _use_unsharded_views,
        "_use_unsharded_grad_views": _use_unsharded_grad_views,
        "_init_flat_param_and_metadata": _init_flat_param_and_metadata,
        # Later ones do as this one does.
        **({"to_cpu": to_cpu} if TorchVersion(torch.__version__) < "2.14" else {}),
    }
}
