"""Cases of flat state dicts, of single tensors between parallelisms, and of long sequences."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from generated import draws
from generated.cases import add_many, alone, generates, more_steps
from generated.draws import one_in, tensors_in

Case = dict[str, Any]


@generates("flatten")
@st.composite
def flattens(draw: st.DrawFn) -> Case:
    """Flat and back, with keys that look alike, by a mapping that was pickled."""
    case = _nested(draw)
    case["steps"] = more_steps(draw, case, {"call": "flatten"})
    return case


def _nested(draw: st.DrawFn) -> Case:
    pool = [draws.plain(draw) for _ in range(draw(st.integers(1, 2)))]
    tree = draws.tree(draw, len(pool), depth=3)
    return {"world": 1, "pool": pool, "trees": {"state": tree}}


@generates("traverse")
@st.composite
def traverses(draw: st.DrawFn) -> Case:
    """A walk."""
    return {**_nested(draw), "steps": [{"call": "traverse"}]}


@generates("set_element")
@st.composite
def set_elements(draw: st.DrawFn) -> Case:
    """One element, several times, into what is there and what is not."""
    case = _nested(draw)
    item = st.sampled_from(["a", 0, "b", 1, 3, -1, "a.b", ""])
    steps = []
    for _ in range(draw(st.integers(1, 3))):
        path = tuple(draw(st.lists(item, min_size=1, max_size=3)))
        steps.append({"call": "set_element", "path": path, "value": 0})
    return {**case, "steps": steps}


@generates("seams")
@st.composite
def seams(draw: st.DrawFn) -> Case:
    """One tensor through `_flatten_tensor`, `_unflatten_tensor`, `sync_grad_hook`."""
    world = draw(st.sampled_from([1, 2, 4]))
    call = draw(st.sampled_from(["flatten_tensor", "unflatten_tensor", "sync_grad"]))
    step: dict[str, Any] = {"call": call, "tensor": 0}
    if call == "sync_grad":
        entry = draws.plain(draw, dtype=draw(st.sampled_from(["float32", "int64", "float64"])))
        if draw(st.booleans()):
            step["pending"] = True
            entry["fill"] = 0
            entry.pop("layout", None)
            entry.pop("trains", None)
    elif one_in(draw, 4):
        entry = draws.plain(draw)
    else:
        entry = draws.dtensor(draw, world)
        while_all = set(entry["mesh"][1]) == set(range(world)) and entry["mesh"][2] is None
        if not while_all:
            entry["mesh"] = draws.MESHES[world][0]
            entry["placements"] = draws.placements(draw, entry["mesh"], len(entry["shape"]))
    return {"world": world, "pool": [entry], "trees": {}, "steps": [step]}


ROOTS: dict[int, tuple[Any, ...]] = {
    2: (((1, 2), (0, 1), None), ((2, 1), (0, 1), None)),
    4: (((2, 2), (0, 1, 2, 3), None), ((2, 2), (0, 2, 1, 3), None)),
}


@generates("all_gather_dtensor")
@st.composite
def all_gather_dtensors(draw: st.DrawFn) -> Case:
    """A DTensor over the root mesh, to what tensor parallelism holds."""
    world = draw(st.sampled_from([2, 4]))
    entry = draws.dtensor(draw, world, large=one_in(draw, 15))
    entry["mesh"] = draw(st.sampled_from(ROOTS[world]))
    entry["placements"] = draws.placements(draw, entry["mesh"], len(entry["shape"]))
    case: Case = {"world": world, "pool": [entry], "trees": {}}
    if entry["shape"] and one_in(draw, 6) and not {"layout", "trains"} & entry.keys():
        case["wrong"] = [(0, draw(st.integers(0, world - 1)), "shape")]
    step = {"call": "all_gather_dtensor", "tensor": 0, "mesh": entry["mesh"]}
    case["steps"] = [step, *([dict(step)] if one_in(draw, 3) else [])]
    return case


@generates("boxes")
@st.composite
def boxes(draw: st.DrawFn) -> Case:
    """Where the shards of a DTensor lie."""
    world = draw(st.sampled_from([2, 1, 3, 4]))
    entry = draws.dtensor(draw, world)
    entry["mesh"] = draw(
        st.sampled_from(
            [
                m
                for m in draws.MESHES[world]
                if len(m[0]) == 1 and len(m[1]) == world and m[2] is None
            ]
        )
    )
    entry["placements"] = draws.placements(draw, entry["mesh"], len(entry["shape"]))
    call = draw(st.sampled_from(["box_for", "metadata"]))
    step = {"call": call, "tensor": 0, "count": world}
    return {"world": world, "pool": [entry], "trees": {}, "steps": [step]}


@generates("sequence")
@st.composite
def sequences(draw: st.DrawFn) -> Case:
    """Gather, stage, copy, flatten, tie and train in any order over the same objects."""
    case = alone(draw)
    case["steps"] = [{"call": "gather", "into": "full"}]
    add_many(draw, case, "state")
    items = case["trees"]["state"][1]
    keys = [key for key, _ in items]
    used = sorted(tensors_in(case["trees"]["state"]))
    pool = case["pool"]
    can = [n for n in used if pool[n]["kind"] in ("plain", "dtensor")]
    for _ in range(draw(st.integers(1, 6))):
        what = draw(
            st.sampled_from(
                [
                    "gather",
                    "offload",
                    "create",
                    "flatten",
                    "iterate",
                    "copy",
                    "train",
                    "tie",
                    "similar",
                ]
            )
        )
        if what == "train" and can:
            fill = draw(st.integers(0, 12))
            case["steps"].append({"rewrite": draw(st.sampled_from(can)), "fill": fill})
        elif what == "tie" and can:
            put = ("state", draw(st.sampled_from(keys)), draw(st.sampled_from(can)))
            case["steps"].append({"put": put})
        elif what in ("copy", "similar"):
            case["steps"].append({"call": "create", "into": "other"})
            case["steps"].append({"call": what})
        elif what == "offload":
            case["steps"].append({"call": "offload", "into": "other"})
        elif what not in ("train", "tie"):
            case["steps"].append({"call": what})
    if any("slice" in repr(node) for _, node in items):
        for step in case["steps"]:
            if step.get("call") in ("gather", "offload", "iterate", "copy"):
                step["type_check"] = False
    case["trees"]["full"] = ("dict", [])
    case["trees"]["other"] = ("dict", [])
    return case


@generates("chunks")
@st.composite
def chunks(draw: st.DrawFn) -> Case:
    """FSDP's chunk of what every rank of its mesh holds: as a DTensor, or as a ShardedTensor."""
    world = draw(st.sampled_from([2, 4]))
    root = draw(st.sampled_from(ROOTS[world]))
    entry = draws.plain(draw, large=one_in(draw, 15))
    if draw(st.booleans()):
        entry["shape"] = entry["shape"] or (2,)
        entry["shape"] = (entry["shape"][0] or 1, *entry["shape"][1:])
        step = {"call": "chunk_tensor", "tensor": 0}
        return {"world": world, "pool": [entry], "trees": {}, "steps": [step]}
    if draw(st.booleans()):
        dims = len(entry["shape"])
        held = draw(st.sampled_from(["R", *(f"S{dim}" for dim in range(dims))]))
        entry |= {"kind": "dtensor", "mesh": (*root[:2], 1), "placements": (held,)}
    step = {"call": "chunk_dtensor", "tensor": 0, "mesh": (*root[:2], 0)}
    return {"world": world, "pool": [entry], "trees": {}, "steps": [step]}
