"""Draws that cases of all functions share: meshes, placements, tensors, keys, trees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

Entry = dict[str, Any]
Mesh = tuple[tuple[int, ...], tuple[int, ...], int | None]

DTYPES = (
    *("float32", "int64", "bfloat16", "bool", "float64", "uint8", "int16", "uint16", "int8"),
    *("float16", "int32", "uint32", "uint64", "complex64", "complex128", "complex32"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"),
)
MESHES: dict[int, tuple[Mesh, ...]] = {
    1: (((1,), (0,), None), ((1, 1), (0,), None)),
    2: (
        *(((2,), (0, 1), None), ((2,), (1, 0), None), ((1,), (1,), None), ((1,), (0,), None)),
        *(((1, 2), (0, 1), None), ((2, 1), (1, 0), None), ((1, 2, 1), (0, 1), None)),
    ),
    3: (
        *(((3,), (0, 1, 2), None), ((3,), (2, 0, 1), None), ((2,), (1, 2), None)),
        *(((2,), (0, 1), None), ((1,), (2,), None), ((1, 3), (1, 2, 0), None)),
    ),
    4: (
        *(((4,), (0, 1, 2, 3), None), ((2, 2), (0, 1, 2, 3), None)),
        *(((2, 2), (3, 1, 2, 0), None), ((2, 2), (0, 1, 2, 3), 0), ((2, 2), (0, 1, 2, 3), 1)),
        *(((2,), (1, 2), None), ((3,), (1, 2, 3), None), ((2,), (0, 1), None)),
        *(((2, 1, 2), (0, 1, 2, 3), None), ((2, 2, 1), (2, 3, 0, 1), None)),
        *(((4,), (3, 1, 0, 2), None), ((1, 4), (0, 1, 2, 3), None)),
    ),
}
"""Meshes by the size of the world, simple ones first; all are kept by a world that ran them."""
KEYS: tuple[Any, ...] = (
    *("a", "b", 0, 1, "0", "1", None, True, "a.b", "", "a.b.0", ".", "ü", ("a", 1), 2.5, -1),
    *("a[0]", "['a']", "\\", "\\int:1", "None", "weight", b"a", (), "a\\.b"),
)
VALUES: tuple[Any, ...] = (
    *(None, 0, True, 2.5, "text", b"bytes", 1 << 60, -1, 1 + 2j, {1, 2}, "", 0.0),
)
THRESHOLDS = (8 << 10, 64 << 10, 128 << 10, 1 << 20)
"""Bytes at which the reference does otherwise when a bucket is 1 MiB."""


def one_in(draw: st.DrawFn, count: int) -> bool:
    """Whether something rare is to be; shrinks to not."""
    return draw(st.integers(0, count - 1)) == count - 1


def meshes(draw: st.DrawFn, world: int) -> Mesh:
    """A mesh of the world's ranks, or of some."""
    return draw(st.sampled_from(MESHES[world]))


def dims_of(mesh: Mesh) -> tuple[int, ...]:
    """The shape of a mesh, or of the line of it."""
    return mesh[0] if mesh[2] is None else (mesh[0][mesh[2]],)


def placements(draw: st.DrawFn, mesh: Mesh, dims: int, *, pending: bool = False) -> tuple[str, ...]:
    """Placements of a tensor of so many dimensions."""
    shape = dims_of(mesh)
    if not dims:
        return ("R",) * len(shape)
    shard = st.integers(0, dims - 1).map(lambda dim: f"S{dim}")
    names = [draw(st.one_of(shard, st.just("R"))) for _ in shape]
    if len(shape) > 1 and one_in(draw, 3):
        # What FSDP over TP makes of a sharded weight.
        dim = draw(st.integers(0, dims - 1))
        names[-2:] = [f"SS{dim}x{shape[-1]}", f"S{dim}"]
    if pending and one_in(draw, 6):
        at = draw(st.integers(0, len(names) - 1))
        names[at] = draw(st.sampled_from(["P", "P-avg", "P-max", "P-min"]))
        names = ["R" if name.startswith("SS") else name for name in names]
    return tuple(names)


def shapes(draw: st.DrawFn, least: int = 0, most: int = 3) -> tuple[int, ...]:
    """A small shape; uneven, empty and longer than the world's size all among them."""
    size = st.sampled_from([2, 1, 3, 4, 5, 0, 7, 8])
    return tuple(draw(st.lists(size, min_size=least, max_size=most)))


def large_shape(draw: st.DrawFn, width: int) -> tuple[int, ...]:
    """A shape whose bytes are about a threshold."""
    rows = draw(st.sampled_from(THRESHOLDS)) // width + draw(st.sampled_from([0, -1, 1]))
    more = draw(st.sampled_from([1, 2, 4]))
    return (rows * more,)


def width_of(dtype: str) -> int:
    """Bytes of an element."""
    import torch

    return int(getattr(torch, dtype).itemsize)


def plain(draw: st.DrawFn, *, large: bool = False, dtype: str | None = None) -> Entry:
    """A tensor that is whole on each rank."""
    name = dtype or draw(st.sampled_from(DTYPES))
    shape = large_shape(draw, width_of(name)) if large else shapes(draw)
    entry: Entry = {"kind": "plain", "dtype": name, "shape": shape, "fill": fills(draw)}
    layout = draw(st.sampled_from(["contiguous", "contiguous", "transposed", "sliced", "offset"]))
    if layout != "contiguous":
        entry["layout"] = layout
    if one_in(draw, 4):
        entry["trains"] = trains(draw, name)
    return entry


def trains(draw: st.DrawFn, dtype: str) -> bool:
    """Whether a Parameter of the dtype requires grad."""
    return dtype in ("float32", "float64", "bfloat16", "float16", "complex64") and draw(
        st.booleans()
    )


def fills(draw: st.DrawFn) -> int:
    """Which values: 0 counts, 1 to 10 are special bits, more are all bits."""
    return draw(st.integers(0, 14))


def dtensor(
    draw: st.DrawFn,
    world: int,
    *,
    large: bool = False,
    pending: bool = False,
    shape: tuple[int, ...] | None = None,
    dtype: str | None = None,
) -> Entry:
    """A DTensor on a mesh of the world."""
    entry = plain(draw, large=large, dtype=dtype)
    if shape is not None:
        entry["shape"] = shape
    mesh = meshes(draw, world)
    entry |= {"kind": "dtensor", "mesh": mesh}
    if not entry["shape"] and len(mesh[1]) < world:
        entry["shape"] = (1,)  # torch has no DTensor without dimensions outside of its mesh
    entry["placements"] = placements(draw, mesh, len(entry["shape"]), pending=pending)
    if any(name.startswith("P") for name in entry["placements"]):
        entry["fill"] = 0
        if not entry["dtype"].startswith(("float32", "float64", "int", "bfloat")):
            entry["dtype"] = "float32"
        alike = any(
            name == "R" and size > 1
            for name, size in zip(entry["placements"], dims_of(mesh), strict=True)
        )
        if not alike and one_in(draw, 2):
            entry["pending"] = True
    return entry


def sharded(draw: st.DrawFn, world: int, group: tuple[int, ...] | None) -> Entry:
    """A ShardedTensor in slices along a dimension, in any order of ranks, several or none each."""
    shape = shapes(draw, least=1, most=2)
    dim = draw(st.integers(0, len(shape) - 1))
    cuts = draw(st.lists(st.integers(0, shape[dim]), max_size=3).map(sorted))
    ends = [*cuts, shape[dim]]
    boxes, start = [], 0
    for end in ends:
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[dim], sizes[dim] = start, end - start
        boxes.append((tuple(offsets), tuple(sizes), draw(st.integers(0, world - 1))))
        start = end
    # torch takes no two shards that begin at one place, as an empty one and the next do.
    boxes = [box for box in boxes if math.prod(box[1])] or boxes[:1]
    entry: Entry = {
        "kind": "sharded",
        "dtype": draw(st.sampled_from(DTYPES[:12])),
        "shape": shape,
        "fill": fills(draw),
        "boxes": tuple(boxes),
    }
    if group is not None:
        entry["group"] = group
    return entry


def view(draw: st.DrawFn, pool: Sequence[Entry]) -> Entry | None:
    """A view of a plain tensor of the pool."""
    plains = [n for n, entry in enumerate(pool) if entry["kind"] == "plain"]
    if not plains:
        return None
    how = draw(st.sampled_from(["whole", "first", "transposed"]))
    return {"kind": "view", "of": draw(st.sampled_from(plains)), "how": how}


def group(draw: st.DrawFn, world: int) -> tuple[int, ...] | None:
    """All ranks in another order, or None for the default group."""
    if not one_in(draw, 3):
        return None
    return draw(st.sampled_from([tuple(reversed(range(world))), (*range(1, world), 0)]))


def tree(draw: st.DrawFn, count: int, *, depth: int = 2, odd: bool = False) -> Any:
    """A nested dict over the tensors of a pool; some of them stand there twice, others not."""
    return _mapping(draw, count, depth, odd, least=1)


def _mapping(draw: st.DrawFn, count: int, depth: int, odd: bool, least: int = 0) -> Any:
    keys = draw(
        st.lists(st.sampled_from(KEYS), min_size=least, max_size=4, unique_by=lambda key: key)
    )
    items = [(key, _node(draw, count, depth, odd)) for key in keys]
    kind = draw(st.sampled_from(["dict", "dict", "OrderedDict", "with_metadata", "counted"]))
    return (kind, items)


def _node(draw: st.DrawFn, count: int, depth: int, odd: bool) -> Any:
    kinds = ["t", "t", "t", "v"] if count else ["v"]
    kinds += ["mapping", "sequence"] if depth else []
    kinds += ["odd"] if odd else []
    kind = draw(st.sampled_from(kinds))
    if kind == "t":
        return ("t", draw(st.integers(0, count - 1)))
    if kind == "mapping":
        return _mapping(draw, count, depth - 1, odd)
    if kind == "sequence":
        kind = draw(st.sampled_from(["list", "tuple", "Pair"]))
        size = 2 if kind == "Pair" else draw(st.integers(0, 3))
        return (kind, [_node(draw, count, depth - 1, odd) for _ in range(size)])
    if kind == "odd":
        return ("odd", "slice(1, 2)")
    return ("v", draw(st.sampled_from(VALUES)))


def tensors_in(node: Any) -> set[int]:
    """The numbers in the pool that a tree uses."""
    if node[0] == "t":
        return {node[1]}
    if node[0] in ("v", "odd", "same"):
        return set()
    named = node[0] in ("dict", "OrderedDict", "with_metadata", "counted")
    return set().union(*(tensors_in(i[1] if named else i) for i in node[1]), set())
