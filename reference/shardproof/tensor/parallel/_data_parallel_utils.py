"""The seam between a DTensor and the local tensor that data parallelism works on.

DDP and FSDP know plain tensors only. ``_flatten_tensor`` hands them the local part of a DTensor,
``_unflatten_tensor`` turns their plain result back into the DTensor that the model computes
with. Neither communicates; no rank has to wait for another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._C._functorch import unwrap_if_dead
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from shardproof._core.sharding.blocks import has_other_order, local_shape, may_be_local_shape
from shardproof._core.sharding.dtensors import build_dtensor, spec_with_dtype
from shardproof._core.sharding.ranks import my_coordinate
from shardproof._core.tensors.subclasses import PLAIN, unwrap_pending
from shardproof.tensor.parallel._subclasses import alias

__all__ = ["_flatten_tensor", "_unflatten_tensor", "sync_grad_hook"]


def sync_grad_hook(grad: Any, *, device_handle: Any = None, compute_stream: Any = None) -> Any:
    """Finish a pending gradient.

    Args:
        grad: what autograd hands to a tensor hook.
        device_handle: the device module that owns ``compute_stream``, for example ``torch.cuda``.
        compute_stream: the stream that has to wait; None waits on the current one.

    Returns:
        The plain, finished tensor of an ``AsyncCollectiveTensor``; anything else, None included,
        comes back as the same object; what a wrapper holds that is pending is finished in it.

    Local: any rank may call it alone.

    """
    if type(grad) in PLAIN or not isinstance(grad, torch.Tensor):
        return grad
    if compute_stream is None:
        return unwrap_pending(grad)
    with device_handle.stream(compute_stream):
        return unwrap_pending(grad)


def _flatten_tensor(tensor: torch.Tensor) -> tuple[torch.Tensor, DTensorSpec | None]:
    """Split a DTensor into its local tensor and the spec that describes the whole.

    Args:
        tensor: a tensor of any shape and dtype.

    Returns:
        For a DTensor, a detached tensor over the storage of its local tensor and its spec. The
        tensor trains exactly where the DTensor does: frozen and integer ones stay as they are
        (pytorch#171523 is of the same family). Where neither trains it may be the local tensor
        itself. Any other tensor comes back itself, with None.

    Local: no collective runs, and the input is not changed.

    """
    if isinstance(tensor, DTensor):
        local = tensor._local_tensor
        if type(local) is not torch.Tensor:
            local = unwrap_pending(local)
            if local.requires_grad or tensor.requires_grad:
                local = alias(local)
        elif local.requires_grad or tensor.requires_grad:
            local = local.detach()
        return local.requires_grad_() if tensor.requires_grad else local, tensor._spec
    return tensor, None


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
    arrives in other placements than the spec's. Compiled code is traced through it, without a
    break: there gradients are finished by the graph, and shapes are not looked at. It breaks where
    the spec has mesh dimensions apply in another order than the mesh's.

    """
    if torch.compiler.is_compiling():
        if has_other_order(spec):  # from_local() knows no order
            return _unflatten_outside_graphs(tensor, spec, device_handle, compute_stream)
        return DTensor.from_local(
            tensor,
            spec.mesh,
            spec.placements,
            run_check=False,
            shape=spec.shape,
            stride=spec.stride,
        )
    return unflatten_eagerly(tensor, spec, device_handle, compute_stream)


def unflatten_eagerly(
    tensor: torch.Tensor, spec: DTensorSpec, device_handle: Any = None, compute_stream: Any = None
) -> DTensor:
    """As :func:`_unflatten_tensor`, for callers that the compiler does not look into either."""
    expected = local_shape(spec)
    if tensor.shape != expected and not may_be_local_shape(spec, tensor.shape):
        if my_coordinate(spec.mesh) is not None:
            raise ValueError(
                f"local tensor of shape {tuple(tensor.shape)} does not fit: the spec of global "
                f"shape {tuple(spec.shape)} with placements {spec.placements} on mesh shape "
                f"{tuple(spec.mesh.shape)} gives this rank {expected}"
            )
        tensor = tensor.new_empty(expected, requires_grad=tensor.requires_grad)
    return wrap_local(tensor, spec, device_handle, compute_stream)


_unflatten_outside_graphs = torch._compile._disable_dynamo(unflatten_eagerly)


def wrap_local(
    tensor: torch.Tensor, spec: DTensorSpec, device_handle: Any = None, compute_stream: Any = None
) -> DTensor:
    """As :func:`unflatten_eagerly`, for a tensor that is known to have the local shape."""
    if not (tensor.requires_grad and torch.is_grad_enabled()):
        return _wrap_detached(tensor, spec)
    finish: Callable[[Any], Any] = sync_grad_hook
    if compute_stream is not None:
        finish = partial(sync_grad_hook, device_handle=device_handle, compute_stream=compute_stream)
    apply: Callable[..., DTensor] = _Unflatten.apply
    if not torch._C._are_functorch_transforms_active():
        # What Function.apply does then, for the one argument that is a tensor: it looks at each
        # in Python, which takes a tenth of what a reconstruction does.
        apply, tensor = super(torch.autograd.Function, _Unflatten).apply, unwrap_if_dead(tensor)
    return apply(tensor, spec, finish)


def _wrap_detached(local: torch.Tensor, spec: DTensorSpec) -> DTensor:
    spec = spec_with_dtype(spec, local.dtype)
    if type(local) in PLAIN:
        return build_dtensor(local.detach(), spec)
    local = alias(local)
    # A type that can be viewed but not detached goes on to say that it trains.
    made = DTensor(local, spec, requires_grad=local.requires_grad)
    if made.requires_grad:
        made.requires_grad_(False)
    return made


class _Unflatten(torch.autograd.Function):
    """As ``DTensor.from_local``, around a spec that is there already, and with a finished gradient.

    Making a spec from placements is most of what ``from_local`` costs.
    """

    @staticmethod
    def forward(
        ctx: Any, local: torch.Tensor, spec: DTensorSpec, finish: Callable[[Any], Any]
    ) -> DTensor:
        ctx.spec, ctx.finish = spec, finish
        ctx.set_materialize_grads(False)
        return _wrap_detached(local, spec)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None, None]:
        (grad,) = grads
        if grad is None:
            return None, None, None
        placements = tuple(Replicate() if p.is_partial() else p for p in ctx.spec.placements)
        if grad.placements != placements:
            grad = grad.redistribute(placements=placements)
        return ctx.finish(grad.to_local()), None, None
