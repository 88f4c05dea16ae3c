"""Ranks agree on the sharded leaves that they are about to gather, or all raise the same error."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist

from shardproof._core.comms.agreement import raise_failure
from shardproof._core.gathering.leaf_entries import Agreement, agree_on_entries
from shardproof._core.gathering.mesh_gather import needs_bucket
from shardproof._core.gathering.sharded_leaves import FoundLeaves
from shardproof._core.sharding.domain import Domain, group_domain


def agree_on_leaves(
    found: FoundLeaves, pg: dist.ProcessGroup | None, device: torch.device | None, cpu_offload: bool
) -> Agreement:
    domains = _widest_domains(found.domains)
    if pg is not None and dist.get_rank(pg) >= 0:
        whole = group_domain(pg, device)
        # The group hears of everything, so a mesh inside it need not be asked again.
        inside = set(whole.members)
        domains = [d for d in domains if not inside.issuperset(d.members)]
        domains = sorted([*domains, whole], key=lambda domain: domain.key)
    layouts = dict.fromkeys(map(attrgetter("layout"), found.leaves.values()))
    large = {layout for layout in layouts if layout.large and layout.travels}
    by_class = any(layout.by_class is not None and layout.travels for layout in layouts)
    limited = bool(large) and any(
        leaf.layout in large and needs_bucket(leaf, cpu_offload) for leaf in found.leaves.values()
    )
    agreed = agree_on_entries(domains, found.columns, found.failure, limited, by_class)
    raise_failure(agreed.failure)
    return agreed


def _widest_domains(domains: Sequence[Domain]) -> list[Domain]:
    """The domains to agree in: none whose ranks are all in another, which hears of everything.

    Where a rank has one more than the others, on a mesh that is wrong, it would ask there alone.
    """
    chosen: dict[frozenset[int], Domain] = {}
    for domain in sorted(domains, key=_preference):
        ranks = frozenset(domain.members)
        if not any(ranks <= others for others in chosen):
            chosen[ranks] = domain
    return sorted(chosen.values(), key=attrgetter("key"))


def _preference(domain: Domain) -> tuple[Any, ...]:
    unsorted = domain.members != tuple(sorted(domain.members))
    return -len(domain.members), len(domain.shape), unsorted, domain.key
