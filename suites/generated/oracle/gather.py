"""Sharded to whole, simulated: elements are put together by their global indices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from generated.oracle import sims
from generated.oracle.sims import ANY, OPEN_RESULT, Copies, Path, Sim, rebuilt, walk
from generated.oracle.steps import Scene, connected, rule, words_of
from generated.oracle.tell import Outcome


@rule("gather")
def gather(scene: Scene) -> list[Outcome]:
    """Every sharded leaf whole, on the ranks that want it."""
    step, ranks = scene.step, scene.ranks
    leaves = [dict(walk(scene.tree(rank))) for rank in ranks]
    bad = _bad(leaves, bool(step.get("type_check", True)))
    groups = [
        leaf.members
        for some in leaves
        for leaf in some.values()
        if isinstance(leaf, Sim) and leaf.distributed
    ]
    met = connected([*groups, *([scene.pg] if step.get("pg") else [])], len(ranks))
    takers = {scene.pg[n] for n in step.get("ranks_only", ()) if 0 <= n < len(scene.pg)}
    outcomes = []
    for rank in ranks:
        wrong = [path for other, path in bad if other in met[rank]]
        if wrong:
            outcomes.append(Outcome(raises=tuple(w for path in wrong for w in words_of(path))))
        elif step.get("ranks_only") and rank not in takers:
            outcomes.append(Outcome({}))
        else:
            outcomes.append(Outcome(_whole_tree(scene.tree(rank), leaves, rank)))
    return outcomes


def _bad(leaves: list[dict[Path, Any]], type_check: bool) -> list[tuple[int, Path]]:
    """(rank, path) of what is wrong on a rank."""
    found = []
    for rank, mine in enumerate(leaves):
        for path, leaf in mine.items():
            if isinstance(leaf, slice) and type_check:
                found.append((rank, path))
            if not isinstance(leaf, Sim) or not leaf.distributed or rank not in leaf.members:
                continue
            if leaf.wrong:
                found.append((rank, path))
            for other in leaf.members:
                if leaf.travels and not _alike(leaf, leaves[other].get(path)):
                    found.append((rank, path))
    return found


def _alike(ours: Sim, theirs: Any) -> bool:
    def said(sim: Sim) -> Any:
        return sim.kind[:7], sim.size, sim.dtype, sim.mesh, sim.placements, sim.boxes

    return isinstance(theirs, Sim) and said(ours) == said(theirs)


def _whole_tree(tree: Any, leaves: list[dict[Path, Any]], rank: int) -> Any:
    copies = Copies()
    made: dict[int, Sim] = {}

    def leaf(path: Path, value: Any) -> Any:
        if not isinstance(value, Sim):
            return value
        if not value.distributed:
            return copies.of(value)
        if rank not in value.members:
            return ANY
        if id(value) not in made:
            peers = {r: leaves[r].get(path, value) for r in value.members}
            # Where no rank has an element nobody can tell what is tied.
            more = {"object"} if 0 in value.size else set()
            made[id(value)] = Sim("Tensor", whole(peers), open=OPEN_RESULT | more)
        return made[id(value)]

    return rebuilt(tree, leaf)


def whole(peers: Mapping[int, Sim]) -> torch.Tensor:
    """The whole tensor from what each rank holds of it."""
    one = next(iter(peers.values()))
    kind = getattr(torch, one.dtype)
    full = np.empty(one.size, dtype=f"V{kind.itemsize}")
    if one.kind == "ShardedTensor":
        for sim in peers.values():
            for offsets, shard in sim.shards:
                region = tuple(slice(o, o + n) for o, n in zip(offsets, shard.shape, strict=True))
                full[region] = sims.words(shard)
        return sims.tensor_of(full, one.dtype)
    assert one.mesh is not None
    pending = [name for name in one.placements if name.startswith("P")]
    if pending:
        return _reduced(peers, pending[0][2:] or "sum")
    for rank, sim in peers.items():
        assert sim.local is not None
        held = sims.indices_of(one.size, one.mesh, one.placements, rank)
        if held:
            full[np.ix_(*held)] = sims.words(sim.local)
        else:
            full[()] = sims.words(sim.local)[()]
    return sims.tensor_of(full, one.dtype)


def _reduced(peers: Mapping[int, Sim], op: str) -> torch.Tensor:
    """Contributions are folded over the mesh dimensions whose result is pending."""
    one = next(iter(peers.values()))
    assert one.mesh is not None
    parts: dict[tuple[int, ...], list[torch.Tensor]] = {}
    kept = [n for n, name in enumerate(one.placements) if name.startswith("S")]
    held: dict[tuple[int, ...], Any] = {}
    dims = [n for n, name in enumerate(one.placements) if name == "R"]
    for rank, sim in peers.items():
        at = sims.numbers(one.mesh, rank)
        if any(at[n] for n in dims):
            continue  # a replica
        place = tuple(at[n] for n in kept)
        assert sim.local is not None
        parts.setdefault(place, []).append(sim.local)
        held[place] = sims.indices_of(one.size, one.mesh, one.placements, rank)
    kind = getattr(torch, one.dtype)
    full = np.empty(one.size, dtype=f"V{kind.itemsize}")
    for place, some in parts.items():
        total = _fold(some, op)
        if held[place]:
            full[np.ix_(*held[place])] = sims.words(total)
        else:
            full[()] = sims.words(total)[()]
    return sims.tensor_of(full, one.dtype)


def _fold(parts: list[torch.Tensor], op: str) -> torch.Tensor:
    dtype = parts[0].dtype
    wide = torch.float64 if dtype.is_floating_point else torch.int64
    stacked = torch.stack([part.to(wide) for part in parts])
    if op == "max":
        return stacked.max(0).values.to(dtype)
    if op == "min":
        return stacked.min(0).values.to(dtype)
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)  # from nothing: the sum of negative zeros is one
    if op == "avg":
        exact = wide.is_floating_point
        total = total / len(parts) if exact else torch.div(total, len(parts), rounding_mode="trunc")
    return total.to(dtype)


@rule("all_gather")
def all_gather(scene: Scene) -> list[Outcome]:
    """One ShardedTensor, whole on every rank of its group."""
    name = f"t{scene.step['tensor']}"
    peers = {rank: scene.envs[rank][name] for rank in scene.ranks}
    if any(sim.wrong for sim in peers.values()):
        return [Outcome(raises=()) for _ in scene.ranks]
    return [Outcome(Sim("Tensor", whole(peers), open=OPEN_RESULT)) for _ in scene.ranks]
