"""From FSDP's chunks, DTensors over the root mesh, back to the local tensors of tensor parallelism.

Gathering moves bytes, in one collective wherever FSDP's group has them all.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Partial, Placement, Replicate

from shardproof._core.comms.collectives import all_gather, collect
from shardproof._core.sharding.blocks import cuts_of, local_shape, spec_block
from shardproof._core.sharding.domain import Domain, Stage, mesh_domain
from shardproof._core.sharding.ranks import my_coordinate
from shardproof._core.sharding.simulated_ranks import plays_all_ranks
from shardproof._core.tensors.properties import is_ordinary
from shardproof._core.tensors.subclasses import copy_by_class, has_own_operations, unwrap_pending
from shardproof._core.tensors.values import allocate, as_carrier, carrier_dtype, fresh_copy
from shardproof.tensor.parallel._redistribution import move_by_dtensor
from shardproof.tensor.parallel.fsdp.gather_routes import Route, route_of
from shardproof.tensor.parallel.fsdp.root_mesh import mesh_name

__all__ = ["_all_gather_dtensor"]

# Each rank first sends its verdict: what it says of the whole if its local tensor is what the
# others expect, its type where only the type's own operations move it, and its shape. A multiple of
# the widest element, so that the bytes behind it are aligned. A small chunk travels along; the
# message is as long on every rank, whatever its tensor: Gloo ends the process where lengths differ.
_HEADER_DIMS = 7
_HEADER_BYTES = 8 * (3 + _HEADER_DIMS)
_FIRST_BYTES = _HEADER_BYTES + 8192
_WORD = 8
_SENT_AS_BYTES = 255


@torch.no_grad()
def _all_gather_dtensor(tensor: DTensor, parent_mesh: DeviceMesh | None) -> torch.Tensor:
    """What tensor parallelism holds on this rank, from a DTensor over the root mesh.

    Args:
        tensor: of any shape, dtype and placements, as :func:`_chunk_dtensor` makes it or as it
            was loaded. It is not changed.
        parent_mesh: the root mesh, whose last dimension is that of tensor parallelism.

    Returns:
        The finished local tensor of the DTensor that is ``Replicate`` in all dimensions but the
        last and placed as ``tensor`` in the last; detached, in memory of its own, on the device
        of the local tensor.

    Raises:
        TypeError: ``tensor`` is no DTensor.
        ValueError: ``tensor`` is on another mesh; or, the same on every rank of the gather, a
            local tensor is not what the placements give to its rank, or the ranks' tensors differ
            in shape, dtype or placements.

    All ranks of the root mesh have to call it. Collectives: none where only the last dimension is
    sharded; for chunks of 8 KiB and less one per other sharded dimension, usually one in all; one
    more where the values of this rank lie with other ranks of tensor parallelism
    (``[Shard(0), Shard(0)]``). Larger ones take as many again, after the ranks' verdicts; even rows
    are gathered where they belong, without a copy.

    """
    if not isinstance(tensor, DTensor):
        raise TypeError(f"expected a DTensor, got a {type(tensor).__name__}")
    mesh = tensor.device_mesh
    if parent_mesh is None or parent_mesh != mesh:
        raise ValueError(
            f"the DTensor is on {mesh_name(mesh)}, expected the root mesh, {mesh_name(parent_mesh)}"
        )
    if plays_all_ranks():
        return _redistribute_by_dtensor(tensor)
    spec = tensor._spec
    coordinate = my_coordinate(mesh)
    if coordinate is None:
        raise ValueError(f"this rank is not on {mesh_name(mesh)}")
    route = route_of(tuple(spec.shape), tuple(mesh.shape), cuts_of(spec), coordinate)
    local = unwrap_pending(tensor._local_tensor)
    own = has_own_operations(local) or not is_ordinary(local)
    scattered = route.dims and route.target.region is None
    if isinstance(local, FakeTensor):
        return _redistribute_by_dtensor(tensor)
    if scattered or _reduces(spec.placements):
        domain = mesh_domain(mesh)
        _exchange_verdicts(tensor, local, domain, domain.stages(), domain.coordinates)
        return _redistribute_by_dtensor(tensor)
    if not route.dims:
        _check_local(tensor, local)
        return fresh_copy(local, local.device)
    if own:
        domain = mesh_domain(mesh)
        stages = [domain.stage(d) for d in route.dims]
        _exchange_verdicts(tensor, local, domain, stages, route.coordinates)
        return _redistribute_by_dtensor(tensor)
    local = local.detach() if local.requires_grad else local
    whole = allocate(route.target.shape, local.dtype, local.device, tuple(spec.stride))
    if not local.is_meta:
        _gather_into(whole, route, tensor, local)
    return whole


@lru_cache(maxsize=4096)
def _reduces(placements: tuple[Placement, ...]) -> bool:
    """Whether values are pending outside of tensor parallelism."""
    return any(isinstance(placement, Partial) for placement in placements[:-1])


def _redistribute_by_dtensor(tensor: DTensor) -> torch.Tensor:
    """By way of DTensor's own collectives, for what is more than moving rectangles."""
    placements = [*([Replicate()] * (tensor.device_mesh.ndim - 1)), tensor.placements[-1]]
    local = move_by_dtensor(tensor, lambda t: t.redistribute(placements=placements)._local_tensor)
    if not has_own_operations(local):
        return fresh_copy(local, local.device)
    return copy_by_class(local) if local is tensor._local_tensor else local


def _expected(tensor: DTensor) -> tuple[tuple[int, ...], torch.dtype]:
    """What all ranks know of this rank's tensor. Its own dtype is that of the local one."""
    meta = tensor._spec.tensor_meta
    return local_shape(tensor._spec), tensor.dtype if meta is None else meta.dtype


def _check_local(tensor: DTensor, local: torch.Tensor) -> None:
    shape, dtype = _expected(tensor)
    if (tuple(local.shape), local.dtype) != (shape, dtype):
        raise ValueError(
            f"the local tensor has shape {tuple(local.shape)}, {local.dtype}; expected {shape}, "
            f"{dtype} of {tuple(tensor.shape)} with {tuple(tensor.placements)}"
        )


def _gather_into(whole: torch.Tensor, route: Route, tensor: DTensor, local: torch.Tensor) -> None:
    """Gather as ``route`` says, and write this rank's part into ``whole``."""
    domain = mesh_domain(tensor.device_mesh)
    stages = [domain.stage(d) for d in route.dims]
    width = route.width * whole.dtype.itemsize
    values = local.detach() if local.device == domain.device else local.to(domain.device)
    row = as_carrier(values)
    along = width <= _FIRST_BYTES - _HEADER_BYTES
    chunk = row if row.nbytes <= width and along else None
    rows = _exchange_verdicts(tensor, local, domain, stages, route.coordinates, chunk)
    moved = carrier_dtype(whole.dtype)
    memory = whole.view(moved)
    if along:
        rows = rows[:, _HEADER_BYTES : _HEADER_BYTES + width]
    else:
        into = memory if _arrives_in_place(memory, route, stages, domain) else None
        rows = _gather_large(stages, row, width, into)
        if into is not None:
            return
    values = rows.view(moved)
    if route.stacked and memory.is_contiguous():
        memory.view(values.shape).copy_(values)
        return
    for values_of_rank, block, writes in zip(values, route.blocks, route.writes, strict=True):
        if writes:
            part = values_of_rank[: block.numel].view(block.shape)
            for into_, out in writes:
                memory[into_].copy_(part[out])


def _arrives_in_place(
    memory: torch.Tensor, route: Route, stages: Sequence[Stage], domain: Domain
) -> bool:
    """Whether the rows of one collective, one after the other, are the result."""
    ordered = route.stacked and len(stages) == 1 and stages[0].in_order
    return ordered and memory.is_contiguous() and memory.device == domain.device


def _gather_large(
    stages: Sequence[Stage], row: torch.Tensor, width: int, into: torch.Tensor | None
) -> torch.Tensor:
    """All ranks' bytes, padded to ``width``, a row each; straight ``into`` memory if given."""
    if row.nbytes == width and row.is_contiguous() and not row.is_neg():
        payload = row.view(-1).view(torch.uint8)
    else:
        payload = torch.empty(width, dtype=torch.uint8, device=row.device)
        _write_bytes(payload, row)
    if into is None:
        return collect(stages, payload)
    return all_gather(stages[0].group, payload, into.view(-1).view(torch.uint8))


def _write_bytes(into: torch.Tensor, values: torch.Tensor) -> None:
    room = into[: values.nbytes]
    if values.numel():
        room.view(values.dtype).view(values.shape).copy_(values)


def _exchange_verdicts(
    tensor: DTensor,
    local: torch.Tensor,
    domain: Domain,
    stages: Sequence[Stage],
    coordinates: Sequence[tuple[int, ...]],
    chunk: torch.Tensor | None = None,
) -> torch.Tensor:
    """The first messages of the ranks at ``coordinates``, a row each, once all were found good.

    ``chunk`` travels along behind this rank's header.
    """
    first = torch.empty(_FIRST_BYTES, dtype=torch.uint8, device=domain.device)
    first[:_HEADER_BYTES].copy_(_verdict(tensor, local))
    if chunk is not None:
        _write_bytes(first[_HEADER_BYTES:], chunk)
    rows = collect(stages, first, short=True)
    _check_verdicts(rows, tensor, domain, coordinates)
    return rows


def _check_verdicts(
    rows: torch.Tensor, tensor: DTensor, domain: Domain, coordinates: Sequence[tuple[int, ...]]
) -> None:
    """Raise if a rank's tensor is not what its placements or the other ranks' say, or its type."""
    words = rows[:, :_WORD].tolist()
    if words[0][0] == _SENT_AS_BYTES and words.count(words[0]) == len(words):
        return
    verdicts = rows[:, :_HEADER_BYTES].contiguous().view(torch.int64).tolist()
    first = domain.name(domain.position(coordinates[0]))
    message = (
        f"{_expected(tensor)[1]} of {tuple(tensor._spec.shape)} with {tuple(tensor.placements)}"
    )
    for (word, kind, ndim, *sizes), coordinate in zip(verdicts, coordinates, strict=True):
        member = domain.name(domain.position(coordinate))
        if not word:
            raise ValueError(
                f"{member}: the local tensor has shape {tuple(sizes[:ndim])}, another dtype, or "
                f"a type that cannot be padded; expected "
                f"{spec_block(tensor._spec, coordinate).shape}, {message}"
            )
        if word >> 8 != verdicts[0][0] >> 8:
            raise ValueError(
                f"{member}: the tensor has another shape, dtype or placements than that of "
                f"{first}; expected the same on all, here {message}"
            )
        if kind != verdicts[0][1]:
            raise ValueError(
                f"{member}: the local tensor has another type than that of {first}; expected the "
                "same on all"
            )


def _verdict(tensor: DTensor, local: torch.Tensor) -> torch.Tensor:
    """The header's bytes: whether this rank's tensor is good, its kind and its shape."""
    good = (tuple(local.shape), local.dtype) == _expected(tensor)
    spec = tensor._spec
    word = _digest(tuple(spec.shape), spec.placements, cuts_of(spec), local.dtype)
    sent, kind = _SENT_AS_BYTES, 0
    if has_own_operations(local) or not is_ordinary(local):
        name = f"{type(local).__module__}.{type(local).__qualname__} {local.layout} {local.dtype}"
        sent, kind = 1, zlib.crc32(name.encode()) + 1
        good = good and _can_be_padded(tensor, local)
    sizes = [*local.shape, *([0] * _HEADER_DIMS)][:_HEADER_DIMS]
    header = [word | sent if good else 0, kind, min(local.dim(), _HEADER_DIMS), *sizes]
    return torch.tensor(header, dtype=torch.int64, device="cpu").view(torch.uint8)


@lru_cache(maxsize=4096)
def _digest(*message: object) -> int:
    """What a rank says of the whole, in the bytes behind the first."""
    return zlib.crc32(repr(message).encode()) << 8


def _can_be_padded(tensor: DTensor, local: torch.Tensor) -> bool:
    """Whether a shard that may be shorter than others can be made as long, on every rank alike.

    DTensor pads the short ones only, so that of a type without that operation one rank alone
    would raise, while the others wait for it.
    """
    sizes, spec = tuple(tensor._spec.shape), tensor._spec
    splits = [
        cut for cut in cuts_of(spec) if sizes[cut.tensor_dim] % int(spec.mesh.size(cut.mesh_dim))
    ]
    try:
        for cut in splits:
            behind = [0, 0] * (local.dim() - cut.tensor_dim - 1)
            torch.nn.functional.pad(local, [*behind, 0, 1])
    except Exception:
        return False
    return True
