"""What the reference is to reach, beside what it reaches here: `ci/bench --goals`.

A goal that is missed stands with the reason that a profile gave. A miss without one ends with 1.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.listing import benchmarks
from benchmarks.session.parent import Parent
from benchmarks.settings import REFERENCE, TORCH, Settings, leaves
from benchmarks.table import where


class Goal(NamedTuple):
    """How fast a benchmark is to be in a regime.

    Attributes:
        benchmark: the class's name.
        regime: its regime.
        size: ranks.
        floor: at most this many times the floor's time; None where a floor says nothing.
        per_tensor: and as much more for each tensor, in us: what Python may cost.
        torch: at least this many times as fast as torch; None where torch does something else.
        why: the reason of a miss, from a profile.

    """

    benchmark: str
    regime: str
    size: int
    floor: float | None
    per_tensor: float
    torch: float | None
    why: str = ""

    def reached(self, times: dict[str, float], tensors: int) -> dict[str, bool]:
        """Limit to whether it is kept. ``times`` are medians in seconds by arm."""
        found: dict[str, bool] = {}
        ours = times[REFERENCE]
        if self.floor is not None:
            found["floor"] = ours <= self.floor * times["floor"] + self.per_tensor * 1e-6 * tensors
        elif self.per_tensor:
            found["floor"] = ours <= self.per_tensor * 1e-6 * tensors
        if self.torch is not None and TORCH in times:
            found["torch"] = ours * self.torch <= times[TORCH]
        return found


_TENSOR = (
    "30 to 60 us of Python a tensor and rank, spread flat: walk, layout, tie, one torch.empty, one "
    "view, one piece, one entry of the result; and four ranks share two cores"
)
_PACK = (
    "the floor's rows are packed before the clock runs; here the source packs them (a third of its "
    "time), and ranks plan (60 us a tensor)"
)
_COPY = "torch leaves the source's own tensor in place; a copy of its own (isolation) is a fourth"
_ONE_BY_ONE = "a collective for each tensor, for both: the call takes one tensor"
_DTENSOR = "what is more than the DTensor: its shape is checked against the spec, and the hook set"
_ALLOCATE = "both allocate each tensor, and that is nearly all; nothing is copied by either"
_CHECKED = "the same copies; that all leaves are checked before the first is written is the rest"
_FEW = "the 50 us of the call itself are shared by 4 tensors"
_SHARE = (
    "torch sends nothing that is not here, either: slices, copies and DTensors are what is left"
)

GOALS: tuple[Goal, ...] = (
    Goal("GatherStateDict", "many", 4, 1.3, 10, 50, _TENSOR),
    Goal("GatherStateDict", "model", 4, 1.3, 10, 1, _TENSOR),
    Goal("GatherStateDict", "large", 4, 1.3, 10, 1, "both are the all-gather itself"),
    Goal("GatherStateDict", "mixed", 4, 1.3, 10, 1, _TENSOR),
    Goal("GatherStateDictToFirst", "model", 4, 1.3, 10, 2, _TENSOR),
    Goal("BroadcastStateDict", "many", 4, 1.3, 10, 50, _TENSOR),
    Goal("BroadcastStateDict", "model", 4, 1.3, 10, 1, _PACK),
    Goal("BroadcastStateDict", "large", 4, 1.3, 10, 2, _PACK),
    Goal("BroadcastStateDict", "mixed", 4, 1.3, 10, 1, _TENSOR),
    Goal("BroadcastWholeStateDict", "many", 4, 1.3, 10, 50, _TENSOR),
    Goal("BroadcastWholeStateDict", "large", 4, 1.3, 10, 1, _COPY),
    Goal("DistributeStateDict", "many", 4, 1.2, 10, 20, _SHARE),
    Goal("DistributeStateDict", "model", 4, 1.2, 10, 20, _SHARE),
    Goal("DistributeStateDict", "large", 4, 1.2, 10, 20, _SHARE),
    Goal("CopyStateDict", "many", 1, 1.2, 4, 1, _TENSOR),
    Goal("CopyStateDict", "model", 1, 1.2, 4, 1, _CHECKED),
    Goal("CopyStateDict", "large", 1, 1.2, 4, 1),
    Goal("OffloadStateDictToCpu", "many", 2, 1.2, 4, None, _TENSOR),
    Goal("OffloadStateDictToCpu", "model", 2, 1.2, 4, None, _TENSOR),
    Goal("OffloadStateDictToCpu", "large", 2, 1.2, 4, None),
    Goal("CreateCpuStateDict", "many", 2, None, 15, 20, _ALLOCATE),
    Goal("CreateCpuStateDict", "large", 2, None, 15, 20, _FEW),
    Goal("AllGatherDtensor", "model", 4, None, 0, 2, _ONE_BY_ONE),
    Goal("UnflattenTensor", "model", 2, 1, 5, 3, _DTENSOR),
    Goal("ReconstructDtensor", "model", 2, None, 0, 3, _DTENSOR),
    Goal("FlattenStateDict", "many", 1, None, 0, 2, _ALLOCATE),
    Goal("UnflattenStateDict", "many", 1, None, 0, 2, _ALLOCATE),
)


def main(settings: Settings, pattern: str | None) -> int:
    """Measure, print a row of Markdown for each goal; 1 for a miss without a reason."""
    from benchmarks.session.world import WorldError

    known = {type(b).__name__: b for b in benchmarks()}
    parent = Parent(settings)
    print(f"| {where(settings)} | limit | reference / floor | us a tensor | torch / reference | |")
    print("| --- | --- | ---: | ---: | ---: | --- |")
    chosen = [g for g in GOALS if pattern is None or re.search(pattern, g.benchmark)]
    status = 0
    for number, goal in enumerate(chosen, 1):
        name = f"{goal.benchmark} {goal.regime} x{goal.size}"
        print(f"{number}/{len(chosen)} {name}", file=sys.stderr, flush=True)
        try:
            found = parent.measure(known[goal.benchmark], goal.regime, goal.size)
        except WorldError as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 1
            continue
        if wrong := [f"{arm}: {n['wrong']}" for arm, n in found.items() if n.get("wrong")]:
            print(f"{name}: {'; '.join(wrong)}", file=sys.stderr)
            status = 1
            continue
        times = {arm: n["median"] for arm, n in found.items() if "median" in n}
        row, fine = _row(goal, times, len(leaves(goal.regime, settings.quick)))
        print(row, flush=True)
        status = status if fine else 1
    if not chosen:
        print(f"ci/bench: no goal's benchmark matches {pattern!r}", file=sys.stderr)
        return 3
    return status


def _row(goal: Goal, times: dict[str, float], tensors: int) -> tuple[str, bool]:
    ours = times[REFERENCE]
    reached = goal.reached(times, tensors)
    missed = [limit for limit, kept in reached.items() if not kept]
    slower = TORCH in times and goal.torch is not None and ours > times[TORCH]
    said = "met"
    if missed:
        said = f"**missed** ({', '.join(missed)}{'; slower than torch' if slower else ''}): "
        said += goal.why or "no reason recorded"
    cells: Sequence[Any] = (
        f"`{goal.benchmark}` {goal.regime}, {goal.size} ranks",
        _limit(goal),
        f"{ours / times['floor']:.2f}" if goal.floor is not None else "-",
        f"{ours / tensors * 1e6:.1f}",
        f"{times[TORCH] / ours:.2f}" if TORCH in times and goal.torch is not None else "-",
        said,
    )
    return f"| {' | '.join(cells)} |", not missed or bool(goal.why)


def _limit(goal: Goal) -> str:
    parts = []
    if goal.floor is not None:
        parts.append(f"{goal.floor:g} floor + {goal.per_tensor:g} us")
    elif goal.per_tensor:
        parts.append(f"{goal.per_tensor:g} us")
    if goal.torch is not None:
        parts.append(f"torch / {goal.torch:g}" if goal.torch != 1 else "torch")
    return ", ".join(parts)
