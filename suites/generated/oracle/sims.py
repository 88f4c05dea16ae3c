"""Simulated tensors and the trees around them: what one rank holds, built from a case."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from generated import data

Case = dict[str, Any]
Mesh = tuple[tuple[int, ...], tuple[int, ...]]
"""(shape, ranks)"""


@dataclass(eq=False)
class Sim:
    """One tensor on one rank. Two that are the same object are tied."""

    kind: str
    """Tensor, Parameter, DTensor, DTensor Parameter or ShardedTensor; "any" may be anything."""
    local: torch.Tensor | None = None
    grad: bool = False
    size: tuple[int, ...] = ()
    dtype: str = ""
    mesh: Mesh | None = None
    placements: tuple[str, ...] = ()
    group: tuple[int, ...] | None = None
    boxes: Any = ()
    """Of a ShardedTensor: (offsets, sizes, global rank)."""
    shards: list[tuple[tuple[int, ...], torch.Tensor]] = field(default_factory=list)
    open: frozenset[str] = frozenset()
    """What of it nothing is said of: object, memory, bits, stride, grad, shared."""
    outside: bool = False
    """Whether this rank is not in its mesh: what torch gives it for a local part is no matter."""
    wrong: str = ""
    """shape, dtype or turned: how its local part is not what it claims."""

    @property
    def distributed(self) -> bool:
        return self.kind.startswith(("DTensor", "Sharded"))

    @property
    def meta(self) -> bool:
        return self.local is not None and self.local.is_meta

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that share it."""
        if self.mesh is not None:
            return self.mesh[1]
        return self.group or ()

    @property
    def travels(self) -> bool:
        """Whether a rank lacks something of it."""
        return self.kind == "ShardedTensor" or any(
            name != "R" and count > 1
            for name, count in zip(self.placements, self.mesh[0] if self.mesh else (), strict=True)
        )


ANY = Sim("any")
"""A leaf that may be anything."""
OPEN_RESULT = frozenset({"stride", "shared"})


def words(tensor: torch.Tensor) -> Any:
    """The elements of a tensor as an array of bytes of their width."""
    raw = data.raw(tensor).numpy().tobytes()
    return np.frombuffer(raw, dtype=f"V{tensor.dtype.itemsize}").reshape(tuple(tensor.shape))


def tensor_of(array: Any, dtype: str) -> torch.Tensor:
    """The tensor of an array of bytes."""
    return data.bits(dtype, array.shape, array.tobytes().hex())


def _chunks(indices: list[int], parts: int) -> list[list[int]]:
    """As even as rows can be: the first ones full, the last ones short or empty."""
    step = math.ceil(len(indices) / parts)
    return [indices[at * step : (at + 1) * step] for at in range(parts)]


def coordinate(mesh: Mesh, rank: int) -> tuple[int, ...]:
    """Where a rank sits in a mesh."""
    found = np.argwhere(np.array(mesh[1]).reshape(mesh[0]) == rank)
    return tuple(int(n) for n in found[0])


def numbers(mesh: Mesh, rank: int) -> tuple[int, ...]:
    """A rank's number in the group of each mesh dimension: torch sorts the ranks of a group."""
    table = np.array(mesh[1]).reshape(mesh[0])
    here = coordinate(mesh, rank)
    found = []
    for dim in range(len(here)):
        line: list[Any] = [*here[:dim], slice(None), *here[dim + 1 :]]
        found.append(sorted(table[tuple(line)].tolist()).index(rank))
    return tuple(found)


def indices_of(
    size: Sequence[int],
    mesh: Mesh,
    placements: Sequence[str],
    rank: int,
    place: Callable[[Mesh, int], tuple[int, ...]] = numbers,
) -> list[list[int]]:
    """For each dimension the global indices that a rank holds, in their order there."""
    held = [list(range(n)) for n in size]
    for count, at, name in zip(mesh[0], place(mesh, rank), placements, strict=True):
        if name.startswith("SS"):
            dim, factor = map(int, name[2:].split("x"))
            groups = [_chunks(some, count)[at] for some in _chunks(held[dim], factor)]
            held[dim] = [index for some in groups for index in some]
        elif name.startswith("S"):
            held[int(name[1:])] = _chunks(held[int(name[1:])], count)[at]
    return held


def cut(whole: torch.Tensor, mesh: Mesh, placements: Sequence[str], rank: int) -> torch.Tensor:
    """What a rank holds of a whole tensor."""
    if rank not in mesh[1]:
        return whole.new_empty(0)
    held = indices_of(tuple(whole.shape), mesh, placements, rank)
    if not held:
        return whole.clone()
    return tensor_of(words(whole)[np.ix_(*held)], data.name_of(whole.dtype))


def mesh_of(entry: dict[str, Any], rank: int) -> Mesh:
    """The mesh of an entry of the pool as this rank sees it: a line of one is its own line."""
    shape, ranks, line = entry["mesh"]
    if line is None:
        return shape, ranks
    table = np.array(ranks).reshape(shape)
    place: list[Any] = list(np.argwhere(table == rank)[0])
    place[line] = slice(None)
    row = tuple(int(n) for n in table[tuple(place)])
    return (len(row),), row


def build(case: Case, rank: int) -> dict[str, Any]:
    """The variables of a rank: t0, t1 ... and the trees."""
    env: dict[str, Any] = {}
    for number, entry in enumerate(case["pool"]):
        env[f"t{number}"] = make(case, entry, rank, env, number)
    for name, node in case["trees"].items():
        env[name] = env[node[1]] if node[0] == "same" else _build_node(node, env)
    for tree, count, number in case.get("many", ()):
        entry = case["pool"][number]
        for n in range(count):
            like = {**entry, "fill": entry.get("fill", 0) + n}
            env[tree][f"m{n}"] = make(case, like, rank, env, -1)
    for tree, who, key in case.get("lacks", ()):
        if who == rank:
            env[tree].pop(key, None)
    for tree in case.get("turned", ()):
        items = list(env[tree].items())
        turn = rank % len(items) if items else 0
        env[tree].clear()
        env[tree].update(items[turn:] + items[:turn])
    return env


def whole_of(entry: dict[str, Any], rank: int = 0) -> torch.Tensor:
    """The whole tensor of an entry of the pool."""
    if entry.get("meta"):
        kind = getattr(torch, entry["dtype"])
        return torch.empty(entry["shape"], dtype=kind, device="meta")
    if entry.get("pending"):
        return data.contribution(entry["dtype"], entry["shape"], rank)
    fill = entry.get("fill", 0) + (rank if entry.get("per_rank") else 0)
    return data.pattern(entry["dtype"], entry["shape"], fill)


def make(case: Case, entry: dict[str, Any], rank: int, env: dict[str, Any], number: int) -> Sim:
    """An entry of the pool on a rank."""
    if entry["kind"] == "view":
        base = env[f"t{entry['of']}"]
        local = data.view_of(base.local, entry["how"])
        return Sim("Tensor", local, size=tuple(local.shape), dtype=base.dtype)
    whole = whole_of(entry, rank)
    how = entry.get("layout", "contiguous")
    kind, grad = ("Parameter", entry["trains"]) if "trains" in entry else ("Tensor", False)
    common = {"size": entry["shape"], "dtype": entry["dtype"], "grad": grad}
    wrong = next((w for p, r, w in case.get("wrong", ()) if (p, r) == (number, rank)), "")
    if entry["kind"] == "dtensor":
        mesh = mesh_of(entry, rank)
        local = _cut_meta(whole, mesh, entry["placements"], rank)
        local = local if entry.get("meta") else data.laid_out(local, how)
        kind = "DTensor Parameter" if kind == "Parameter" else "DTensor"
        return Sim(
            kind,
            local,
            mesh=mesh,
            placements=entry["placements"],
            wrong=wrong,
            outside=rank not in mesh[1],
            **common,
        )
    if entry["kind"] == "sharded":
        group = entry.get("group") or tuple(range(case["world"]))
        shards = []
        boxes = tuple((tuple(o), tuple(s), group[n]) for o, s, n in entry["boxes"])
        for offsets, sizes, owner in boxes:
            if owner == rank:
                region = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
                shards.append((offsets, whole[region].clone()))
        return Sim(
            "ShardedTensor",
            None,
            boxes=boxes,
            group=group,
            shards=shards,
            wrong=wrong,
            **{**common, "grad": False},
        )
    return Sim(kind, whole if entry.get("meta") else data.laid_out(whole, how), **common)


def _cut_meta(
    whole: torch.Tensor, mesh: Mesh, placements: Sequence[str], rank: int
) -> torch.Tensor:
    if not whole.is_meta:
        return cut(whole, mesh, placements, rank)
    if rank not in mesh[1]:
        return whole.new_empty(0)
    held = indices_of(tuple(whole.shape), mesh, placements, rank)
    return whole.new_empty([len(indices) for indices in held])


def _build_node(node: Any, env: dict[str, Any]) -> Any:
    kind = node[0]
    if kind == "t":
        return env[f"t{node[1]}"]
    if kind == "odd":
        return slice(1, 2)
    if kind == "v":
        return node[1]
    if kind in ("list", "tuple", "Pair"):
        items = [_build_node(item, env) for item in node[1]]
        return data.Pair(*items) if kind == "Pair" else tuple(items) if kind == "tuple" else items
    pairs = [(key, _build_node(item, env)) for key, item in node[1]]
    makers: dict[str, Any] = {
        "module": dict,
        "dict": dict,
        "OrderedDict": OrderedDict,
        "with_metadata": data.with_metadata,
        "counted": data.counted,
    }
    return makers[kind](pairs)


Path = tuple[Any, ...]


def walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, leaf) of each leaf, in order."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from walk(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from walk(item, (*path, number))
    else:
        yield path, value


def rebuilt(value: Any, leaf: Any, path: Path = ()) -> Any:
    """The same containers around `leaf(path, value)` of each leaf."""
    if isinstance(value, Mapping):
        pairs = [(key, rebuilt(item, leaf, (*path, key))) for key, item in value.items()]
        if isinstance(value, defaultdict):
            return defaultdict(value.default_factory, pairs)
        kind: Any = type(value)
        made = kind(pairs)
        if hasattr(value, "_metadata"):
            made._metadata = value._metadata
        return made
    if isinstance(value, (list, tuple)):
        items = [rebuilt(item, leaf, (*path, number)) for number, item in enumerate(value)]
        if isinstance(value, data.Pair):
            return data.Pair(*items)
        return tuple(items) if isinstance(value, tuple) else items
    return leaf(path, value)


class Copies:
    """Copies of plain memory: what shared memory before shares memory after."""

    def __init__(self) -> None:
        self._made: dict[int, Sim] = {}
        self._storages: dict[int, torch.Tensor] = {}
        self._kept: list[Any] = []

    def of(self, sim: Sim, **changes: Any) -> Sim:
        """The copy of a tensor: the same one for the same object."""
        if id(sim) not in self._made:
            self._kept.append(sim)
            shards = [(o, t.clone()) for o, t in sim.shards]
            local = None if sim.local is None else self._memory(sim.local)
            more = {"open": OPEN_RESULT | {"object"}} | changes
            self._made[id(sim)] = replace(sim, local=local, shards=shards, **more)
        return self._made[id(sim)]

    def _memory(self, local: torch.Tensor) -> torch.Tensor:
        if local.is_meta or not local.numel():
            return local.clone() if local.is_meta else local.new_empty(local.shape)
        key = local.untyped_storage().data_ptr()
        if key not in self._storages:
            flat = torch.empty(0, dtype=torch.uint8).set_(local.untyped_storage())
            self._kept.append(local)
            self._storages[key] = flat.clone()
        made = torch.empty(0, dtype=local.dtype)
        made.set_(
            self._storages[key].untyped_storage(),
            local.storage_offset(),
            local.shape,
            local.stride(),
        )
        return made
