"""Cases of loading: a full state dict, and local ones whose targets are of every kind."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from generated import draws
from generated.cases import add_lie, generates, hurry, worlds
from generated.draws import Entry, one_in, tensors_in

Case = dict[str, Any]


def _target(draw: st.DrawFn, world: int, full: Entry) -> Entry:
    """A target for a full tensor, mostly of its shape and dtype."""
    shape, dtype = full["shape"], full["dtype"]
    if one_in(draw, 8):
        shape = draws.shapes(draw)
    if one_in(draw, 6):
        dtype = draw(st.sampled_from(["float32", "bfloat16", "float64"]))
    if draw(st.sampled_from([True, True, False])):
        entry = draws.dtensor(draw, world, shape=shape, dtype=dtype)
    else:
        entry = draws.plain(draw, dtype=dtype)
        entry["shape"] = shape
    if one_in(draw, 5):
        entry["meta"] = True
        entry.pop("layout", None)
    return entry


def _exact(full: Entry, target: Entry) -> None:
    """Where the dtype changes, values that every dtype holds."""
    if full["dtype"] != target["dtype"]:
        full["fill"] = 0


def loads(draw: st.DrawFn, world: int) -> Case:
    """A full dict, and local ones."""
    pool: list[Entry] = []
    full: list[tuple[Any, Any]] = []
    local: list[tuple[Any, Any]] = []
    keys = draw(
        st.lists(st.sampled_from(draws.KEYS), min_size=1, max_size=4, unique_by=lambda key: key)
    )
    targets: list[int] = []
    large = one_in(draw, 6)
    for key in keys:
        what = draw(st.sampled_from(["t", "t", "t", "t", "v", "extra", "missing", "mixed"]))
        if what == "v":
            full.append((key, ("v", draw(st.sampled_from(draws.VALUES)))))
            local.append((key, ("v", draw(st.sampled_from(draws.VALUES)))))
            continue
        source = draws.plain(draw, large=large)
        if large:
            what = "t"
            if not one_in(draw, 4):
                source.pop("layout", None)  # only what is contiguous is sent from where it lies
        large = False
        source.pop("trains", None)
        pool.append(source)
        number = len(pool) - 1
        if what == "missing":
            local.append((key, ("t", number)))
            continue
        full.append((key, ("t", number)))
        if what == "extra":
            continue
        if what == "mixed":
            local.append((key, ("v", draw(st.sampled_from([None, 1, "text"])))))
            continue
        alike = [n for n in targets if pool[n]["shape"] == source["shape"]]
        if alike and one_in(draw, 3):
            at = draw(st.sampled_from(alike))
        else:
            pool.append(_target(draw, world, source))
            at = len(pool) - 1
            targets.append(at)
        _exact(source, pool[at])
        local.append((key, ("t", at)))
    if draw(st.booleans()):
        local.reverse()
    _add_tied_values(draw, full)
    case: Case = {
        "world": world,
        "pool": pool,
        "trees": {"full": ("dict", full), "local": ("dict", local)},
    }
    if one_in(draw, 6):
        _add_many_loads(draw, case, dict(full), dict(local))
    return case


def _add_many_loads(
    draw: st.DrawFn, case: Case, full: dict[Any, Any], local: dict[Any, Any]
) -> None:
    """A lot of tensors more that are loaded, all alike."""
    pool = case["pool"]
    for key, node in full.items():
        target = local.get(key, ("v", None))
        if node[0] == target[0] == "t" and not any("of" in pool[n[1]] for n in (node, target)):
            entry, other = pool[node[1]], pool[target[1]]
            if entry["dtype"] == other["dtype"] and math.prod(entry["shape"]) < 100:
                count = draw(st.sampled_from([17, 40, 150, 300]))
                case["many"] = [("full", count, node[1]), ("local", count, target[1])]
                return


def _add_tied_values(draw: st.DrawFn, full: list[tuple[Any, Any]]) -> None:
    """At times the full dict has one tensor twice."""
    tensors = [n for _, n in full if n[0] == "t"]
    if len(tensors) > 1 and one_in(draw, 6):
        place = next(n for n, (_, node) in enumerate(full) if node == tensors[-1])
        full[place] = (full[place][0], tensors[0])


@generates("broadcast")
@st.composite
def broadcasts(draw: st.DrawFn) -> Case:
    """Broadcast from the first rank of a group."""
    world = worlds(draw)
    pg = draws.group(draw, world)
    case = loads(draw, world)
    step: dict[str, Any] = {"call": "broadcast", "source": pg[0] if pg else 0}
    if pg:
        step["pg"] = pg
    for name in ("strict", "cpu_offload"):
        if one_in(draw, 3):
            step[name] = True
    if one_in(draw, 3):
        case["turned"] = ["local"]
    if one_in(draw, 6):
        keys = [key for key, _ in case["trees"]["local"][1]]
        if keys:
            case["lacks"] = [
                ("local", draw(st.integers(0, world - 1)), draw(st.sampled_from(keys)))
            ]
    if one_in(draw, 8):
        add_lie(draw, case, sorted(tensors_in(case["trees"]["local"])))
    case["steps"] = again(draw, case, step)
    return case


def again(draw: st.DrawFn, case: Case, step: dict[str, Any]) -> list[dict[str, Any]]:
    steps = [step]
    full, local = (tensors_in(case["trees"][name]) for name in ("full", "local"))
    can = [n for n in sorted(full - local) if _same_dtypes(case, [n], sorted(local))]
    if can:
        hurry(draw, case, step, can)
    if one_in(draw, 3):
        used = sorted(full)
        if used and one_in(draw, 2) and _same_dtypes(case, used, sorted(local)):
            steps.append({"rewrite": draw(st.sampled_from(used)), "fill": draw(st.integers(0, 12))})
        steps.append(dict(step))
    return steps


def _same_dtypes(case: Case, some: list[int], others: list[int]) -> bool:
    """Whether nothing has to be converted, where bits of NaNs are nobody's promise."""
    pool = case["pool"]
    return all(pool[n]["dtype"] == pool[m]["dtype"] for n in some for m in others)


@generates("distribute")
@st.composite
def distributes(draw: st.DrawFn) -> Case:
    """Each rank holds the full dict."""
    world = worlds(draw)
    case = loads(draw, world)
    if one_in(draw, 4):
        local = sorted(tensors_in(case["trees"]["local"]))
        for number in tensors_in(case["trees"]["full"]):
            if _same_dtypes(case, [number], local):
                case["pool"][number]["per_rank"] = True
    step: dict[str, Any] = {"call": "distribute"}
    case["steps"] = again(draw, case, step)
    return case


@generates("broadcast_tensors")
@st.composite
def broadcast_tensors(draw: st.DrawFn) -> Case:
    """Some keys of a full dict, by the function that broadcasts tensors alone."""
    world = worlds(draw)
    pg = draws.group(draw, world)
    case = loads(draw, world)
    full = [(key, node) for key, node in case["trees"]["full"][1] if node[0] == "t"]
    case["trees"]["full"] = ("dict", full)
    keys = [key for key, _ in full if not one_in(draw, 4)] or [key for key, _ in full][:1]
    step: dict[str, Any] = {"call": "broadcast_tensors", "source": pg[0] if pg else 0}
    step |= {"keys": keys, **({"pg": pg} if pg else {})}
    if not keys:
        return {**case, "steps": [{"call": "distribute"}]}
    if one_in(draw, 3):
        case["turned"] = ["local"]
    return {**case, "steps": again(draw, case, step)}


@generates("distribute_tensors")
@st.composite
def distribute_tensors(draw: st.DrawFn) -> Case:
    """Pairs of a DTensor and a full tensor, beside what is no pair."""
    case = loads(draw, worlds(draw))
    case.pop("many", None)
    full, local = (dict(case["trees"][name][1]) for name in ("full", "local"))
    items = []
    for key, node in local.items():
        pair = node[0] == "t" and case["pool"][node[1]]["kind"] == "dtensor" and key in full
        paired = pair and full[key][0] == "t"
        if paired or node[0] == "t" or node == ("v", None):
            items.append((key, ("tuple", [node, full[key]]) if paired else node))
    case["trees"] = {"local": ("dict", items)}
    keys = [key for key, _ in items if not one_in(draw, 5)] + ["not there"]
    return {**case, "steps": [{"call": "distribute_tensors", "keys": keys}]}
