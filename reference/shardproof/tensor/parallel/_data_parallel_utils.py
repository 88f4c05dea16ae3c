"""The seam between a DTensor and the local tensor that data parallelism works on.

DDP and FSDP know plain tensors only. ``_flatten_tensor`` hands them the local part of a DTensor,
``_unflatten_tensor`` turns their plain result back into the DTensor that the model computes
with. Neither communicates; no rank has to wait for another.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from shardproof._state_dict_utils.layout import local_shape

__all__ = ["_flatten_tensor", "_unflatten_tensor", "sync_grad_hook"]


def sync_grad_hook(grad: Any, *, device_handle: Any = None, compute_stream: Any = None) -> Any:
    """Finish a pending gradient.

    Args:
        grad: what autograd hands to a tensor hook.
        device_handle: the device module that owns ``compute_stream``, for example ``torch.cuda``.
        compute_stream: the stream that has to wait; None waits on the current one.

    Returns:
        The plain, finished tensor of an ``AsyncCollectiveTensor``; anything else, None included,
        comes back as the same object.

    Local: any rank may call it alone.

    """
    if not isinstance(grad, AsyncCollectiveTensor):
        return grad
    if compute_stream is None:
        return grad.wait()
    with device_handle.stream(compute_stream):
        return grad.wait()


def _flatten_tensor(tensor: torch.Tensor) -> tuple[torch.Tensor, DTensorSpec | None]:
    """Split a DTensor into its local tensor and the spec that describes the whole.

    Args:
        tensor: a tensor of any shape and dtype.

    Returns:
        For a DTensor, a detached tensor over the storage of its local tensor and its spec. The
        tensor trains exactly where the DTensor does: frozen and integer ones stay as they are
        (pytorch#171523 is of the same family). Any other tensor comes back itself, with None.

    Local: no collective runs, and the input is not changed.

    """
    if not isinstance(tensor, DTensor):
        return tensor, None
    local = tensor._local_tensor
    if isinstance(local, AsyncCollectiveTensor):
        local = local.wait()
    return local.detach().requires_grad_(tensor.requires_grad), tensor._spec


def _unflatten_tensor(
    tensor: torch.Tensor,
    spec: DTensorSpec,
    *,
    device_handle: Any = None,
    compute_stream: Any = None,
) -> DTensor:
    """Build the DTensor that ``spec`` describes around this rank's local tensor.

    Args:
        tensor: the local tensor. Its dtype may differ from the spec's, since data parallelism
            may have cast it.
        spec: mesh, placements and global shape.
        device_handle: the device module that owns ``compute_stream``.
        compute_stream: the stream on which a gradient that is still in flight is waited for.

    Returns:
        A DTensor over the storage of ``tensor``. Its gradient reaches ``tensor`` as a plain,
        finished tensor.

    Raises:
        ValueError: ``tensor`` has not the shape that ``spec`` gives to this rank.

    Local: no collective runs in the forward. The backward communicates only if the gradient
    arrives in other placements than the spec's.

    """
    expected = local_shape(spec)
    if spec.mesh.get_coordinate() is not None and tuple(tensor.shape) != expected:
        raise ValueError(
            f"local tensor of shape {tuple(tensor.shape)} does not fit: the spec of global shape "
            f"{tuple(spec.shape)} with placements {spec.placements} on mesh shape "
            f"{tuple(spec.mesh.shape)} gives this rank {expected}"
        )
    source = tensor
    if tensor.requires_grad and torch.is_grad_enabled():
        # The hook sits on a view that dies with the graph: on `tensor` itself each forward would
        # leave one more hook behind.
        source = tensor.view_as(tensor)
        register: Any = source.register_hook
        register(
            partial(sync_grad_hook, device_handle=device_handle, compute_stream=compute_stream)
        )
    if torch.is_inference_mode_enabled():
        # There autograd detaches the new DTensor in place, which torch 2.11 has no rule for.
        with torch.inference_mode(False), torch.no_grad():
            result = _from_local(source, spec)
    else:
        result = _from_local(source, spec)
    order: Any = getattr(spec, "shard_order", None)
    if order != getattr(result._spec, "shard_order", None):
        result._spec = replace(result._spec, shard_order=order)
    return result


def _from_local(tensor: torch.Tensor, spec: DTensorSpec) -> DTensor:
    return DTensor.from_local(
        tensor,
        spec.mesh,
        spec.placements,
        run_check=False,
        shape=spec.shape,
        stride=spec.stride,
    )
