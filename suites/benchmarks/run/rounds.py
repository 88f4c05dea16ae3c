"""The rank's side: each arm in turns in one world, each result checked before its time counts."""

from __future__ import annotations

import gc
import math
import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from benchmarks.rank_context import RankContext
from benchmarks.run.counting import count
from benchmarks.run.profiling import profile
from benchmarks.settings import FLOOR, REFERENCE, crowded, leaves
from benchmarks.statistics import settled
from benchmarks.work import Work

if TYPE_CHECKING:
    from benchmarks.run.task import Task

SHORTEST, SHORTEST_SHARED = 0.002, 0.02
"""Seconds that a sample lasts at least; shorter calls are repeated within one. The second: where
ranks outnumber the cores. A call that ends within the scheduler's slice of time is as fast as on a
core of its own, another waits for all the others: samples are long enough to wait each time."""
MOST_CALLS = 2000
MOST_RESETS = 50
"""Calls a sample where each has to be reset: resets and checks take longer than they do."""
PREPARED = 0.5
"""Rounds last at least this share of what it took to build the arms and to do each of them once:
where a model takes 20 s to lay out, one more round costs less than one more world."""
SETTLING = 1 / 8
"""Share of the time for rounds before which they do not end, however alike they are: a heap that
grows, or a neighbour on the machine, lasts for seconds."""
MOST_SAMPLES = 25
SHARE = 0.25
"""An arm that is done sooner takes more samples in a round, whose median counts: up to so many, and
no more of the round's time than this share of the slowest arm's. Where torch takes 13 s and the
reference 0.1 s, five rounds are five samples of one and 125 of the other."""


def measure(task: Task, rank: int, device: torch.device) -> dict[str, Any]:
    """Try, count and time each arm; arm to `wrong`, `seconds`, `collectives`, `received`, `peak`.

    The reference's has its `profile`, too, where that is asked for.

    Every rank of the world calls it. `wrong` says why an arm has no number. `seconds` are those of
    a call, one for each round: the median of its samples, and of each sample the slowest rank's
    time, since a collective is over when its last rank is.
    """
    regime = leaves(task.regime, task.settings.quick)
    ctx = RankContext(rank, task.size, device, task.benchmark.fake, regime, task.data)
    found: dict[str, dict[str, Any]] = {}
    works: dict[str, Work] = {}
    begin = time.monotonic()
    for arm in task.arms:
        ctx.arm = arm
        wrong, work = _build(task, ctx)
        found[arm] = {"wrong": wrong, "seconds": []}
        if not wrong:
            works[arm] = work
    (building,) = ctx.largest([time.monotonic() - begin])
    # Counts come first: torch's shared memory remembers how often it was called.
    if task.counted:
        for arm, work in works.items():
            found[arm] |= count(work.call, work.reset, device)
    if task.timed and works:
        budget = max(task.settings.world, PREPARED * building)
        _time(ctx, works, found, task.settings.rounds, budget)
    if task.profiled and REFERENCE in works:
        work = works[REFERENCE]
        seconds = statistics.median(found[REFERENCE]["seconds"] or [math.inf])
        found[REFERENCE]["profile"] = profile(work.call, work.reset, seconds)
    return found


def _build(task: Task, ctx: RankContext) -> tuple[str, Work]:
    """Build the arm's work and do it: a first call does what later ones do not.

    Twice where no clock comes next, whose first sample does not count either. All ranks agree
    after each step, so that none is alone in the next call's collectives.
    """
    work = Work(lambda: None, lambda _: None)

    def build() -> None:
        nonlocal work
        work = (task.benchmark.floor if ctx.arm == FLOOR else task.benchmark.work)(ctx)

    def once() -> None:
        work.reset()
        work.check(work.call())

    for step in (build, once, once) if task.counted or not task.timed else (build, once):
        if wrong := ctx.agree(_attempt(step)):
            return wrong, work
    return "", work


def _attempt(step: Callable[[], object]) -> str:
    """Do it; what goes wrong, in a line, empty where nothing does."""
    try:
        step()
    except AssertionError as error:
        return f"its result is wrong: {_line(error)}"
    except Exception as error:
        print(traceback.format_exc(), flush=True)
        return f"it raises {type(error).__name__}: {_line(error)}"
    return ""


def _line(error: Exception) -> str:
    return (str(error).strip() or "(no text)").partition("\n")[0][:500]


def _time(
    ctx: RankContext,
    works: dict[str, Work],
    found: dict[str, dict[str, Any]],
    rounds: tuple[int, int],
    budget: float,
) -> None:
    """Rounds until the ratios are known well enough, or the time for them is over."""
    calls, samples = _plan(ctx, works)
    fewest, most = rounds
    begin, done = time.monotonic(), 0
    order = list(works)
    while order:
        turn = done % len(order)
        told = []
        for arm in (turned := order[turn:] + order[:turn]):
            for _ in range(samples[arm]):
                seconds, wrong = _sample(ctx, works[arm], calls[arm])
                told.append(seconds)
                found[arm]["wrong"] = found[arm]["wrong"] or wrong
        done += 1
        # All ranks hold the same numbers then, and end together: one that went on alone would
        # wait in the next collective.
        *told, spent = ctx.largest([*told, time.monotonic() - begin])
        for arm in turned:
            found[arm]["seconds"].append(statistics.median(told[: samples[arm]]))
            del told[: samples[arm]]
        over = done >= fewest and spent * (done + 1) / done > budget
        known = spent > SETTLING * budget and settled([found[a]["seconds"] for a in order])
        if over or known or done >= most:
            break
    for arm in works:
        found[arm]["wrong"] = ctx.agree(found[arm]["wrong"])


def _plan(ctx: RankContext, works: dict[str, Work]) -> tuple[dict[str, int], dict[str, int]]:
    """Of each arm, how many calls fill a sample, and how many samples it takes in a round."""
    calls, seconds = {}, {}
    least = SHORTEST_SHARED if crowded(ctx.size) and not ctx.fake else SHORTEST
    for arm, work in works.items():
        (one,) = ctx.largest(_sample(ctx, work, 1)[:1])
        one = max(one, 1e-9)
        most = MOST_RESETS if work.resets else MOST_CALLS
        calls[arm] = max(1, min(most, math.ceil(least / one)))
        seconds[arm] = calls[arm] * one
    longest = max(seconds.values())
    samples = {
        arm: max(1, min(MOST_SAMPLES, round(SHARE * longest / took)))
        for arm, took in seconds.items()
    }
    return calls, samples


def _sample(ctx: RankContext, work: Work, number: int) -> tuple[float, str]:
    """Seconds a call on this rank, and what is wrong with the results of these very calls."""
    wrong, seconds = "", 0.0
    for calls in [1] * number if work.resets else [number]:
        work.reset()
        took, results = _timed(ctx, work, calls)
        seconds += took
        wrong = wrong or _attempt(partial(_check, work, results))
    return seconds / number, wrong


def _check(work: Work, results: list[Any]) -> None:
    for result in results:
        work.check(result)


def _timed(ctx: RankContext, work: Work, number: int) -> tuple[float, list[Any]]:
    """Seconds that so many calls took on this rank, and their results."""
    results: list[Any] = []
    gc.collect(1)
    gc.disable()
    try:
        ctx.synchronize()
        if dist.get_world_size() > 1 and not ctx.fake:
            dist.barrier()
        begin = time.perf_counter()
        for _ in range(number):
            results.append(work.call())
        ctx.synchronize()
        return time.perf_counter() - begin, results
    finally:
        gc.enable()
