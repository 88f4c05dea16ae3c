"""Sharded -> whole: every distributed leaf of a state dict, gathered in buckets.

Leaves that differ over the same dimensions of the same ranks travel together as one byte stream.
A single destination gets the bytes alone; the other ranks only send.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from shardproof._state_dict_utils.agreement import Entries, agree_on_entries
from shardproof._state_dict_utils.containers import Path, leaf_name
from shardproof._state_dict_utils.leaves import Found, Leaf, find, is_meta
from shardproof._state_dict_utils.reduction import reduced
from shardproof._state_dict_utils.tensors import (
    CPU,
    allocate,
    bit_dtype,
    dress_like,
    dtype_of,
    fresh_copy,
    geometry,
    shape_of,
)
from shardproof._state_dict_utils.traverse import copy_leaf_value, map_leaves, on_this_rank
from shardproof._state_dict_utils.wire import (
    Domain,
    Parcel,
    Piece,
    Stream,
    as_bits,
    collect,
    collect_to,
    deliver,
    group_domain,
    pack,
    shard_bytes,
    stream_order,
)


@torch.no_grad()
def _gather_state_dict(
    state_dict: dict[str, Any],
    *,
    pg: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
    cpu_offload: bool = False,
    ranks_only: tuple[int, ...] = (),
    type_check: bool = True,
) -> dict[str, Any]:
    """Make every sharded leaf whole.

    Args:
        state_dict: nested containers of leaves of any dtype and layout. Not changed.
        pg: the group over which the ranks agree and ShardedTensors are gathered; without it each
            uses the group of its own. A DTensor is always gathered over its mesh.
        device: where the bytes of ShardedTensors travel from, for groups with several backends.
        cpu_offload: results in CPU memory.
        ranks_only: the ranks that want the result, in the numbering of ``pg`` or, without it, of
            the default group; empty means all.
        type_check: refuse leaves that no checkpoint can hold; otherwise they are deep-copied.

    Returns:
        The same containers around plain tensors in memory of their own, without an autograd
        graph, on the device of the rank's part or on the CPU. Gathered tensors do not require
        grad; plain ones keep Parameter-ness and ``requires_grad``. Ties survive, and travel once.
        Pending reductions are carried out. Outside ``ranks_only`` ``{}``. A rank outside a
        DTensor's mesh gets that leaf as the local tensor that it has.

    Raises:
        ValueError, TypeError, KeyError, RuntimeError: the same on every rank that shares a group
            with the rank concerned; names it. Raised before any tensor travels.

    All ranks of ``pg``, and of the meshes and groups of the leaves, have to call it; the order of
    keys is free. Collectives: one per mesh dimension to agree, twice that where ranks differ, and
    one more per dimension where a rank belongs to several meshes; then per bucket one per
    sharded dimension. Tensors that are replicated everywhere do not travel. pytorch#150928.

    """
    found = find(state_dict, pg, device, type_check)
    wanted = _destinations(ranks_only, pg, found)
    details = _agree(found, pg, device)
    gathered = _gather(found, wanted, details, cpu_offload)
    if not on_this_rank(ranks_only, pg):
        return {}
    return _rebuild(state_dict, gathered, cpu_offload)


@torch.no_grad()
def _all_gather_sharded_tensor(
    sharded_tensor: ShardedTensor,
    pg: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Gather one ShardedTensor on every rank of its group.

    Args:
        sharded_tensor: any sharding: chunks in any rank order and dimension, several shards on a
            rank or none, empty and uneven ones.
        pg: the group; without it the tensor's own.
        device: where the bytes travel and the result is; without it the group's device.

    Returns:
        The full tensor, detached, in memory of its own.

    Raises:
        ValueError: the same on every rank of the group: metadata differ between ranks, a shard is
            on a rank outside the group, or is not where the metadata say.

    All ranks of the group have to call it. Collectives: one to agree, one per bucket.
    pytorch#150928.

    """
    found = find({"sharded_tensor": sharded_tensor}, pg, device, type_check=False)
    details = _agree(found, pg, device)
    leaf = found.leaves["sharded_tensor"]
    target = device
    if target is None:
        target = leaf.domain.device if leaf.domain is not None else CPU
    gathered = _gather(found, None, details, cpu_offload=False)
    return gathered["sharded_tensor"].to(target)


def _destinations(
    ranks_only: tuple[int, ...], pg: dist.ProcessGroup | None, found: Found
) -> frozenset[int] | None:
    """The global ranks that want results; None for all."""
    if not ranks_only:
        return None
    size = dist.get_world_size(pg)
    wrong = [rank for rank in ranks_only if not 0 <= rank < size]
    if wrong:
        found.fail(ValueError(f"ranks_only has {wrong}, expected ranks of a group of {size}"))
        return None
    if pg is None:
        return frozenset(ranks_only)
    return frozenset(dist.get_global_rank(pg, rank) for rank in ranks_only)


def _agree(
    found: Found, pg: dist.ProcessGroup | None, device: torch.device | None
) -> dict[Domain, list[Entries]]:
    domains = found.domains
    if pg is not None and dist.get_rank(pg) >= 0:
        whole = group_domain(pg, device)
        # The group hears of everything, so a mesh inside it need not be asked again.
        inside = set(whole.members)
        domains = [d for d in domains if not inside.issuperset(d.members)]
        domains = sorted([*domains, whole], key=lambda domain: domain.key)
    failure, details = agree_on_entries(domains, found.entries(), found.failure)
    if failure is not None:
        raise failure.error()
    return details


def _tie_classes(found: Found, details: Mapping[Domain, Sequence[Entries]]) -> dict[str, str]:
    """Path -> the first path that is tied to it, the same on every rank.

    A rank whose part of a tensor is empty cannot tell whether it is tied, so the others decide.
    """
    own = found.entries()
    first: dict[Hashable, str] = {}
    classes: dict[str, str] = {}
    for path, entry in own.items():
        known: list[Entries] = [own]
        for told in details.values():
            known.extend(e for e in told if path in e and e[path].members == entry.members)
        ties = [e[path].tie for e in known]
        if all(tie is None for tie in ties):
            classes[path] = path
            continue
        key = (entry.summary, entry.members, tuple(ties))
        classes[path] = first.setdefault(key, path)
    return classes


def _gather(
    found: Found,
    wanted: frozenset[int] | None,
    details: Mapping[Domain, Sequence[Entries]],
    cpu_offload: bool,
) -> dict[str, torch.Tensor]:
    """Path -> the whole tensor, for the leaves that this rank wants."""
    classes = _tie_classes(found, details)
    here = wanted is None or dist.get_rank() in wanted
    results: dict[str, torch.Tensor] = {}
    streams: dict[Any, list[Leaf]] = defaultdict(list)
    for path in sorted(found.leaves):
        leaf = found.leaves[path]
        if classes[path] != path:
            continue
        if leaf.domain is not None and leaf.dims and not is_meta(leaf.tensor):
            reductions = tuple(sorted(leaf.reductions.items()))
            streams[leaf.domain.key, leaf.dims, reductions].append(leaf)
        if here:
            results[path] = _result_for(leaf, cpu_offload)
    for key in sorted(streams):
        _run_stream(streams[key], wanted, results)
    return {path: results[first] for path, first in classes.items()} if here else {}


def _result_for(leaf: Leaf, cpu_offload: bool) -> torch.Tensor:
    """The tensor that takes the values; already filled where nothing has to travel."""
    tensor = leaf.tensor
    if isinstance(tensor, DTensor):
        target = CPU if cpu_offload else tensor._local_tensor.device
        if leaf.domain is None or (not leaf.dims and not is_meta(tensor)):
            return fresh_copy(tensor._local_tensor, target)
    else:
        assert isinstance(tensor, ShardedTensor)
        target = leaf.local[0].device if leaf.local and not cpu_offload else CPU
    stride = tensor._spec.stride if isinstance(tensor, DTensor) else None
    full = allocate(shape_of(tensor), dtype_of(tensor), target, stride)
    if not leaf.dims and leaf.domain is not None:
        _write_own(leaf, full)
    return full


def _write_own(leaf: Leaf, full: torch.Tensor) -> None:
    assert leaf.domain is not None
    if is_meta(leaf.tensor):
        return
    whole = full.view(bit_dtype(full.dtype))
    coordinate = leaf.domain.coordinate(leaf.domain.index())
    for block, part in zip(leaf.blocks_at(coordinate), leaf.local, strict=True):
        data = torch.cat(shard_bytes(part, 0, block.numel)) if block.numel else None
        if data is not None:
            piece = Piece(0, 0, 0, block.numel, 0, 0)
            deliver(as_bits(data, full.dtype), block, piece, partial(_write, whole))


def _write(whole: torch.Tensor, region: tuple[slice, ...], values: torch.Tensor) -> None:
    whole[region].copy_(values)


def _run_stream(
    leaves: Sequence[Leaf], wanted: frozenset[int] | None, results: dict[str, torch.Tensor]
) -> None:
    """Gather leaves that differ over the same dimensions of one domain."""
    domain, dims = leaves[0].domain, leaves[0].dims
    assert domain is not None
    here = domain.coordinate(domain.index())
    places = list(product(*(range(domain.shape[d]) for d in dims)))
    coordinates = [_with(here, dims, place) for place in places]
    line = [domain.members[domain.position(c)] for c in coordinates]
    takers = [i for i, rank in enumerate(line) if wanted is None or rank in wanted]
    if not takers:
        return
    by_name = {leaf.path: leaf for leaf in leaves}
    parcels = stream_order(
        [
            Parcel(leaf.path, dtype_of(leaf.tensor), [leaf.blocks_at(c) for c in coordinates])
            for leaf in leaves
        ]
    )
    sources = [by_name[parcel.name].local for parcel in parcels]
    me = coordinates.index(here)
    stages = [domain.stage(d) for d in dims]
    outputs = [results.get(parcel.name) for parcel in parcels]
    peers = _peers(places, dims, leaves[0].reductions)
    for width, pieces in Stream(parcels, len(places)).buckets():
        bucket = torch.empty(width, dtype=torch.uint8, device=domain.device)
        pack(
            pieces[me],
            lambda p: shard_bytes(sources[p.parcel][p.block], p.start, p.stop),
            bucket,
        )
        if len(takers) == 1:
            rows = collect_to(stages, bucket, places[me], places[takers[0]])
        else:
            rows = collect(stages, bucket)
        if rows is not None and me in takers:
            _unpack(rows, pieces, parcels, outputs, peers, leaves[0].reductions)


def _with(here: Sequence[int], dims: Sequence[int], place: Sequence[int]) -> tuple[int, ...]:
    coordinate = list(here)
    for dim, index in zip(dims, place, strict=True):
        coordinate[dim] = index
    return tuple(coordinate)


def _peers(
    places: Sequence[tuple[int, ...]], dims: Sequence[int], reductions: Mapping[int, str]
) -> list[list[int]]:
    """The participants whose values are reduced into one, in row-major order."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, place in enumerate(places):
        kept = tuple(p for dim, p in zip(dims, place, strict=True) if dim not in reductions)
        groups[kept].append(index)
    return list(groups.values())


def _unpack(
    rows: torch.Tensor,
    pieces: Sequence[Sequence[Piece]],
    parcels: Sequence[Parcel],
    outputs: Sequence[torch.Tensor | None],
    peers: Sequence[Sequence[int]],
    reductions: Mapping[int, str],
) -> None:
    targets = [None if out is None else out.view(bit_dtype(out.dtype)) for out in outputs]
    devices = {out.device for out in outputs if out is not None}
    if len(devices) == 1:
        # One copy of the bucket instead of one per tensor.
        rows = rows.to(devices.pop())
    streams = rows.unbind()
    ops = [op for _, op in sorted(reductions.items())]
    for group in peers:
        for number, piece in enumerate(pieces[group[0]]):
            parcel, target = parcels[piece.parcel], targets[piece.parcel]
            if target is None:
                continue
            if ops:
                parts = [
                    streams[i][pieces[i][number].at : pieces[i][number].end].view(parcel.dtype)
                    for i in group
                ]
                data = reduced(parts, ops, len(group)).view(bit_dtype(parcel.dtype))
            else:
                data = as_bits(streams[group[0]][piece.at : piece.end], parcel.dtype)
            block = parcel.blocks[group[0]][piece.block]
            deliver(data, block, piece, partial(_write, target))


def _rebuild(
    state_dict: Any, gathered: Mapping[str, torch.Tensor], cpu_offload: bool
) -> dict[str, Any]:
    """The containers of the state dict around the results; plain leaves are copied."""
    copied: dict[Hashable, torch.Tensor] = {}
    dressed: dict[Hashable, torch.Tensor] = {}

    def leaf(path: Path, value: Any, _: Any) -> Any:
        if isinstance(value, (DTensor, ShardedTensor)):
            return gathered[leaf_name(path)]
        if not isinstance(value, torch.Tensor):
            return copy_leaf_value(value)
        key = geometry(value)
        if key not in copied:
            copied[key] = fresh_copy(value, CPU if cpu_offload else value.device)
        dress = (key, type(value), value.requires_grad)
        if dress not in dressed:
            dressed[dress] = dress_like(copied[key].detach(), value)
        return dressed[dress]

    result: dict[str, Any] = map_leaves(state_dict, leaf)
    return result
