"""What the reference is to reach, beside what it reaches here: `ci/bench --goals`.

Where a goal names no more, a benchmark must not be slower than torch. A limit that is missed
stands with the reason that a profile gave. A miss without one ends with 1. Reasons hold on the CPU;
on a device the profile of each miss stands for them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.base import Measured
from benchmarks.listing import benchmarks, label
from benchmarks.results.measurements import measure_or_read
from benchmarks.run.parent import Wanted
from benchmarks.settings import FLOOR, REFERENCE, TORCH, Settings, leaves
from benchmarks.statistics import Worlds, interval, ratio, ratios, typical
from benchmarks.work import Work

if TYPE_CHECKING:
    from benchmarks.rank_context import RankContext


class _Agreement(Measured):
    """What ranks may pay to agree on keys and shapes: two small all-gathers."""

    absent = dict.fromkeys((TORCH, REFERENCE), "a limit, not a function")

    def work(self, ctx: RankContext) -> Work:
        return self.floor(ctx)

    def floor(self, ctx: RankContext) -> Work:
        small = ctx.gathers(64 * (ctx.size - 1))

        def check(got: tuple[Any, Any]) -> None:
            small.check(got[0])
            small.check(got[1])

        return Work(lambda: (small.call(), small.call()), check)


class Goal(NamedTuple):
    """How fast a benchmark is to be in a regime.

    Attributes:
        benchmark: the class's name.
        regime: its regime.
        floor: at most this many times the floor's time; None where a floor says nothing.
        per_tensor: and as much more for each tensor, in us: what Python may cost. Where ranks
            agree, the time of two small collectives comes on top.
        torch: at least this many times as fast as torch; 1: not slower; None where torch does
            something else.
        why: the reason of a miss, from a profile.

    """

    benchmark: str
    regime: str
    floor: float | None = None
    per_tensor: float = 0
    torch: float | None = 1
    why: str = ""

    def matches(self, pattern: str) -> bool:
        """Whether a regular expression finds it by the benchmark's name, or that and the regime."""
        names = self.benchmark, f"{self.benchmark} {self.regime}"
        return any(re.search(pattern, name) for name in names)


class Reached(NamedTuple):
    """What was measured, held against a goal.

    Attributes:
        to_floor: our time over the floor's; None where the goal has no floor.
        per_tensor: our time for each tensor, in us.
        to_torch: torch's time over ours: smallest, median, largest that it may be.
        missed: the limits that are missed: floor, torch.

    """

    to_floor: float | None
    per_tensor: float
    to_torch: tuple[float, float, float] | None
    missed: tuple[str, ...]

    @property
    def slower(self) -> bool:
        """Whether torch is faster beyond what noise explains."""
        return self.to_torch is not None and self.to_torch[2] < 1


def reached(goal: Goal, seconds: Mapping[str, Worlds], tensors: int, agreement: float) -> Reached:
    """Hold samples against a goal.

    Args:
        goal: the goal.
        seconds: arm to its times of each round of each world.
        tensors: how many tensors the call takes.
        agreement: seconds that agreeing may take.

    """
    ours = typical(seconds[REFERENCE])
    missed = []
    to_floor = None
    allowed = goal.per_tensor * 1e-6 * tensors + agreement
    if goal.floor is not None:
        to_floor = ratio(seconds[REFERENCE], seconds[FLOOR])
        if to_floor > goal.floor + allowed / typical(seconds[FLOOR]):
            missed.append("floor")
    elif goal.per_tensor and ours > allowed:
        missed.append("floor")
    to_torch = None
    if goal.torch is not None and TORCH in seconds:
        low, high = interval(ratios(seconds[TORCH], seconds[REFERENCE]))
        to_torch = low, ratio(seconds[TORCH], seconds[REFERENCE]), high
        # A goal of 1 asks that torch be not faster, and noise makes either faster now and then.
        if high < 1 or (goal.torch > 1 and to_torch[1] < goal.torch):
            missed.append("torch")
    return Reached(to_floor, ours / tensors * 1e6, to_torch, tuple(missed))


_TENSOR = (
    "Python for each tensor besides the bytes, which four ranks on two cores see twice: a third "
    "looks at each DTensor (spec, local tensor, address), a third makes the results, in memory "
    "that is new to the processor, the rest packs, names and agrees"
)
_OFFERED = (
    "Python for each tensor besides the bytes, which four ranks on two cores see twice: the source "
    "looks at its tensors, then each rank at its targets, then the source packs; the source has "
    "half as much again to do as the others"
)
_EACH_ITS_OWN = (
    "336 tensors of as many layouts: each has its own views, piece and result, where tensors that "
    "are laid out alike share all that; and a mesh of two dimensions is two hops"
)
_PACK = (
    "the floor's rows are packed before the clock runs; here the source packs them, which is two "
    "thirds of its time, and every rank copies its part out of the bucket"
)
_COPY = "torch leaves the source's own tensor in place; here the source has a copy (isolation)"
_ONE_BY_ONE = (
    "a collective for each tensor, for both, since the call takes one tensor: sending and waiting "
    "are three quarters; what is ours besides takes 0.6 to 0.8 of what is torch's"
)
_DTENSOR = "what is more than the DTensor: its shape is checked against the spec, and the hook set"
_ALLOCATE = "both allocate each tensor, and that is nearly all; nothing is copied by either"
_WALK = "nearly all is one loop over the items: a path, a name and three entries for each leaf"
_CHECKED = "the same copies; that all leaves are checked before the first is written is the rest"
_ASKED = "the copies are one call, half of it; the rest asks of each pair whether it fits"
_SNAPSHOT = (
    "a bare loop that clones each and makes the DTensor is three quarters: memory of its own and "
    "the wrapper; what is left asks for type, ties and requires_grad"
)
_PIECES = (
    "two thirds are the copies, of each tensor into memory of its own, where the floor is one copy "
    "of the same bytes; most of the rest makes the DTensors"
)
_FEW = (
    "half is 32 MiB mapped for each tensor and unmapped with it, without a write; most of the rest "
    "is the call itself, which four tensors share"
)
_FIRST = (
    "torch makes the Parameters and no more, and has lost them after the first forward: here each "
    "module gets its hooks and each Parameter its record, once; after a forward it puts them back"
)
_UNASKED = (
    "1 to 2 us a weight, once, when a model is wrapped: torch sets the flag of the DTensor's own "
    "local tensor, of frozen and integer ones too; here the DTensor is asked (to ask alone takes "
    "two thirds of torch's time), and what trains is a view, so that the DTensor stays as it is"
)
_SHARE = (
    "the copy, which is all that the floor does, is a tenth of it for many small tensors and a "
    "third for a model; the rest looks at each target, cuts its part out of the full tensor and "
    "makes the DTensor"
)
_NO_FASTER = (
    "nearly all is the copy of the shards, as the floor's is, but into new memory; 20 times as "
    "fast as torch would be five times as fast as that copy"
)
GOALS: tuple[Goal, ...] = (
    Goal("GatherStateDict", "many", 1.3, 10, 50, _TENSOR),
    Goal("GatherStateDict", "model", 1.3, 10, 1, _TENSOR),
    Goal("GatherStateDict", "large", 1.3, 10, 1, "both are the all-gather itself"),
    Goal("GatherStateDict", "mixed", 1.3, 10, 1, _EACH_ITS_OWN),
    Goal("GatherStateDictToFirst", "many", 1.3, 10, 2, _TENSOR),
    Goal("GatherStateDictToFirst", "model", 1.3, 10, 2, _TENSOR),
    Goal("GatherStateDictToFirst", "large", 1.3, 10, 2),
    Goal("BroadcastStateDict", "many", 1.3, 10, 50, _OFFERED),
    Goal("BroadcastStateDict", "model", 1.3, 10, 1, _PACK),
    Goal("BroadcastStateDict", "large", 1.3, 10, 2, _PACK),
    Goal("BroadcastStateDict", "mixed", 1.3, 10, 1, _EACH_ITS_OWN),
    Goal("BroadcastWholeStateDict", "many", 1.3, 10, 50, _OFFERED),
    Goal("BroadcastWholeStateDict", "large", 1.3, 10, 1, _COPY),
    Goal("DistributeStateDict", "many", 1.2, 10, 20, _SHARE),
    Goal("DistributeStateDict", "model", 1.2, 10, 20, _SHARE),
    Goal("DistributeStateDict", "large", 1.2, 10, 20, _NO_FASTER),
    Goal("CopyStateDict", "many", 1.2, 4, 1, _ASKED),
    Goal("CopyStateDict", "model", 1.2, 4, 1, _CHECKED),
    Goal("CopyStateDict", "large", 1.2, 4, 1),
    Goal("OffloadStateDictToCpu", "many", 1.2, 4, None, _SNAPSHOT),
    Goal("OffloadStateDictToCpu", "model", 1.2, 4, None, _PIECES),
    Goal("OffloadStateDictToCpu", "large", 1.2, 4, None),
    Goal("CreateCpuStateDict", "many", None, 15, 20, _ALLOCATE),
    Goal("CreateCpuStateDict", "large", None, 15, 20, _FEW),
    Goal("ChunkDtensor", "model", None, 0, 2),
    Goal("AllGatherDtensor", "model", None, 0, 2, _ONE_BY_ONE),
    Goal("LocalizeDtensor", "model", None, 0, 3, _FIRST),
    Goal("FlattenTensor", "model", None, 0, 1, _UNASKED),
    Goal("PreLoadStateDict", "model"),
    Goal("UnflattenTensor", "model", 1, 5, 3, _DTENSOR),
    Goal("ReconstructDtensor", "model", None, 0, 3, _DTENSOR),
    Goal("FlattenStateDict", "many", None, 0, 2, _WALK),
    Goal("UnflattenStateDict", "many", None, 0, 2, _WALK),
)


def all_goals() -> list[Goal]:
    """GOALS, and that no other benchmark, in no other regime, is slower than torch."""
    known = {(goal.benchmark, goal.regime) for goal in GOALS}
    found = list(GOALS)
    for benchmark in benchmarks():
        name = type(benchmark).__name__
        if not benchmark.fake:
            found += [Goal(name, r) for r in benchmark.regimes if (name, r) not in known]
    return found


def size_of(benchmark: Measured, wanted: int) -> int:
    """The size of its worlds nearest to the wanted one."""
    return min(benchmark.sizes, key=lambda size: (abs(size - wanted), size))


def main(settings: Settings, pattern: str | None, world: int, file: Path | None) -> int:
    """Measure, or read a journal, and print a row of Markdown for each goal.

    Ends with 0; 1: a miss without a reason, or a wrong result; 2: no journal; 3: nothing was
    measured.
    """
    known = {type(b).__name__: b for b in benchmarks()}
    chosen = [goal for goal in all_goals() if pattern is None or goal.matches(pattern)]
    chosen = [g for g in chosen if not known[g.benchmark].missing(REFERENCE, settings)]
    if not chosen:
        print(f"ci/bench: no goal's benchmark matches {pattern!r}", file=sys.stderr)
        return 3
    wanted: dict[Goal, Wanted] = {}
    for goal in chosen:
        benchmark = known[goal.benchmark]
        one = benchmark, goal.regime, size_of(benchmark, world)
        if reason := settings.beyond(one[2]):
            print(f"{label(*one)}: {reason}", file=sys.stderr)
        else:
            wanted[goal] = one
    if not wanted:
        print("ci/bench: no goal's world fits here", file=sys.stderr)
        return 3
    sizes = sorted({size for _, _, size in wanted.values()} - {1})
    agreements = [(_Agreement(), "model", size) for size in sizes]
    measured = measure_or_read([*agreements, *wanted.values()], settings, file, profiled=True)
    if measured is None:
        return 2
    place, results = measured
    agreement = {1: 0.0}
    for size, told in zip(sizes, results, strict=False):
        if isinstance(told, Exception):
            print(f"the agreement of {size} ranks: {told}", file=sys.stderr)
            return 3
        agreement[size] = told[FLOOR]["median"]
    print(f"| {place} | limit | reference / floor | us a tensor | torch / reference (95 %) | |")
    print("| --- | --- | ---: | ---: | ---: | --- |")
    status = 0
    profiles: list[str] = []
    for (goal, one), found in zip(wanted.items(), results[len(sizes) :], strict=True):
        size = one[2]
        if isinstance(found, Exception):
            print(f"{label(*one)}: {found}", file=sys.stderr)
            status = 1
            continue
        if wrong := [f"{arm}: {n['wrong']}" for arm, n in found.items() if n.get("wrong")]:
            print(f"{label(*one)}: {'; '.join(wrong)}", file=sys.stderr)
            status = 1
            continue
        seconds = {arm: n["seconds"] for arm, n in found.items()}
        tensors = len(leaves(goal.regime, settings.quick))
        agrees = agreement[size] if found[REFERENCE].get("collectives") else 0.0
        got = reached(goal, seconds, tensors, agrees)
        why = goal.why if settings.device == "cpu" else "its profile stands below"
        row, fine = _row(goal, size, got, why)
        print(row, flush=True)
        status = status if fine else 1
        # A journal of `--table` has none.
        if got.missed and (lines := found[REFERENCE].get("profile")):
            profiles += _profile(f"{goal.benchmark} {goal.regime}", lines)
    print("\n".join(profiles))
    return status


def _profile(name: str, lines: Sequence[tuple[float, int, str]]) -> list[str]:
    whole = sum(own for own, _, _ in lines)
    return [
        "",
        f"`{name}`, {whole * 1e3:.3g} ms on rank 0 under the profiler",
        "",
        "```text",
        "share   entries  where",
        *(f"{own / whole:5.0%} {entries:9}  {where}" for own, entries, where in lines),
        "```",
    ]


def _row(goal: Goal, size: int, got: Reached, why: str) -> tuple[str, bool]:
    said = "met" if goal.floor or goal.per_tensor or got.to_torch else "torch has no number"
    if got.missed:
        limits = ", ".join(got.missed) + ("; slower than torch" if got.slower else "")
        said = f"**missed** ({limits}): {why or 'no reason recorded'}"
    to_torch = "-"
    if got.to_torch is not None:
        low, middle, high = got.to_torch
        to_torch = f"{middle:.2f} ({low:.2f} to {high:.2f})"
    cells = (
        f"`{goal.benchmark}` {goal.regime}, {size} rank{'s' if size > 1 else ''}",
        _limit(goal),
        f"{got.to_floor:.2f}" if got.to_floor is not None else "-",
        f"{got.per_tensor:.1f}",
        to_torch,
        said,
    )
    return f"| {' | '.join(cells)} |", not got.missed or bool(why)


def _limit(goal: Goal) -> str:
    parts = []
    if goal.floor is not None:
        parts.append(f"{goal.floor:g} floor + {goal.per_tensor:g} us")
    elif goal.per_tensor:
        parts.append(f"{goal.per_tensor:g} us")
    if goal.torch is not None:
        parts.append(f"torch / {goal.torch:g}" if goal.torch != 1 else "torch")
    return ", ".join(parts)
