"""DTensors around local tensors, built from a spec that is there already. No collective runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from shardproof._core.sharding.blocks import local_shape, may_be_local_shape

FSDP_FLATTENED = "_fsdp_flattened"
"""The mark that FSDP1 puts on what it has flattened, ``torch.distributed.fsdp._common_utils``."""

STANDS_FOR = "_st_info"
"""Where a local Parameter keeps the spec of the DTensor that it stands for."""


def build_dtensor(local: torch.Tensor, spec: DTensorSpec) -> DTensor:
    """The DTensor of ``spec`` around a local tensor, without ``requires_grad``.

    ``DTensor.__init__`` does nothing, behind a guard against Dynamo that costs more than making
    the tensor does; so it is left out.
    """
    make: Callable[..., DTensor] = DTensor.__new__
    return make(DTensor, local, spec, requires_grad=False)


def with_local(like: DTensor, local: torch.Tensor, dtype: torch.dtype | None = None) -> DTensor:
    """The DTensor of ``like``'s spec around another local tensor. No collective runs."""
    return build_dtensor(local, like._spec if dtype is None else spec_with_dtype(like._spec, dtype))


def spec_with_dtype(spec: DTensorSpec, dtype: torch.dtype) -> DTensorSpec:
    """``spec``, or a copy of it where it says another dtype."""
    meta = spec.tensor_meta
    if meta is None or meta.dtype == dtype:
        return spec
    spec = copy.copy(spec)
    spec.tensor_meta = meta._replace(dtype=dtype)
    spec._hash = None
    return spec


def represented_dtensor(value: Any) -> Any:
    """The DTensor that a local Parameter of tensor parallelism stands in for; else the value.

    ``torch.distributed.checkpoint.state_dict`` hands the parameters of a module to the load
    functions as they are, so the mark on the Parameter is all that tells its global shape. A piece
    of FSDP1's flat parameter stands for a DTensor whose local tensor is nowhere: on meta.
    """
    spec = getattr(value, STANDS_FOR, None)
    if not isinstance(spec, DTensorSpec) or not isinstance(value, torch.Tensor):
        return value
    if isinstance(value, DTensor):
        return value
    local = value.detach()
    if getattr(value, FSDP_FLATTENED, False):
        local = torch.empty(local_shape(spec), dtype=value.dtype, device="meta")
    elif not may_be_local_shape(spec, value.shape):
        return value
    return build_dtensor(local, spec)
