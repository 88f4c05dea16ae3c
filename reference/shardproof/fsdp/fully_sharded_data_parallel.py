"""The norm of all gradients under FSDP1: a method of ``FullyShardedDataParallel``."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _lazy_init
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

# Torch's own, whatever is installed: this module is imported before it is replaced.
_clip: Any = vars(FullyShardedDataParallel)["clip_grad_norm_"]

Groups = tuple[dist.ProcessGroup, ...]


class _Piece(NamedTuple):
    """What this rank holds of one parameter's gradient; None where it holds nothing."""

    grad: torch.Tensor | None
    sharded_by_fsdp: Groups
    sharded_by_tp: Groups


@torch.no_grad()
def clip_grad_norm_(self: Any, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
    """Scale all gradients by one factor, so that their norm is ``max_norm`` at most.

    Args:
        self: the root instance of FSDP.
        max_norm: the norm that is allowed.
        norm_type: of the p-norm, ``inf`` for the largest absolute value.

    Returns:
        The norm of all gradients before, the same on every rank.

    The norm is over all shards: FSDP's, and, of the parameters that it shards, those of tensor
    parallelism (SP-080). It is computed in float32, or in float64 where a parameter is. Without
    tensor parallelism this is torch's own.

    All ranks of the mesh have to call it. Collectives: one over each group of FSDP, and one over
    each group of tensor parallelism.

    """
    _lazy_init(self, self)
    pieces = list(_pieces(self)) if self._is_root else []
    if not any(piece.sharded_by_tp for piece in pieces):
        found: torch.Tensor = _clip(self, max_norm, norm_type)
        return found
    dtypes = [param.dtype for param in self.parameters() if param.is_floating_point()]
    kind = functools.reduce(torch.promote_types, dtypes, torch.float32)
    total = _total_norm(pieces, float(norm_type), kind, self.compute_device)
    if self.cpu_offload.offload_params:
        total = total.cpu()
    factor = torch.clamp(float(max_norm) / (total + 1e-6), max=1.0)
    grads = {id(piece.grad): piece.grad for piece in pieces if piece.grad is not None}
    for grad in grads.values():
        grad.mul_(factor.to(grad.device, grad.dtype))
    return total.to(functools.reduce(torch.promote_types, dtypes))


def _total_norm(
    pieces: list[_Piece], p: float, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    largest = p == math.inf
    reduce = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
    sums: dict[Groups, dict[Groups, torch.Tensor]] = {}
    for grad, by_fsdp, by_tp in pieces:
        of_tp = sums.setdefault(by_fsdp, {})
        found = of_tp.setdefault(by_tp, torch.zeros((), dtype=dtype, device=device))
        if grad is not None and grad.numel():
            norm = torch.linalg.vector_norm(grad, p, dtype=dtype).to(device)
            of_tp[by_tp] = torch.maximum(found, norm) if largest else found + norm**p
    folded: dict[Groups, torch.Tensor] = {}
    for by_fsdp, of_tp in sums.items():
        row = torch.stack(list(of_tp.values()))
        for group in by_fsdp:
            dist.all_reduce(row, op=reduce, group=group)
        for by_tp, found in zip(of_tp, row, strict=True):
            before = folded.get(by_tp, torch.zeros_like(found))
            folded[by_tp] = torch.maximum(before, found) if largest else before + found
    for by_tp, found in folded.items():
        for group in by_tp:
            dist.all_reduce(found, op=reduce, group=group)
    row = torch.stack(list(folded.values()))
    return row.max() if largest else row.sum() ** (1.0 / p)


def _pieces(fsdp: Any) -> Iterator[_Piece]:
    """Each parameter's gradient on this rank, in an order that all ranks have."""
    managed: set[int] = set()
    for handle in fsdp._all_handles:
        flat = handle.flat_param
        managed.add(id(flat))
        managed.update(map(id, (*(flat._params or ()), *(flat._shared_params or ()))))
        by_fsdp = (handle.process_group,) if handle.uses_sharded_strategy else ()
        for grad, extension in zip(_grads(handle), flat._param_extensions, strict=True):
            yield _Piece(grad, by_fsdp, _tp_groups(extension))
    for param in fsdp.parameters():
        if id(param) not in managed:
            grad = param.grad
            spec = param._spec if isinstance(param, DTensor) else None
            yield _Piece(
                grad._local_tensor if isinstance(grad, DTensor) else grad, (), _tp_groups(spec)
            )


def _grads(handle: Any) -> list[torch.Tensor | None]:
    """What this rank holds of the gradients of one flat parameter, by parameter."""
    flat = handle.flat_param
    if handle._use_orig_params:
        grads = [param.grad for param in flat._params]
        return [grad._local_tensor if isinstance(grad, DTensor) else grad for grad in grads]
    if flat.grad is None:
        return [None for _ in flat._numels]
    if not handle.uses_sharded_strategy:
        return list(torch.split(flat.grad, flat._numels))
    return [
        flat.grad.narrow(0, info.offset_in_shard, info.numel_in_shard) if info.in_shard else None
        for info in flat._shard_param_infos
    ]


def _tp_groups(spec: Any) -> Groups:
    """The groups over which tensor parallelism shards."""
    if not isinstance(spec, DTensorSpec):
        return ()
    return tuple(
        spec.mesh.get_group(dim)
        for dim, placement in enumerate(spec.placements)
        if not placement.is_replicate() and spec.mesh.size(dim) > 1
    )


METHODS = {FullyShardedDataParallel: {"clip_grad_norm_": clip_grad_norm_}}
