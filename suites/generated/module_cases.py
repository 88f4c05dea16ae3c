"""Cases of a module: wrapped for data parallelism, run, frozen, trained, loaded, in any order."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from generated import draws
from generated.cases import generates
from generated.draws import Entry, one_in

Case = dict[str, Any]
NAMES = ("weight", "bias", "block.weight", "block.inner.scale", "z")


@generates("module")
@st.composite
def modules(draw: st.DrawFn) -> Case:
    """A tensor-parallel module, and what people do with it."""
    world = draw(st.sampled_from([2, 1, 4]))
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    pool: list[Entry] = []
    named: list[tuple[str, int]] = []
    # As a module lists them: its own first, then those of submodules.
    for name in sorted(names, key=lambda name: name.count(".")):
        if pool and one_in(draw, 4):
            named.append((name, draw(st.integers(0, len(pool) - 1))))  # tied
            continue
        if draw(st.sampled_from([True, True, False])):
            entry = draws.dtensor(draw, world)
            whole = [m for m in draws.MESHES[world] if len(m[1]) == world]
            entry["mesh"] = draw(st.sampled_from(whole))
            dims = len(entry["shape"])
            entry["placements"] = draws.placements(draw, entry["mesh"], dims)
        else:
            entry = draws.plain(draw)
        entry.pop("layout", None)
        entry["trains"] = draws.trains(draw, entry["dtype"])
        pool.append(entry)
        named.append((name, len(pool) - 1))
    case: Case = {
        "world": world,
        "pool": pool,
        "trees": {"module": ("module", [(name, ("t", number)) for name, number in named])},
    }
    case["steps"] = _steps(draw, named)
    return case


def _steps(draw: st.DrawFn, named: list[tuple[str, int]]) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    wrapped = False
    for _ in range(draw(st.integers(1, 6))):
        kinds = ["wrap", "forward", "load", "train", "freeze"]
        what = draw(st.sampled_from(kinds))
        fill = draw(st.integers(0, 12))
        if what == "wrap":
            wrapped = True
            steps.append({"call": "wrap"})
        elif what == "forward":
            step = {"call": "forward"}
            mode = draw(st.sampled_from(["", "", "fail", "no_grad"]))
            steps.append({**step, mode: True} if mode else step)
        elif what == "load":
            whole = wrapped and draw(st.booleans())
            more = {"whole": True} if whole else {}
            steps.append({"call": "load", "names": named, "fill": fill, **more})
        elif what == "train":
            name, number = draw(st.sampled_from(named))
            steps.append({"train": (name, number, fill)})
        else:
            steps.append({"freeze": draw(st.sampled_from(named))[0]})
    if not any("call" in step for step in steps):
        steps.append({"call": "wrap"})
    return steps
