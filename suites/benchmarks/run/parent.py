"""The warm parent: torch imported once, data made once, a fresh world forked a measurement."""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import journal
from benchmarks.base import COUNTED, RATIOS, Measured
from benchmarks.journal import Arms
from benchmarks.listing import label
from benchmarks.machine_label import machine_label
from benchmarks.run.awake import keep_awake
from benchmarks.run.task import Task
from benchmarks.settings import (
    ARMS,
    FEWEST_WORLDS,
    TORCH,
    Settings,
    leaves,
)
from benchmarks.statistics import known, ratio, typical
from harness.system import processes, warm

if TYPE_CHECKING:
    import torch

    from benchmarks.run.world import MeasuredWorld


SEED = 0
LONGEST = 5.0
"""Times its budget that a measurement may take, where calls are so slow that a few fill a world."""
Wanted = tuple[Measured, str, int]
"""Benchmark, regime, size of the world."""


def named(module: str, name: str) -> Measured:
    """The benchmark of that name; LookupError with what there is instead."""
    found = getattr(importlib.import_module(module), name, None)
    if not (isinstance(found, type) and issubclass(found, Measured)):
        raise LookupError(f"{module} has no benchmark {name}")
    return found()


class Parent:
    """Measures whatever it is asked; one at a time, in the process that made it."""

    def __init__(self, settings: Settings) -> None:
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        warm.limit_threads()
        processes.adopt_orphans()
        warm.warm_up()
        keep_awake()
        self.settings = settings
        self._data: dict[str, dict[str, torch.Tensor]] = {}
        file = os.environ.get("SHARDPROOF_BENCH_JOURNAL")
        self._journal = Path(file) if file else None

    def measure(self, benchmark: Measured, regime: str, size: int, **how: Any) -> Arms:
        """One measurement; see `measure_each`. Raises `world.WorldError` where it gave nothing."""
        (found,) = self.measure_each([(benchmark, regime, size)], **how)
        if isinstance(found, Exception):
            raise found
        return found

    def measure_each(
        self,
        wanted: Sequence[Wanted],
        *,
        timed: bool = True,
        counted: bool = True,
        profiled: bool = False,
        told: Callable[[str], None] = lambda _: None,
        **how: Any,
    ) -> list[Arms | Exception]:
        """All of them in one world each, then all in the next, until the ratios of each are known.

        So the worlds of one are minutes apart where there are many: a neighbour on the machine who
        takes its cache for a while gets one of them, and the median forgives it. Counts and
        profiles are of the first. Of each the numbers as `measure_all` gives them, with median and
        ratios, or the `world.WorldError` that ended it; in the journal as soon as it is done, and
        what there is of it when it is interrupted.

        Args:
            wanted: (benchmark, regime, size) of each.
            timed: whether times are measured, and not counts alone.
            counted: whether collectives, bytes, peak and Python calls are counted.
            profiled: whether to say where the reference spends its time.
            told: hears what is measured next.
            how: more for `measure_all`.

        """
        from benchmarks.run.world import WorldError

        most = self.settings.worlds if timed else 1
        runs = [_Run(one) for one in wanted]
        try:
            for turn in range(most):
                for run in [run for run in runs if run.found is None]:
                    left = sum(other.found is None for other in runs)
                    told(f"world {turn + 1}, {left} of {len(runs)} not known yet: {run.label}")
                    begin = time.monotonic()
                    try:
                        run.worlds += self.measure_all(
                            [run.one],
                            timed=timed,
                            counted=counted and turn == 0,
                            profiled=profiled and turn == 0,
                            spent=sum(run.seconds),
                            **how,
                        )
                    except WorldError as error:
                        run.found = error
                        continue
                    run.seconds.append(time.monotonic() - begin)
                    if run.over(self.settings, most):
                        self._end(run)
        except KeyboardInterrupt:
            for run in runs:
                if run.worlds and run.found is None:
                    self._end(run)
            raise
        return [run.found for run in runs if run.found is not None]

    def _end(self, run: _Run) -> None:
        """The numbers of all worlds of a measurement, noted in the journal."""
        found = {arm: _together([world[arm] for world in run.worlds]) for arm in run.worlds[0]}
        for arm, numbers in found.items():
            for name, other in RATIOS.items():
                theirs = found.get(other, {}).get("seconds")
                if other != arm and theirs and numbers["seconds"]:
                    numbers[name] = ratio(numbers["seconds"], theirs)
        run.found = found
        if self._journal is not None:
            journal.write(self._journal, machine_label(self.settings), run.one, found)

    def measure_all(
        self,
        wanted: Sequence[Wanted],
        *,
        arms: tuple[str, ...] = ARMS,
        timed: bool = True,
        counted: bool = True,
        profiled: bool = False,
        spent: float = 0.0,
        abandoned: Callable[[], None] = lambda: None,
    ) -> Iterator[Arms]:
        """(benchmark, regime, size) one after the other in one world; all of one size.

        Of each: arm to its numbers, which are wrong, seconds (those of this world's rounds, the
        slowest rank's), and the counts; of the reference where its first rank spent its time, if
        `profiled`. `spent` of the seconds that one may take are gone already. Raises
        `world.WorldError` with the rank and the cause when the world gives no answer, RuntimeError
        when ranks cannot be forked.
        """
        tasks = []
        for benchmark, regime, size in wanted:
            here = tuple(arm for arm in arms if not benchmark.missing(arm, self.settings))
            data = self.data(regime)
            tasks.append(
                Task(
                    *(benchmark, regime, size, self.settings, data, here),
                    timed=timed,
                    counted=counted,
                    profiled=profiled,
                )
            )
        with self._world(tasks, spent) as world:
            for number, task in enumerate(tasks):
                by_rank = world.measured(number, abandoned)
                found = {arm: _merged([r[arm] for r in by_rank]) for arm in task.arms}
                for name in COUNTED:
                    if (task.regime, name) in task.benchmark.varies:
                        found.get(TORCH, {}).pop(name, None)
                yield found

    def fresh_worlds(self, size: int, count: int) -> list[float]:
        """Seconds that each of `count` worlds took from nothing to ready, and to its end."""
        seconds = []
        benchmark = named("benchmarks.bench_gather", "GatherStateDict")
        task = Task(benchmark, "", size, self.settings, {}, ())
        for _ in range(count):
            begin = time.perf_counter()
            with self._world([task]):
                pass
            seconds.append(time.perf_counter() - begin)
        return seconds

    @contextlib.contextmanager
    def _world(self, tasks: Sequence[Task], spent: float = 0.0) -> Iterator[MeasuredWorld]:
        """A world for these tasks, whose ranks have joined; `spent` of its seconds are gone."""
        from benchmarks.run.world import MeasuredWorld
        from harness.settings.requirements import WorldSpec

        own = self.settings
        limit = max(own.limit - spent, 2.0)
        collective = min(own.collective, limit / 2)
        spec = WorldSpec(
            *(tasks[0].size, own.backend, own.device, collective, limit),
            reuse=False,
            share_gpus=own.share_gpus,
        )
        world = MeasuredWorld(spec, SEED, tasks)
        with world.ended():
            if reason := warm.unfit():
                raise RuntimeError(reason)
            world.launch()
            world.gather()
            yield world

    def data(self, regime: str) -> dict[str, torch.Tensor]:
        """The whole tensors of the regime, made once."""
        from benchmarks.rank_context import values

        if regime not in self._data:
            made = leaves(regime, self.settings.quick)
            self._data[regime] = {leaf.name: values(n, leaf) for n, leaf in enumerate(made)}
        return self._data[regime]


@dataclass
class _Run:
    """A measurement, as far as it is done."""

    one: Wanted
    worlds: list[Arms] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """That each of its worlds took, with all that is not timed."""
    found: Arms | Exception | None = None
    """Its numbers, or why there are none; None: it goes on."""

    @property
    def label(self) -> str:
        return label(*self.one)

    def over(self, settings: Settings, most: int) -> bool:
        """Whether its ratios are known, or the time for them is over."""
        spent = sum(self.seconds)
        # The first counts, too, which may take longer than all that is timed.
        long = spent - self.seconds[0] > LONGEST * settings.world * most
        # What the last world took the next one may take, too: it has to fit, or what was
        # measured would be lost.
        late = spent + self.seconds[-1] > settings.limit
        enough = len(self.worlds) >= FEWEST_WORLDS and (long or _known(self.worlds))
        return enough or late or len(self.worlds) == most


def _known(worlds: Sequence[Arms]) -> bool:
    """Whether the ratios of all arms that have times in these worlds are known."""
    seconds = [[s for w in worlds for s in w[arm]["seconds"]] for arm in worlds[0]]
    return known([s for s in seconds if len(s) == len(worlds)])


def _merged(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One arm's numbers over all ranks of a world, of each count the largest.

    About what is wrong, and about times, the ranks have agreed.
    """
    first = ranks[0]
    if first["wrong"]:
        return {"wrong": first["wrong"], "seconds": []}
    counts = {name: max(r[name] for r in ranks) for name in COUNTED if name in first}
    return first | counts | {"seconds": [first["seconds"]] if first["seconds"] else []}


def _together(worlds: list[dict[str, Any]]) -> dict[str, Any]:
    """One arm's numbers over all worlds, counts of the first; none where a result was wrong."""
    if wrong := next((w["wrong"] for w in worlds if w["wrong"]), ""):
        return {"wrong": wrong, "seconds": []}
    seconds = [rounds for world in worlds for rounds in world["seconds"]]
    return worlds[0] | {"seconds": seconds} | ({"median": typical(seconds)} if seconds else {})
