"""What this rank does with the tensors that the source has, and what it tells the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from shardproof._core.comms.agreement import Failure
from shardproof._core.loading.manifest import Offer, Offers
from shardproof._core.loading.requirements import Need
from shardproof._core.loading.target_spec import Model
from shardproof._core.loading.targets import Target, Targets, winners
from shardproof._core.loading.value_checks import check_kinds
from shardproof._core.sharding.domain import Domain
from shardproof._core.sharding.target_part import WHOLE, Place
from shardproof._core.tensors.properties import CPU


@dataclass
class _Plan:
    """What this rank will do with what the source offers.

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

    def other_shapes(self) -> dict[Any, tuple[int, ...]]:
        """Key -> the shape of a plain target, where it is not the full tensor's."""
        shapes = ((key, target.model.other_shape) for key, target in self.found.items())
        return {key: shape for key, shape in shapes if shape is not None}

    def columns(self, offers: Offers, domain: Domain) -> _Columns:
        """What this rank needs, told alike on all ranks where it is alike."""
        every = set(domain.members)
        # A replicated target on a mesh of all these ranks needs what a plain one needs.
        seen: dict[Place, Place] = {WHOLE: WHOLE}
        known: dict[Model, Need] = {}
        numbers: dict[Need, int] = {}
        told: dict[Model, tuple[int, ...]] = {}

        def need(model: Model) -> Need:
            found = known.get(model)
            if found is None:
                place = seen.get(model.place)
                if place is None:
                    place = model.place
                    whole = not place.cuts and every <= set(place.members)
                    place = seen[place] = WHOLE if whole else place
                found = known[model] = place, model.receives_directly(domain.device)
            return found

        wanted: list[tuple[int, ...]] = []
        for key in offers.keys:
            targets = self.targets.get(key)
            if not targets:
                wanted.append(())
            elif len(targets) == 1:
                model = targets[0].model
                mine = told.get(model)
                if mine is None:
                    mine = told[model] = (numbers.setdefault(need(model), len(numbers)),)
                wanted.append(mine)
            else:
                needs = dict.fromkeys((need(target.model)[0], False) for target in targets)
                wanted.append(tuple([numbers.setdefault(n, len(numbers)) for n in needs]))
        return list(numbers), wanted, self.other_shapes()


_Columns = tuple[list[Need], list[tuple[int, ...]], dict[Any, tuple[int, ...]]]
"""(the distinct needs, per offered key which of them, plain targets of another shape than the full
tensor), the same on ranks with the same needs."""


def _unlike_shapes(domain: Domain, offers: Offers, told: list[_Columns]) -> Failure | None:
    """A plain target that only some ranks have in another shape than the full tensor.

    Where all have, their modules adapt what they are given, or refuse it on every rank.
    """
    sizes: dict[Any, tuple[int, ...]] = {}
    for key in sorted(set().union(*[theirs[2] for theirs in told]), key=str):
        if not sizes:
            sizes = {key: offer.size for key, offer in offers.items()}
        place = offers.keys.index(key)
        having = [index for index, theirs in enumerate(told) if theirs[1][place]]
        shapes = [told[index][2].get(key, sizes[key]) for index in having]
        if len(set(shapes)) > 1:
            odd = next(i for i, shape in zip(having, shapes, strict=True) if shape != sizes[key])
            return Failure(
                "ValueError",
                f"{domain.name(odd)}: {key!r}: the target has shape {told[odd][2][key]}, expected "
                f"{sizes[key]} as the full tensor has, and as other ranks have",
                True,
            )
    return None


def _merged(told: list[_Columns]) -> tuple[list[Need], list[list[tuple[int, ...]]]]:
    """One numbering for what several ranks told."""
    numbers: dict[Need, int] = {}
    merged = []
    for kinds, wanted, _ in told:
        new = [numbers.setdefault(need, len(numbers)) for need in kinds]
        merged.append([tuple([new[number] for number in needs]) for needs in wanted])
    return list(numbers), merged


def _plan(
    offers: Offers,
    local: dict[str, Any],
    targets: Targets,
    device: torch.device,
    strict: bool,
) -> _Plan:
    plan = _Plan()
    found, kinds = plan.found, offers.kinds
    scalars: dict[Any, Offer] = {}
    for key, number in zip(offers.keys, offers.numbers, strict=True):
        value, offer = local.get(key), kinds[number]
        if value is None and (key not in local or offer.kind in ("tensor", "opaque")):
            continue
        if offer.kind == "value":
            check_kinds(key, value, type(offers.values[key]).__name__, 0)
            plan.values[key] = offers.values[key]
            continue
        if offer.kind == "opaque":
            raise TypeError(
                f"{key!r}: the full tensor is {offers.values[key]}, expected a torch.strided one "
                "that is neither quantized nor a wrapper of several tensors"
            )
        here = device
        if offer.kind == "scalar":
            scalars[key] = offer
            if not isinstance(value, DTensor) and not getattr(value, "is_meta", False):
                here = CPU
        if not isinstance(value, torch.Tensor):
            check_kinds(key, value, "Tensor", len(offer.size))
        assert offer.dtype is not None
        found[key] = targets.target(key, value, offer.size, offer.dtype, here, number)
    plan.leaders = winners(found)
    if plan.leaders or offers.roots or scalars:
        _sort(plan, offers, scalars)
    else:
        plan.targets = {key: [target] for key, target in found.items()}
    if strict:
        known = set(offers.keys)
        plan.removed = [key for key in local if key not in known]
    return plan


def _sort(plan: _Plan, offers: Offers, scalars: dict[Any, Offer]) -> None:
    """Which targets are filled together, or by a scalar: where any tensors are tied, or scalars."""
    for key, target in plan.found.items():
        if key in plan.leaders:
            continue
        if key not in scalars:
            plan.targets.setdefault(offers.roots.get(key, key), []).append(target)
        elif target.model.block is not None:
            raw = torch.frombuffer(bytearray(offers.values[key]), dtype=torch.uint8)
            dtype = scalars[key].dtype
            assert dtype is not None
            plan.scalars.append((target, raw.view(dtype).view(())))
