"""Cases, one strategy a function: data, layouts, meshes, keys, order, ties and lies all at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from generated import draws
from generated.draws import Entry, one_in, tensors_in
from generated.oracle.sims import make

Case = dict[str, Any]
Strategy = Callable[[], st.SearchStrategy[Case]]
STRATEGIES: dict[str, Strategy] = {}
MOST_RANKS = 4


def generates(name: str) -> Callable[[Strategy], Strategy]:
    """Register the strategy of a function's cases."""

    def register(made: Strategy) -> Strategy:
        STRATEGIES[name] = made
        return made

    return register


def _worlds(draw: st.DrawFn) -> int:
    return draw(st.sampled_from([2, 1, 3, 4, 4]))


def _pool(draw: st.DrawFn, world: int, *, group: Any = None, **how: Any) -> list[Entry]:
    """One to four tensors of all kinds."""
    pool: list[Entry] = []
    # One large tensor in a while: two would only take longer.
    large = one_in(draw, 25)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["dtensor", "dtensor", "plain", "sharded", "view"]))
        if kind == "sharded" and how.get("shards", True):
            pool.append(draws.sharded(draw, world, group))
        elif kind == "view" and (made := draws.view(draw, pool)):
            pool.append(made)
        elif kind == "plain":
            pool.append(draws.plain(draw))
        else:
            pending = bool(how.get("pending"))
            pool.append(draws.dtensor(draw, world, large=large, pending=pending))
            large = False
    return pool


def _more_steps(draw: st.DrawFn, case: Case, step: dict[str, Any]) -> list[dict[str, Any]]:
    """The call, at times again after values were written or replaced, with the same objects."""
    steps = [step]
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2]))):
        used = sorted(tensors_in(case["trees"]["state"]))
        lies = {number for number, *_ in case.get("wrong", ())}
        can = [n for n in used if case["pool"][n]["kind"] in ("plain", "dtensor")
               and n not in lies
               and not any(p.startswith("P") for p in case["pool"][n].get("placements", ()))]
        if can and draw(st.booleans()):
            steps.append({"rewrite": draw(st.sampled_from(can)), "fill": draw(st.integers(0, 12))})
        elif can:
            keys = [key for key, _ in case["trees"]["state"][1]]
            number = draw(st.sampled_from(can))
            steps.append({"put": ("state", draw(st.sampled_from(keys)), number)})
        steps.append(dict(step))
    return steps


@generates("gather")
@st.composite
def gathers(draw: st.DrawFn) -> Case:
    """Gather, with all that may be wrong about it."""
    world = _worlds(draw)
    pg = draws.group(draw, world)
    pool = _pool(draw, world, group=pg, pending=True)
    odd = one_in(draw, 8)
    case: Case = {
        "world": world,
        "pool": pool,
        "trees": {"state": draws.tree(draw, len(pool), odd=odd)},
    }
    step: dict[str, Any] = {"call": "gather"}
    if pg is not None:
        step["pg"] = pg
    if odd and draw(st.booleans()):
        step["type_check"] = False
    if one_in(draw, 4):
        step["cpu_offload"] = True
    takers = draw(st.sampled_from([None, None, "some"]))
    if takers:
        step["ranks_only"] = _takers(draw, case, pg)
    if one_in(draw, 3):
        case["turned"] = ["state"]
    _add_many(draw, case, "state")
    used = sorted(tensors_in(case["trees"]["state"]))
    trouble = draw(st.sampled_from(["", "", "", "wrong", "lacks"]))
    if trouble == "wrong":
        _add_lie(draw, case, used)
    elif trouble == "lacks":
        items = case["trees"]["state"][1]
        can = [key for key, node in items if _may_lack(case, node)
               and (pg or tensors_in(node) <= set().union(
                   *(tensors_in(other) for name, other in items if name != key), set()))]
        if can:
            case["lacks"] = [
                ("state", draw(st.integers(0, world - 1)), draw(st.sampled_from(can)))
            ]
    case["steps"] = _more_steps(draw, case, step)
    if case.get("lacks") and len(case["steps"]) > 1:
        case["steps"] = [s for s in case["steps"] if "put" not in s]
    return case


def _may_lack(case: Case, node: Any) -> bool:
    """Whether it is said what happens where a rank lacks this: not for what is replicated."""
    for number in tensors_in(node):
        entry = case["pool"][number]
        if entry["kind"] == "dtensor":
            rank = entry["mesh"][1][0]
            if not make(case, entry, rank, {}, number).travels:
                return False
    return True


def _takers(draw: st.DrawFn, case: Case, pg: tuple[int, ...] | None) -> tuple[int, ...]:
    """Ranks that want the result: of each leaf's ranks one at least."""
    numbering = pg or tuple(range(case["world"]))
    wanted = set(draw(st.lists(st.integers(0, case["world"] - 1), min_size=1, max_size=2)))
    for entry in case["pool"]:
        if "mesh" in entry:
            members = entry["mesh"][1]
            line = draws.dims_of(entry["mesh"])
            if entry["mesh"][2] is not None:
                wanted |= set(members)
            elif not wanted & set(members):
                wanted.add(members[0])
            assert line
    found = sorted(numbering.index(rank) for rank in wanted)
    if one_in(draw, 6):
        found += [found[0], 99]
    return tuple(found)


def _add_many(draw: st.DrawFn, case: Case, tree: str) -> None:
    """In a while a lot of tensors more, more than any batch."""
    if not one_in(draw, 25):
        return
    can = [n for n, e in enumerate(case["pool"])
           if e["kind"] in ("dtensor", "plain") and draws.math.prod(e["shape"]) < 100]
    if can:
        count = draw(st.sampled_from([17, 40, 150, 300]))
        case["many"] = [(tree, count, draw(st.sampled_from(can)))]


def _add_lie(draw: st.DrawFn, case: Case, used: list[int]) -> None:
    """One rank's local part is not what it claims."""
    can = [n for n in used if case["pool"][n]["kind"] == "dtensor"
           and "layout" not in case["pool"][n] and case["pool"][n]["shape"]]
    if can:
        number = draw(st.sampled_from(can))
        entry = case["pool"][number]
        rank = draw(st.sampled_from(entry["mesh"][1]))
        lies = ["shape", "dtype"] if make(case, entry, rank, {}, number).travels else ["shape"]
        case["wrong"] = [(number, rank, draw(st.sampled_from(lies)))]


@generates("all_gather")
@st.composite
def all_gathers(draw: st.DrawFn) -> Case:
    """One ShardedTensor."""
    world = _worlds(draw)
    pg = draws.group(draw, world)
    step: dict[str, Any] = {"call": "all_gather", "tensor": 0}
    if pg is not None and draw(st.booleans()):
        step["pg"] = pg
    case: Case = {
        "world": world,
        "pool": [draws.sharded(draw, world, pg)],
        "trees": {},
        "steps": [step, *([dict(step)] if one_in(draw, 3) else [])],
    }
    return case


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


def _loads(draw: st.DrawFn, world: int) -> Case:
    """A full dict, and local ones."""
    pool: list[Entry] = []
    full: list[tuple[Any, Any]] = []
    local: list[tuple[Any, Any]] = []
    keys = draw(
        st.lists(st.sampled_from(draws.KEYS), min_size=1, max_size=4, unique_by=lambda key: key)
    )
    targets: list[int] = []
    large = one_in(draw, 25)
    for key in keys:
        what = draw(st.sampled_from(["t", "t", "t", "t", "v", "extra", "missing", "mixed"]))
        if what == "v":
            full.append((key, ("v", draw(st.sampled_from(draws.VALUES)))))
            local.append((key, ("v", draw(st.sampled_from(draws.VALUES)))))
            continue
        source = draws.plain(draw, large=large)
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
    return {
        "world": world,
        "pool": pool,
        "trees": {"full": ("dict", full), "local": ("dict", local)},
    }


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
    world = _worlds(draw)
    pg = draws.group(draw, world)
    case = _loads(draw, world)
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
            case["lacks"] = [("local", draw(st.integers(0, world - 1)), draw(st.sampled_from(keys)))]
    if one_in(draw, 8):
        _add_lie(draw, case, sorted(tensors_in(case["trees"]["local"])))
    case["steps"] = _again(draw, case, step)
    return case


def _again(draw: st.DrawFn, case: Case, step: dict[str, Any]) -> list[dict[str, Any]]:
    steps = [step]
    if one_in(draw, 3):
        used = sorted(tensors_in(case["trees"]["full"]))
        if used and draw(st.booleans()) and all(
            case["pool"][n]["dtype"] == case["pool"][m]["dtype"]
            for n in used for m in tensors_in(case["trees"]["local"])
        ):
            steps.append({"rewrite": draw(st.sampled_from(used)), "fill": draw(st.integers(0, 12))})
        steps.append(dict(step))
    return steps


@generates("distribute")
@st.composite
def distributes(draw: st.DrawFn) -> Case:
    """Each rank holds the full dict."""
    world = _worlds(draw)
    case = _loads(draw, world)
    if one_in(draw, 4):
        for number in tensors_in(case["trees"]["full"]):
            entry = case["pool"][number]
            if all(case["pool"][t]["dtype"] == entry["dtype"]
                   for t in tensors_in(case["trees"]["local"])):
                entry["per_rank"] = True
    step: dict[str, Any] = {"call": "distribute"}
    case["steps"] = _again(draw, case, step)
    return case


def _alone(draw: st.DrawFn, **how: Any) -> Case:
    world = draw(st.sampled_from([1, 2, 4]))
    pool = _pool(draw, world, **how)
    return {
        "world": world,
        "pool": pool,
        "trees": {"state": draws.tree(draw, len(pool), odd=one_in(draw, 8))},
    }


def _options(draw: st.DrawFn, case: Case, step: dict[str, Any]) -> dict[str, Any]:
    if one_in(draw, 4):
        step["ranks_only"] = (draw(st.integers(0, case["world"] - 1)),)
    if one_in(draw, 4):
        step["type_check"] = False
    return step


@generates("offload")
@st.composite
def offloads(draw: st.DrawFn) -> Case:
    """A snapshot."""
    case = _alone(draw)
    _add_many(draw, case, "state")
    case["steps"] = _more_steps(draw, case, _options(draw, case, {"call": "offload"}))
    return case


@generates("create")
@st.composite
def creates(draw: st.DrawFn) -> Case:
    """Buffers."""
    case = _alone(draw)
    step: dict[str, Any] = {"call": "create"}
    if one_in(draw, 3):
        step["share_memory"] = True
    case["steps"] = _more_steps(draw, case, step)
    return case


@generates("iterate")
@st.composite
def iterates(draw: st.DrawFn) -> Case:
    """A walk with functions of the caller's."""
    by = draw(st.sampled_from(["identity", "doubled"]))
    companion = by == "identity" and one_in(draw, 3)
    case = _alone(draw, shards=by == "identity")
    step = _options(draw, case, {"call": "iterate", "by": by})
    if companion:
        _add_other(draw, case)
        step["companion"] = True
    elif one_in(draw, 3):
        step["cpu_offload"] = True
    case["steps"] = [step] if companion else _more_steps(draw, case, step)
    return case


@generates("copy")
@st.composite
def copies(draw: st.DrawFn) -> Case:
    """One state dict into another."""
    case = _alone(draw)
    _add_other(draw, case)
    step: dict[str, Any] = {"call": "copy"}
    for name, value in (("non_blocking", True), ("type_check", False)):
        if one_in(draw, 4):
            step[name] = value
    case["steps"] = [step, *([dict(step)] if one_in(draw, 3) else [])]
    return case


@generates("similar")
@st.composite
def similars(draw: st.DrawFn) -> Case:
    """Two state dicts that are compared."""
    case = _alone(draw)
    _add_other(draw, case)
    case["steps"] = [{"call": "similar"}]
    return case


def _add_other(draw: st.DrawFn, case: Case) -> None:
    """Another tree of the same structure, but for what one draw changes."""
    if one_in(draw, 12):
        case["trees"]["other"] = ("same", "state")
        return
    pool = case["pool"]
    count = len(pool)
    for entry in list(pool):
        twin = copy.deepcopy(entry)
        if twin["kind"] == "view":
            twin["of"] += count
        else:
            twin["fill"] = draw(st.integers(0, 12))
            if twin["kind"] != "sharded":
                twin.pop("layout", None)
        pool.append(twin)
    other = _shifted(case["trees"]["state"], count)
    change = draw(st.sampled_from(["", "", "dtype", "shape", "key", "value"]))
    used = [n for n in tensors_in(other) if pool[n]["kind"] in ("plain", "dtensor")
            and not any(e.get("of") == n for e in pool)]
    if change == "dtype" and used:
        entry = pool[draw(st.sampled_from(sorted(used)))]
        entry["dtype"] = "int32" if entry["dtype"] != "int32" else "float32"
        entry.pop("trains", None)
    elif change == "shape" and used:
        entry = pool[draw(st.sampled_from(sorted(used)))]
        entry["shape"] = (*entry["shape"], 1)
    elif change == "key":
        items = list(other[1])
        items[-1] = ("other", items[-1][1])
        other = (other[0], items)
    elif change == "value":
        items = list(other[1])
        at = draw(st.integers(0, len(items) - 1))
        value = draw(st.sampled_from([("v", None), ("v", 3), ("list", []), ("dict", [])]))
        items[at] = (items[at][0], value)
        other = (other[0], items)
    case["trees"]["other"] = other


def _shifted(node: Any, count: int) -> Any:
    if node[0] == "t":
        return ("t", node[1] + count)
    if node[0] in ("v", "odd"):
        return node
    if node[0] in ("list", "tuple", "Pair"):
        return (node[0], [_shifted(item, count) for item in node[1]])
    return (node[0], [(key, _shifted(item, count)) for key, item in node[1]])
