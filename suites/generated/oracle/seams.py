"""What carries one tensor between tensor and data parallelism, simulated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from generated.oracle import sims
from generated.oracle.gather import whole
from generated.oracle.sims import OPEN_RESULT, Sim
from generated.oracle.steps import Scene, rule
from generated.oracle.tell import Outcome

_LOOSE = frozenset({"kind", "object", "shared"})


def _tensors(scene: Scene) -> list[Sim]:
    return [env[f"t{scene.step['tensor']}"] for env in scene.envs]


@rule("flatten_tensor")
def flatten_tensor(scene: Scene) -> list[Outcome]:
    """A DTensor's local tensor over the same memory, which trains where it does, and its spec."""
    outcomes = []
    for sim in _tensors(scene):
        if sim.mesh is None:
            outcomes.append(Outcome({"local": sim, "spec": None}))
            continue
        spec = sim.mesh, rig_names(sim), sim.size
        local = Sim("Tensor", sim.local, sim.grad, open=_LOOSE)
        outcomes.append(Outcome({"local": local, "spec": spec}))
    return outcomes


def rig_names(sim: Sim) -> tuple[str, ...]:
    """The placements as a rank tells them."""
    return tuple("P-sum" if name == "P" else name for name in sim.placements)


@rule("unflatten_tensor")
def unflatten_tensor(scene: Scene) -> list[Outcome]:
    """The same DTensor again, over the same memory."""
    return [
        Outcome(sim if sim.mesh is None else replace(sim, open=_LOOSE)) for sim in _tensors(scene)
    ]


@rule("sync_grad")
def sync_grad(scene: Scene) -> list[Outcome]:
    """A pending gradient finished; anything else as it is."""
    tensors = _tensors(scene)
    if not scene.step.get("pending"):
        return [Outcome(sim) for sim in tensors]
    total: Any = sum(sim.local for sim in tensors if sim.local is not None)
    return [Outcome(Sim("Tensor", total, open=OPEN_RESULT)) for _ in tensors]


@rule("all_gather_dtensor")
def all_gather_dtensor(scene: Scene) -> list[Outcome]:
    """What tensor parallelism, the last mesh dimension, holds on a rank."""
    peers = dict(enumerate(_tensors(scene)))
    full = sims.whole_of(scene.case["pool"][scene.step["tensor"]])
    if any(sim.wrong for sim in peers.values()):
        return [_told_of_a_lie(sim, peers) for sim in peers.values()]
    full = whole(peers)
    outcomes = []
    for rank, sim in peers.items():
        assert sim.mesh is not None
        kept = ("R",) * (len(sim.placements) - 1) + sim.placements[-1:]
        if kept[-1].startswith("SS"):
            kept = (*kept[:-1], "S" + kept[-1][2:].split("x")[0])
        local = sims.cut(full, sim.mesh, kept, rank)
        outcomes.append(Outcome(Sim("Tensor", local, open=OPEN_RESULT)))
    return outcomes


def _told_of_a_lie(sim: Sim, peers: dict[int, Sim]) -> Outcome:
    """The rank that is wrong finds it, and those that gather with it; others may."""
    if sim.wrong:
        return Outcome(raises=(), kinds=("ValueError",))
    assert sim.mesh is not None
    outer = any(
        name != "R" and count > 1
        for name, count in zip(sim.placements[:-1], sim.mesh[0][:-1], strict=True)
    )
    row = {other: sims.coordinate(sim.mesh, other)[-1] for other in peers}
    me = next(rank for rank, other in peers.items() if other is sim)
    with_it = any(peers[other].wrong and row[other] == row[me] for other in peers)
    if outer and with_it:
        return Outcome(raises=(), kinds=("ValueError",))
    return Outcome(open=True)


@rule("chunk_dtensor")
def chunk_dtensor(scene: Scene) -> list[Outcome]:
    """FSDP's chunk of a tensor, over the root mesh, whose last dimension is tensor parallelism's.

    Of uneven shards of dimension 0 other dimensions may be cut: there the result is only held to
    be, of all ranks together, the tensor.
    """
    shape, ranks, _ = scene.step["mesh"]
    root = shape, ranks
    outcomes = []
    for rank, sim in enumerate(_tensors(scene)):
        held = sim.placements[-1] if sim.mesh is not None else "R"
        size = sim.size
        if not size:
            names = ("R", "R")
        elif held == "S0":
            if size[0] % (shape[0] * shape[1]) or 1 in shape:
                outcomes.append(Outcome(open=True))
                continue
            names = (f"SS0x{shape[1]}", "S0")
        else:
            names = ("S0", held)
        full = sims.whole_of(scene.case["pool"][scene.step["tensor"]])
        local = sims.cut(full, root, names, rank)
        outcomes.append(
            Outcome(
                Sim(
                    "DTensor",
                    local,
                    size=size,
                    dtype=sim.dtype,
                    mesh=root,
                    placements=names,
                    open=OPEN_RESULT,
                )
            )
        )
    return outcomes


@rule("chunk_tensor")
def chunk_tensor(scene: Scene) -> list[Outcome]:
    """FSDP's chunk of a plain tensor: rows, as torch.chunk cuts them."""
    size = len(scene.ranks)
    outcomes = []
    for rank, sim in enumerate(_tensors(scene)):
        assert sim.local is not None
        mesh = (size,), tuple(scene.ranks)
        boxes, shards = [], []
        for owner in scene.ranks:
            rows = sims.indices_of(sim.size, mesh, ("S0",), owner)[0]
            if not rows:
                continue
            offsets = (rows[0], *([0] * (len(sim.size) - 1)))
            boxes.append((offsets, (len(rows), *sim.size[1:]), owner))
            if owner == rank:
                shards.append((offsets, sims.cut(sim.local, mesh, ("S0",), rank)))
        made = Sim(
            "ShardedTensor",
            size=sim.size,
            dtype=sim.dtype,
            boxes=boxes,
            shards=shards,
            open=OPEN_RESULT,
        )
        outcomes.append(Outcome(made))
    return outcomes


def _boxes(sim: Sim) -> list[Any]:
    """(offsets, sizes) of the shards of a DTensor on a mesh of one dimension, in order."""
    assert sim.mesh is not None
    found = []
    for rank in sim.mesh[1]:
        held = sims.indices_of(sim.size, sim.mesh, sim.placements, rank, sims.coordinate)
        sizes = tuple(len(some) for some in held)
        starts = tuple(
            some[0] if some else total for some, total in zip(held, sim.size, strict=True)
        )
        found.append((starts, sizes))
    # A dimension without elements begins at 0, wherever it is not the one that is cut.
    cut = int(sim.placements[0][1:]) if sim.placements[0] != "R" else -1
    return [
        (
            tuple(o if d == cut or n else 0 for d, (o, n) in enumerate(zip(*box, strict=True))),
            box[1],
        )
        for box in found
    ]


@rule("box_for")
def box_for(scene: Scene) -> list[Outcome]:
    """Where each shard lies in the tensor, the same on every rank."""
    return [Outcome(_boxes(sim)) for sim in _tensors(scene)]


@rule("metadata")
def metadata(scene: Scene) -> list[Outcome]:
    """Metadata of all shards, the same on every rank."""
    outcomes = []
    for sim in _tensors(scene):
        assert sim.mesh is not None
        boxes = [(*box, rank) for box, rank in zip(_boxes(sim), sim.mesh[1], strict=True)]
        if sim.placements == ("R",):
            boxes = boxes[:1]
        outcomes.append(Outcome((sim.size, sim.dtype, boxes)))
    return outcomes
