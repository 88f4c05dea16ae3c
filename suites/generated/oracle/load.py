"""Whole to sharded, simulated: broadcast from one rank, or cut by each rank for itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from generated import data
from generated.oracle import sims
from generated.oracle.sims import OPEN_RESULT, Sim
from generated.oracle.steps import Scene, rule
from generated.oracle.tell import Outcome

_NUMBERS = (bool, int, float, complex, str)


@rule("broadcast")
def broadcast(scene: Scene) -> list[Outcome]:
    """The first rank's full dict lands in every rank's local one."""
    step, group = scene.step, scene.pg
    full = scene.tree(group[0], "full")
    flaws = [key for rank in group for key in _flaws(full, scene.tree(rank, "local"))]
    outcomes = []
    for rank in scene.ranks:
        if rank not in group:
            outcomes.append(Outcome(None))
        elif flaws:
            outcomes.append(Outcome(raises=tuple(map(str, flaws))))
        else:
            local = scene.tree(rank, "local")
            _land(full, local, rank, in_place=True)
            for key in [k for k in local if step.get("strict") and k not in full]:
                del local[key]
            outcomes.append(Outcome(None))
    return outcomes


@rule("broadcast_tensors")
def broadcast_tensors(scene: Scene) -> list[Outcome]:
    """Some keys of the first rank's full dict; what is missing or None stays so."""
    group, keys = scene.pg, set(scene.step["keys"])
    chosen = {k: v for k, v in scene.tree(group[0], "full").items() if k in keys}
    locals_ = [
        {k: v for k, v in scene.tree(rank, "local").items() if v is not None and k in keys}
        for rank in scene.ranks
    ]
    flaws = [key for rank in group for key in _flaws(chosen, locals_[rank])]
    for rank in scene.ranks:
        if not flaws:
            _land(chosen, locals_[rank], rank, in_place=True)
            scene.tree(rank, "local").update(locals_[rank])
    return [Outcome(raises=tuple(map(str, flaws)) if flaws else None) for _ in scene.ranks]


@rule("distribute_tensors")
def distribute_tensors(scene: Scene) -> list[Outcome]:
    """(DTensor, full tensor) pairs become the DTensors with this rank's part; the rest stays."""
    outcomes = []
    for rank in scene.ranks:
        local = scene.tree(rank, "local")
        pairs = {key: local[key] for key in scene.step["keys"] if isinstance(local.get(key), tuple)}
        held = {key: pair[0] for key, pair in pairs.items()}
        full = {key: pair[1] for key, pair in pairs.items()}
        flaws = list(_flaws(full, held))
        if not flaws:
            _land(full, held, rank, in_place=True)
            local.update(held)
        outcomes.append(Outcome(raises=tuple(map(str, flaws)) if flaws else None))
    return outcomes


@rule("distribute")
def distribute(scene: Scene) -> list[Outcome]:
    """Each rank cuts its own part out of its own full dict."""
    outcomes = []
    for rank in scene.ranks:
        full, local = scene.tree(rank, "full"), scene.tree(rank, "local")
        flaws = list(_flaws(full, local))
        if flaws:
            outcomes.append(Outcome(raises=tuple(map(str, flaws))))
        else:
            _land(full, local, rank, in_place=False)
            outcomes.append(Outcome(None))
    return outcomes


def _flaws(full: dict[Any, Any], local: dict[Any, Any]) -> list[Any]:
    """The keys whose targets cannot take what the full dict has."""
    found = []
    for key, value in full.items():
        if key not in local:
            continue
        target = local[key]
        if not isinstance(value, Sim):
            dims = len(target.size) if isinstance(target, Sim) else 0
            if isinstance(value, _NUMBERS) and dims:
                found.append(key)
        elif value.distributed:
            found.append(key)
        elif not isinstance(target, Sim):
            if isinstance(target, _NUMBERS) and value.size:
                found.append(key)
        elif target.kind == "ShardedTensor" or (
            target.mesh is not None and not _fits(value, target)
        ):
            found.append(key)
    return found


def _fits(value: Sim, target: Sim) -> bool:
    sizes = value.size == target.size or (not target.size and value.size == (1,))
    theirs, mine = getattr(torch, value.dtype), getattr(torch, target.dtype)
    pending = any(name.startswith("P") for name in target.placements)
    wrong = bool(target.wrong) and not target.outside
    return sizes and not pending and not wrong and not (theirs.is_complex and not mine.is_complex)


def _land(full: dict[Any, Any], local: dict[Any, Any], rank: int, *, in_place: bool) -> None:
    assigned = any(isinstance(target, Sim) and target.meta for target in local.values())
    made: dict[int, Sim] = {}
    kept: list[Sim] = []
    new: dict[Any, Any] = {}
    for key in reversed(full):  # of tied targets the last key's values are in all of them
        value = full[key]
        if key not in local:
            continue
        target = local[key]
        if not isinstance(value, Sim):
            new[key] = value
        elif target is None and value.size:
            continue
        elif not isinstance(target, Sim):
            new[key] = _plain(value, "")
        else:
            if id(target) not in made:
                kept.append(target)
                made[id(target)] = _filled(value, target, rank, in_place, assigned)
            new[key] = made[id(target)]
    local.update(new)


def _plain(value: Sim, dtype: str) -> Sim:
    assert value.local is not None
    whole = _converted(value.local, dtype or value.dtype)
    return Sim(
        "Tensor", whole.clone(), size=value.size, dtype=dtype or value.dtype, open=OPEN_RESULT
    )


def _filled(value: Sim, target: Sim, rank: int, in_place: bool, assigned: bool) -> Sim:
    assert value.local is not None
    if target.mesh is None:
        same = assigned and _floats(value.dtype) and _floats(value.dtype) == _floats(target.dtype)
        return _plain(value, target.dtype if same else "")
    assert target.local is not None
    if rank not in target.mesh[1]:
        if in_place and not target.meta:
            return target
        outside = torch.empty(0, dtype=getattr(torch, target.dtype))
        # torch itself gives a Parameter on meta memory outside of its mesh.
        loose = OPEN_RESULT | ({"kind", "object", "grad"} if target.meta else set())
        return replace(target, kind="DTensor", grad=False, local=outside, open=loose)
    kept = in_place and not target.meta
    dtype = target.dtype if kept or not _overflows(value.dtype, target.dtype) else value.dtype
    whole = _converted(value.local, dtype).reshape(target.size)
    mine = sims.cut(whole, target.mesh, target.placements, rank)
    if kept:
        if mine.numel() and not target.wrong:
            data.written(target.local, mine)
        return target
    return replace(
        target, kind="DTensor", dtype=dtype, grad=False, local=mine, open=OPEN_RESULT, wrong=""
    )


def _overflows(theirs: str, mine: str) -> bool:
    """Whether values of one dtype do not fit into the other, which has integers."""
    if _floats(mine):
        return False
    extremes = [torch.tensor([0, 1])] if theirs == "bool" else []
    if not _floats(theirs) and theirs != "bool":
        info = torch.iinfo(getattr(torch, theirs))
        extremes = [torch.tensor([info.min, info.max], dtype=getattr(torch, theirs))]
    return not extremes or any(
        one.to(getattr(torch, mine)).to(one.dtype).tolist() != one.tolist() for one in extremes
    )


def _floats(name: str) -> str:
    kind = getattr(torch, name)
    return "complex" if kind.is_complex else "float" if kind.is_floating_point else ""


def _converted(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    plain = tensor.detach()
    return plain if data.name_of(plain.dtype) == dtype else plain.to(getattr(torch, dtype))
