"""Cases, one strategy a function: data, layouts, meshes, keys, order, ties and lies all at once."""

from __future__ import annotations

import copy
import math
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


def worlds(draw: st.DrawFn) -> int:
    return draw(st.sampled_from([2, 1, 3, 4, 4]))


def pool_of(draw: st.DrawFn, world: int, *, group: Any = None, **how: Any) -> list[Entry]:
    """One to four tensors of all kinds."""
    pool: list[Entry] = []
    # One large tensor in a while: two would only take longer.
    large = one_in(draw, 15)
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


def more_steps(draw: st.DrawFn, case: Case, step: dict[str, Any]) -> list[dict[str, Any]]:
    """The call, at times again after values were written or replaced, with the same objects."""
    steps = [step]
    used = sorted(tensors_in(case["trees"]["state"]))
    lies = {number for number, *_ in case.get("wrong", ())}
    can = [
        n
        for n in used
        if case["pool"][n]["kind"] in ("plain", "dtensor")
        and n not in lies
        and not any(p.startswith("P") for p in case["pool"][n].get("placements", ()))
    ]
    if can and step["call"] in ("gather", "offload"):
        hurry(draw, case, step, can)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2]))):
        if can and one_in(draw, 2):
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
    world = worlds(draw)
    pg = draws.group(draw, world)
    pool = pool_of(draw, world, group=pg, pending=True)
    odd = one_in(draw, 5)
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
    takers = one_in(draw, 3)
    if takers:
        step["ranks_only"] = _takers(draw, case, pg)
    if one_in(draw, 3):
        case["turned"] = ["state"]
    add_many(draw, case, "state")
    used = sorted(tensors_in(case["trees"]["state"]))
    trouble = draw(st.sampled_from(["", "", "", "wrong", "lacks"]))
    if trouble == "wrong":
        add_lie(draw, case, used)
    elif trouble == "lacks":
        items = case["trees"]["state"][1]
        can = [
            key
            for key, node in items
            if _may_lack(case, node)
            and (
                pg
                or tensors_in(node)
                <= set().union(*(tensors_in(other) for name, other in items if name != key), set())
            )
        ]
        if can:
            case["lacks"] = [("state", draw(st.integers(0, world - 1)), draw(st.sampled_from(can)))]
    case["steps"] = more_steps(draw, case, step)
    if case.get("lacks") and len(case["steps"]) > 1:
        case["steps"] = [s for s in case["steps"] if "put" not in s]
    return case


def hurry(draw: st.DrawFn, case: Case, step: dict[str, Any], can: list[int]) -> None:
    """At times tensors are overwritten the moment the call returns, or a rank comes late to it."""
    # What is large is sent from where it lies: there it shows.
    large = any(math.prod(case["pool"][n]["shape"]) > 999 for n in can)
    if one_in(draw, 2 if large else 6):
        step["late"] = draw(st.integers(0, case["world"] - 1))
    if "late" in step or one_in(draw, 3):
        step["then"] = [(n, draw(st.integers(0, 12))) for n in can]


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


def add_many(draw: st.DrawFn, case: Case, tree: str) -> None:
    """In a while a lot of tensors more, more than any batch."""
    if not one_in(draw, 25):
        return
    can = [
        n
        for n, e in enumerate(case["pool"])
        if e["kind"] in ("dtensor", "plain")
        and math.prod(e["shape"]) < 100
        and not any(name.startswith("P") for name in e.get("placements", ()))
    ]
    if can:
        count = draw(st.sampled_from([17, 40, 150, 300]))
        case["many"] = [(tree, count, draw(st.sampled_from(can)))]


def add_lie(draw: st.DrawFn, case: Case, used: list[int]) -> None:
    """One rank's local part is not what it claims."""
    can = [
        n
        for n in used
        if case["pool"][n]["kind"] == "dtensor"
        and not case["pool"][n].get("meta")
        and not {"layout", "trains"} & case["pool"][n].keys()
        and case["pool"][n]["shape"]
    ]
    if can:
        number = draw(st.sampled_from(can))
        entry = case["pool"][number]
        rank = draw(st.sampled_from(entry["mesh"][1]))
        lies = ["shape", "dtype"]
        held = make(case, entry, rank, {}, number).local
        turned = held is not None and (held.dim() < 2 or held.movedim(0, -1).shape != held.shape)
        lies += ["turned"] if turned else []
        case["wrong"] = [(number, rank, draw(st.sampled_from(lies)))]


@generates("all_gather")
@st.composite
def all_gathers(draw: st.DrawFn) -> Case:
    """One ShardedTensor."""
    world = worlds(draw)
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


def alone(draw: st.DrawFn, **how: Any) -> Case:
    world = draw(st.sampled_from([1, 2, 4]))
    pool = pool_of(draw, world, **how)
    return {
        "world": world,
        "pool": pool,
        "trees": {"state": draws.tree(draw, len(pool), odd=one_in(draw, 4))},
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
    case = alone(draw)
    add_many(draw, case, "state")
    case["steps"] = more_steps(draw, case, _options(draw, case, {"call": "offload"}))
    return case


@generates("create")
@st.composite
def creates(draw: st.DrawFn) -> Case:
    """Buffers."""
    case = alone(draw)
    step: dict[str, Any] = {"call": "create"}
    if one_in(draw, 3):
        step["share_memory"] = True
    case["steps"] = more_steps(draw, case, step)
    return case


@generates("iterate")
@st.composite
def iterates(draw: st.DrawFn) -> Case:
    """A walk with functions of the caller's."""
    by = draw(st.sampled_from(["identity", "doubled"]))
    companion = by == "identity" and one_in(draw, 3)
    case = alone(draw, shards=by == "identity")
    step = _options(draw, case, {"call": "iterate", "by": by})
    if companion:
        _add_other(draw, case)
        step["companion"] = True
    elif one_in(draw, 3):
        step["cpu_offload"] = True
    case["steps"] = [step] if companion else more_steps(draw, case, step)
    return case


@generates("copy")
@st.composite
def copies(draw: st.DrawFn) -> Case:
    """One state dict into another."""
    case = alone(draw)
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
    case = alone(draw)
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
    change = draw(st.sampled_from(["", "", "dtype", "shape", "dtype", "shape", "key", "value"]))
    used = [
        n
        for n in tensors_in(other)
        if pool[n]["kind"] in ("plain", "dtensor") and not any(e.get("of") == n for e in pool)
    ]
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
        others: list[Any] = [("v", None), ("v", 3), ("list", []), ("dict", [])]
        value = draw(st.sampled_from(others))
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
