"""From one rank's full state dict to every rank's local one, sharded as its targets are.

The source tells what it has, every rank tells what it needs of that, and then bytes travel:
broadcast where every rank needs a tensor whole, scattered where each needs a part. Only the source
ever holds a full tensor of a sharded target.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from shardproof._core.comms.agreement import Failure, exchange, first_failure, raise_failure
from shardproof._core.containers.container_types import assign
from shardproof._core.loading.manifest import Manifest, broadcast_manifest, build_manifest
from shardproof._core.loading.plan import LoadPlan, find_unlike_shapes, make_plan, merge_columns
from shardproof._core.loading.simulated import load_simulated
from shardproof._core.loading.targets import TargetFactory
from shardproof._core.loading.transport import Transport
from shardproof._core.sharding.domain import group_domain
from shardproof._core.sharding.simulated_ranks import simulates_ranks
from shardproof._core.tensors.inference_mode import outside_inference_mode


class _TensorInfo(NamedTuple):
    """What a rank without the data knows of a full tensor."""

    size: torch.Size
    dtype: torch.dtype


@outside_inference_mode
@torch.no_grad()
def _broadcast_state_dict(
    full_state_dict: dict[str, Any],
    local_state_dict: dict[str, Any],
    device: torch.device,
    pg: dist.ProcessGroup | None = None,
    strict: bool = False,
    cpu_offload: bool = False,
) -> None:
    """Load the first rank's full state dict into every rank's local one.

    Args:
        full_state_dict: flat, read on the first rank of the group only (rank 0 in the group's own
            numbering, pytorch#155680). Full tensors of any dtype and strides, or picklable
            values. Not changed.
        local_state_dict: flat; the output. Ranks may hold different keys in any order.
        device: where new tensors are made.
        pg: the group; without it the default group.
        strict: remove local keys that the full state dict lacks.
        cpu_offload: leave CPU tensors (pytorch#149516).

    After it, for each key that both have: a rank holds of a DTensor what ``full_tensor()`` reads
    there, by the rank's number in the group of each mesh dimension. A DTensor with memory is the
    same object with new values (with ``cpu_offload`` only if its memory is on the CPU, else a new
    DTensor there). A meta DTensor is replaced by a new one on ``device`` with its dtype, mesh and
    placements. A plain target is replaced by the full tensor on ``device``, in the shape and dtype
    in which it came, which its module adapts in its load hooks or refuses; where a target is on
    meta, so that the module is given what lands, floating-point tensors take the target's dtype. A
    0-dim tensor for a plain target comes out on the CPU, but on ``device`` for a meta one. None
    stays None where a tensor with dimensions is offered; another value that is no tensor is
    replaced. Tied targets stay tied: the last key of the full state dict wins. Keys that no rank
    has never travel.

    Raises, the same on every rank, before anything changes:
        TypeError: the full state dict has a DTensor or ShardedTensor (pytorch#164843), or a value
            that cannot be pickled, or a tensor for one of the ranks' keys that is sparse,
            quantized or a wrapper of several tensors; a target is a ShardedTensor; or one of both
            is a number and the other a tensor with dimensions.
        ValueError: shape, dtype or layout of a full tensor do not fit a DTensor, or plain targets
            have its shape on some ranks only.

    All ranks of the group have to call it. Collectives: two broadcasts for the manifest, one
    all-gather to agree, over Gloo an all-to-all (two where the ranks need different parts, or one
    refuses), and one broadcast or scatter per bucket, or per tensor of a 16th of a bucket or more
    that can be sent from where it lies to where it belongs (over Gloo from a device per bucket of
    such a tensor that is scattered).

    """
    _load(
        full_state_dict, local_state_dict, None, device, pg, strict=strict, cpu_offload=cpu_offload
    )


@outside_inference_mode
@torch.no_grad()
def _broadcast_tensors(
    full_state_dict: dict[str, Any],
    local_state_dict: dict[str, Any],
    keys: list[str],
    device: torch.device,
    pg: dist.ProcessGroup | None = None,
) -> None:
    """Load some of the first rank's full tensors into every rank's local state dict.

    Args:
        full_state_dict: full tensors on the first rank of the group, ``_TensorInfo`` elsewhere.
            Not changed.
        local_state_dict: the output; as for :func:`_broadcast_state_dict`. Keys that it lacks and
            values that are None stay so.
        keys: the same keys on every rank, in any order.
        device: where new tensors are made.
        pg: the group; without it the default group.

    Raises, the same on every rank, before anything changes:
        KeyError: the full state dict lacks a key on some rank.
        TypeError, ValueError: as for :func:`_broadcast_state_dict`; also where ``keys``, or what a
            ``_TensorInfo`` says, differ from the first rank's.

    All ranks of the group have to call it; the collectives are those of
    :func:`_broadcast_state_dict`.

    """
    _load(full_state_dict, local_state_dict, list(keys), device, pg)


def _load(
    full: dict[str, Any],
    local: dict[str, Any],
    keys: list[str] | None,
    device: torch.device,
    pg: dist.ProcessGroup | None,
    strict: bool = False,
    cpu_offload: bool = False,
) -> None:
    device = torch.device(device)
    if simulates_ranks():
        load_simulated(full, local, full if keys is None else keys, device, cpu_offload)
        for key in [key for key in local if strict and keys is None and key not in full]:
            del local[key]
        return
    group = pg if pg is not None else dist.distributed_c10d._get_default_group()
    if dist.get_rank(group) < 0:
        return
    domain = group_domain(group, device)
    source = dist.get_rank(group) == 0
    manifest, failure = build_manifest(full, keys, domain.device) if source else (Manifest(), None)
    wholes = manifest.wholes
    targets = TargetFactory(in_place=True, cpu_offload=cpu_offload)

    def classify() -> None:
        nonlocal failure
        try:
            targets.classify(local)
        except Exception as error:
            failure = Failure.of(error)

    # The source does so while the others hear of its tensors, they while it looks at those.
    if not source:
        classify()
    manifest, refusal = broadcast_manifest(domain, group, manifest, failure, classify)
    raise_failure(refusal)
    plan = LoadPlan()
    try:
        if keys is not None:
            _check_infos(full, keys, manifest, source)
        plan = make_plan(manifest, local, targets, device, strict and keys is None)
    except Exception as error:
        # Whatever it is, the others hear of it: they are about to wait for this rank.
        failure = Failure.of(error)
    columns = plan.columns(manifest, domain)
    replies, _ = exchange(domain, columns, failure, repr(columns).encode())
    kinds, required = columns[0], [columns[1]]
    if replies is not None:
        failed = first_failure(domain, replies)
        if failed is None:
            failed = find_unlike_shapes(domain, manifest, [theirs for _, theirs in replies])
        raise_failure(failed)
        kinds, required = merge_columns([theirs for _, theirs in replies])

    for target, value in plan.scalars:
        target.take_part_of(value)
    transport = Transport(domain, group, wholes if source else None, plan.targets)
    transport.run(manifest, kinds, required)
    leaders, found = plan.leaders, plan.found
    results = {
        key: target.value if target.spec.keeps and not target.spec.by_class else target.result()
        for key, target in found.items()
        if key not in leaders
    }
    assign(local, plan.values)
    assign(local, results)
    # What is written in place stays the caller's object, also where another shares its memory.
    assign(local, {key: results[at] for key, at in leaders.items() if not found[key].spec.keeps})
    for key in plan.removed:
        del local[key]


def _check_infos(full: dict[str, Any], keys: list[str], manifest: Manifest, source: bool) -> None:
    if set(keys) != set(manifest.keys):
        mine, first = (sorted(some, key=repr) for some in (keys, manifest.keys))  # of any types
        raise ValueError(f"keys {mine}, expected the first rank's {first}")
    entries = {} if source else dict(manifest.items())
    for key in keys if not source else ():
        if key not in full:
            raise KeyError(f"the full state dict lacks {key!r}")
        info, entry = full[key], entries[key]
        if not isinstance(info, _TensorInfo):
            continue
        told, found = (tuple(info.size), info.dtype), (entry.size, entry.dtype)
        if told != found:
            raise ValueError(f"{key!r}: size and dtype {told}, the first rank has {found}")
