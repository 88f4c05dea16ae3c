"""What this rank does with the tensors that the source has, and what it tells the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from shardproof._core.comms.agreement import Failure
from shardproof._core.loading.manifest import Manifest, ManifestEntry
from shardproof._core.loading.requirements import Requirement
from shardproof._core.loading.target_spec import TargetSpec
from shardproof._core.loading.targets import Target, TargetFactory, last_of_tied
from shardproof._core.loading.value_checks import check_kinds
from shardproof._core.sharding.domain import Domain
from shardproof._core.sharding.target_part import WHOLE, TargetPart
from shardproof._core.tensors.properties import CPU


@dataclass
class LoadPlan:
    """What this rank will do with the tensors and values in the source's manifest.

    Attributes:
        values: key -> what replaces the local value.
        removed: keys to remove.
        found: key -> target.
        leaders: key of a tied target -> the key whose values are in it, too.
        targets: root key -> the targets that it fills.
        scalars: targets, each with the 0-dim tensor that fills it.

    """

    values: dict[Any, Any] = field(default_factory=dict)
    removed: list[Any] = field(default_factory=list)
    found: dict[Any, Target] = field(default_factory=dict)
    leaders: dict[Any, Any] = field(default_factory=dict)
    targets: dict[Any, list[Target]] = field(default_factory=dict)
    scalars: list[tuple[Target, torch.Tensor]] = field(default_factory=list)

    def columns(self, manifest: Manifest, domain: Domain) -> PlanColumns:
        """What this rank needs, in columns that are equal on ranks with equal needs."""
        every = set(domain.members)
        # A replicated target on a mesh of all these ranks needs what a plain one needs.
        seen: dict[TargetPart, TargetPart] = {WHOLE: WHOLE}
        known: dict[TargetSpec, Requirement] = {}
        numbers: dict[Requirement, int] = {}
        known_columns: dict[TargetSpec, tuple[int, ...]] = {}

        def need(spec: TargetSpec) -> Requirement:
            found = known.get(spec)
            if found is None:
                part = seen.get(spec.part)
                if part is None:
                    part = spec.part
                    whole = not part.cuts and every <= set(part.members)
                    part = seen[part] = WHOLE if whole else part
                found = known[spec] = part, spec.receives_directly(domain.device)
            return found

        required: list[tuple[int, ...]] = []
        for key in manifest.keys:
            targets = self.targets.get(key)
            if not targets:
                required.append(())
            elif len(targets) == 1:
                spec = targets[0].spec
                mine = known_columns.get(spec)
                if mine is None:
                    mine = known_columns[spec] = (numbers.setdefault(need(spec), len(numbers)),)
                required.append(mine)
            else:
                needs = dict.fromkeys((need(target.spec)[0], False) for target in targets)
                required.append(tuple([numbers.setdefault(n, len(numbers)) for n in needs]))
        shapes = ((key, target.spec.other_shape) for key, target in self.found.items())
        return list(numbers), required, {key: shape for key, shape in shapes if shape is not None}


PlanColumns = tuple[list[Requirement], list[tuple[int, ...]], dict[Any, tuple[int, ...]]]
"""(the distinct needs, per offered key which of them, plain targets of another shape than the full
tensor), the same on ranks with the same needs."""


def find_unlike_shapes(
    domain: Domain, manifest: Manifest, replies: list[PlanColumns]
) -> Failure | None:
    """A plain target that only some ranks have in another shape than the full tensor.

    Where all have, their modules adapt what they are given, or refuse it on every rank.
    """
    sizes: dict[Any, tuple[int, ...]] = {}
    for key in sorted(set().union(*[theirs[2] for theirs in replies]), key=str):
        if not sizes:
            sizes = {key: entry.size for key, entry in manifest.items()}
        column = manifest.keys.index(key)
        having = [index for index, theirs in enumerate(replies) if theirs[1][column]]
        shapes = [replies[index][2].get(key, sizes[key]) for index in having]
        if len(set(shapes)) > 1:
            odd = next(i for i, shape in zip(having, shapes, strict=True) if shape != sizes[key])
            return Failure(
                "ValueError",
                f"{domain.name(odd)}: {key!r}: the target has shape {replies[odd][2][key]}, "
                f"expected {sizes[key]} as the full tensor has, and as other ranks have",
                True,
            )
    return None


def merge_columns(
    replies: list[PlanColumns],
) -> tuple[list[Requirement], list[list[tuple[int, ...]]]]:
    """The columns of several ranks, with one numbering of requirements."""
    numbers: dict[Requirement, int] = {}
    merged = []
    for kinds, required, _ in replies:
        new = [numbers.setdefault(need, len(numbers)) for need in kinds]
        merged.append([tuple([new[number] for number in needs]) for needs in required])
    return list(numbers), merged


def make_plan(
    manifest: Manifest,
    local: dict[str, Any],
    targets: TargetFactory,
    device: torch.device,
    strict: bool,
) -> LoadPlan:
    plan = LoadPlan()
    found, kinds = plan.found, manifest.kinds
    scalars: dict[Any, ManifestEntry] = {}
    for key, number in zip(manifest.keys, manifest.numbers, strict=True):
        value, entry = local.get(key), kinds[number]
        if value is None and (key not in local or entry.kind in ("tensor", "opaque")):
            continue
        if entry.kind == "value":
            check_kinds(key, value, type(manifest.values[key]).__name__, 0)
            plan.values[key] = manifest.values[key]
            continue
        if entry.kind == "opaque":
            raise TypeError(
                f"{key!r}: the full tensor is {manifest.values[key]}, expected a torch.strided one "
                "that is neither quantized nor a wrapper of several tensors"
            )
        here = device
        if entry.kind == "scalar":
            scalars[key] = entry
            if not isinstance(value, DTensor) and not getattr(value, "is_meta", False):
                here = CPU
        if not isinstance(value, torch.Tensor):
            check_kinds(key, value, "Tensor", len(entry.size))
        assert entry.dtype is not None
        found[key] = targets.target(key, value, entry.size, entry.dtype, here, number)
    plan.leaders = last_of_tied(found)
    if plan.leaders or manifest.roots or scalars:
        _assign_sources(plan, manifest, scalars)
    else:
        plan.targets = {key: [target] for key, target in found.items()}
    if strict:
        known = set(manifest.keys)
        plan.removed = [key for key in local if key not in known]
    return plan


def _assign_sources(plan: LoadPlan, manifest: Manifest, scalars: dict[Any, ManifestEntry]) -> None:
    """Which targets are filled together, or by a scalar: where any tensors are tied, or scalars."""
    for key, target in plan.found.items():
        if key in plan.leaders:
            continue
        if key not in scalars:
            plan.targets.setdefault(manifest.roots.get(key, key), []).append(target)
        elif target.spec.block is not None:
            raw = torch.frombuffer(bytearray(manifest.values[key]), dtype=torch.uint8)
            dtype = scalars[key].dtype
            assert dtype is not None
            plan.scalars.append((target, raw.view(dtype).view(())))
