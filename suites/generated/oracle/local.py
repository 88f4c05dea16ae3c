"""What one rank does alone, simulated: copies, snapshots, buffers, walks, comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from generated import data
from generated.oracle.sims import OPEN_RESULT, Copies, Path, Sim, rebuilt, walk
from generated.oracle.steps import Scene, rule, words_of
from generated.oracle.tell import Outcome

MISMATCH = ("CompanionMismatch",)


class Unlike(Exception):  # noqa: N818  (it is caught here)
    """Two state dicts differ at a path."""


def _each(scene: Scene, body: Callable[[int], Outcome]) -> list[Outcome]:
    return [body(rank) for rank in scene.ranks]


def _refused(scene: Scene, tree: Any) -> Outcome | None:
    """The refusal of a leaf that no checkpoint holds."""
    for path, leaf in walk(tree):
        if isinstance(leaf, slice) and scene.step.get("type_check", True):
            return Outcome(raises=words_of(path), kinds=("ValueError",))
    return None


@rule("offload")
def offload(scene: Scene) -> list[Outcome]:
    """A snapshot in memory of its own."""

    def one(rank: int) -> Outcome:
        tree = scene.tree(rank)
        if refused := _refused(scene, tree):
            return refused
        wanted = scene.step.get("ranks_only", ())
        if wanted and rank not in wanted:
            return Outcome({})
        copies = Copies()
        return Outcome(rebuilt(tree, lambda _, v: copies.of(v) if isinstance(v, Sim) else v))

    return _each(scene, one)


@rule("create")
def create(scene: Scene) -> list[Outcome]:
    """New buffers of the same structure, contents open."""
    share = bool(scene.step.get("share_memory"))

    def one(rank: int) -> Outcome:
        copies = Copies()
        shared: dict[int, Sim] = {}

        def leaf(_: Path, value: Any) -> Any:
            if not isinstance(value, Sim):
                return value
            kind = value.kind.replace("DTensor Parameter", "DTensor").replace("Parameter", "Tensor")
            opened = frozenset({"stride", "bits", "object"} | (set() if share else {"shared"}))
            made = copies.of(value, kind=kind, grad=False, open=opened)
            if made.meta:
                made = replace(made, local=torch.empty(made.local.shape, dtype=made.local.dtype))  # type: ignore[union-attr]
            if share and id(value) not in shared:
                for tensor in [made.local, *(t for _, t in made.shards)]:
                    if tensor is not None and tensor.numel():
                        tensor.share_memory_()
                shared[id(value)] = made
            return shared.get(id(value), made)

        return Outcome(rebuilt(scene.tree(rank), leaf))

    return _each(scene, one)


def pairs(ours: Any, theirs: Any, path: Path = ()) -> Iterator[tuple[Path, Any, Any]]:
    """(path, leaf, what the other has there); raises Unlike where containers differ."""
    if isinstance(ours, Mapping):
        if not isinstance(theirs, Mapping) or set(ours) != set(theirs):
            raise Unlike(path)
        for key, value in ours.items():
            yield from pairs(value, theirs[key], (*path, key))
    elif isinstance(ours, (list, tuple)):
        if not isinstance(theirs, (list, tuple)) or len(ours) != len(theirs):
            raise Unlike(path)
        for number, (value, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from pairs(value, other, (*path, number))
    else:
        if isinstance(theirs, (Mapping, list, tuple)):
            raise Unlike(path)
        yield path, ours, theirs


def _same_kind(ours: Sim, theirs: Sim) -> bool:
    def said(sim: Sim) -> Any:
        kind = "DTensor" if sim.mesh else "Sharded" if sim.boxes else "Tensor"
        return kind, sim.size, sim.dtype, sim.mesh, sim.placements, tuple(o for o, _ in sim.shards)

    return said(ours) == said(theirs)


@rule("similar")
def similar(scene: Scene) -> list[Outcome]:
    """Whether structure, kinds, shapes, dtypes and placements agree."""

    def one(rank: int) -> Outcome:
        try:
            found = list(pairs(scene.tree(rank, "state"), scene.tree(rank, "other")))
        except Unlike:
            return Outcome(False)
        for _, ours, theirs in found:
            tensors = [isinstance(v, Sim) for v in (ours, theirs)]
            if any(tensors) and not (all(tensors) and _same_kind(ours, theirs)):
                return Outcome(False)
        return Outcome(True)

    return _each(scene, one)


@rule("copy")
def copy(scene: Scene) -> list[Outcome]:
    """The tensors of one state dict into those of another."""

    def one(rank: int) -> Outcome:
        return copied(scene, scene.tree(rank, "state"), scene.tree(rank, "other"))

    return _each(scene, one)


def copied(scene: Scene, state: Any, other: Any) -> Outcome:
    """What a copy into `other` comes to; writes into the simulated memory."""
    refused = _refused(scene, state)
    try:
        found = list(pairs(state, other))
    except Unlike as error:
        if refused:
            return Outcome(raises=(), kinds=(*MISMATCH, *refused.kinds))
        return Outcome(raises=words_of(error.args[0]) if error.args[0] else (), kinds=MISMATCH)
    if refused:
        return refused
    for path, ours, theirs in found:
        unlike = isinstance(ours, Sim) and (
            not isinstance(theirs, (Sim, type(None)))
            or (isinstance(theirs, Sim) and not _same_kind(ours, theirs))
        )
        if unlike:
            return Outcome(raises=words_of(path), kinds=MISMATCH)
    results: dict[Path, Any] = {}
    for path, ours, theirs in found:
        if not isinstance(ours, Sim):
            results[path] = ours
        elif theirs is None:
            results[path] = Copies().of(ours)
        else:
            _write(theirs, ours)
            results[path] = theirs
    return Outcome(rebuilt(state, lambda path, _: results[path]))


def _write(target: Sim, source: Sim) -> None:
    if target.local is not None and target.local.numel() and source.local is not None:
        data.written(target.local, source.local)
    for (_, mine), (_, theirs) in zip(target.shards, source.shards, strict=True):
        if mine.numel():
            data.written(mine, theirs)


@rule("iterate")
def iterate(scene: Scene) -> list[Outcome]:
    """The same containers around what a function makes of each tensor."""
    step = scene.step

    def one(rank: int) -> Outcome:
        tree = scene.tree(rank)
        here = not step.get("ranks_only") or rank in step["ranks_only"]
        other = scene.tree(rank, "other") if step.get("companion") else None
        if other is not None and not here:
            # Whether the companions of a rank that wants nothing fit is nobody's matter.
            if _refused(scene, tree):
                return Outcome(raises=(), kinds=("ValueError", *MISMATCH))
            return Outcome({}, may_raise=True)
        if other is not None:
            return copied(scene, tree, other)
        found = _refused(scene, tree) or Outcome(rebuilt(tree, _made_by(step, tree)))
        if not here and found.raises is None:
            found.result = {}
        return found

    return _each(scene, one)


def _twice(tree: Any) -> set[int]:
    """Those of which the tree has another object over the very same memory: they may become one."""
    seen: dict[Any, set[int]] = {}
    for _, sim in walk(tree):
        if isinstance(sim, Sim) and sim.local is not None:
            local = sim.local
            place = local.untyped_storage().data_ptr(), local.storage_offset()
            seen.setdefault((*place, local.shape, local.stride()), set()).add(id(sim))
    return set().union(*(ids for ids in seen.values() if len(ids) > 1), set())


def _made_by(step: dict[str, Any], tree: Any) -> Callable[[Path, Any], Any]:
    offloads, doubles = step.get("cpu_offload"), step.get("by") == "doubled"
    copies = Copies()
    doubled: dict[int, Sim] = {}

    def leaf(_: Path, value: Any) -> Any:
        if not isinstance(value, Sim):
            return value
        if doubles:
            if id(value) not in doubled:
                kind = value.kind.replace(" Parameter", "").replace("Parameter", "Tensor")
                tied = {"memory"} if id(value) in twice else set()
                doubled[id(value)] = Copies().of(
                    value, kind=kind, grad=False, open=OPEN_RESULT | {"object"} | tied
                )
            return doubled[id(value)]
        if offloads:
            return copies.of(value)
        return replace(value, open=frozenset({"object"})) if id(value) in twice else value

    twice = _twice(tree)
    return leaf
