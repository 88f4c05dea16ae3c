"""The warm parent: torch imported once, data made once, a fresh world forked a measurement."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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
        profiles are of the first. Of each the numbers as `measure_all` gives them, or the
        `world.WorldError` that ended it; in the journal as soon as it is done, and what there is of
        it when it is interrupted.

        Args:
            wanted: (benchmark, regime, size) of each.
            timed: whether times are measured, and not counts alone.
            counted: whether collectives, bytes, peak and Python calls are counted.
            profiled: whether to say where the reference spends its time.
            told: hears what is measured next.
            how: more for `measure_all`.

        """
        worlds: list[list[Arms]] = [[] for _ in wanted]
        done: dict[int, Arms | Exception] = {}
        try:
            self._go_on(wanted, worlds, done, timed, counted, profiled, told, how)
        except KeyboardInterrupt:
            for number, one in enumerate(wanted):
                if worlds[number] and number not in done:
                    self._whole(one, worlds[number])
            raise
        return [done[number] for number in range(len(wanted))]

    def _go_on(
        self,
        wanted: Sequence[Wanted],
        worlds: list[list[Arms]],
        done: dict[int, Arms | Exception],
        timed: bool,
        counted: bool,
        profiled: bool,
        told: Callable[[str], None],
        how: dict[str, Any],
    ) -> None:
        """Worlds of each of `wanted`, into `worlds`, until all are in `done`."""
        from benchmarks.run.world import WorldError

        most = self.settings.worlds if timed else 1
        spent, first, latest = ([0.0] * len(wanted) for _ in range(3))
        for turn in range(most):
            for number, one in enumerate(wanted):
                if number in done:
                    continue
                left = f"{len(wanted) - len(done)} of {len(wanted)} not known yet"
                told(f"world {turn + 1}, {left}: {label(*one)}")
                begin = time.monotonic()
                try:
                    worlds[number] += self.measure_all(
                        [one],
                        timed=timed,
                        counted=counted and turn == 0,
                        profiled=profiled and turn == 0,
                        spent=spent[number],
                        **how,
                    )
                except WorldError as error:
                    done[number] = error
                    continue
                latest[number] = time.monotonic() - begin
                spent[number] += latest[number]
                if turn == 0:
                    first[number] = spent[number]
                # The first counts, too, which may take longer than all that is timed.
                long = spent[number] - first[number] > LONGEST * self.settings.world * most
                # What the last world took the next one may take, too: it has to fit, or what was
                # measured would be lost.
                late = spent[number] + latest[number] > self.settings.limit
                enough = turn + 1 >= FEWEST_WORLDS and (long or _known(worlds[number]))
                if enough or late or turn + 1 == most:
                    done[number] = self._whole(one, worlds[number])

    def _whole(self, one: Wanted, worlds: Sequence[Arms]) -> Arms:
        """The numbers of all worlds of a measurement, noted in the journal."""
        found = {arm: _together([world[arm] for world in worlds]) for arm in worlds[0]}
        _relate(found)
        self._note(one, found)
        return found

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

        Of each: arm to its numbers, which are wrong, seconds (of each world those of its rounds,
        the slowest rank's), median, and the tracks; of the reference where its first rank spent
        its time, if `profiled`. `spent` of the seconds that one may take are gone already. Raises
        `world.WorldError` with the rank and the cause when the world gives no answer, RuntimeError
        when ranks cannot be forked.
        """
        from benchmarks.run.world import MeasuredWorld

        tasks = [
            replace(self._task(b, r, s, arms, timed, counted), profiled=profiled)
            for b, r, s in wanted
        ]
        world = MeasuredWorld(self._spec(tasks[0].size, spent), SEED, tasks)
        with world.ended():
            if reason := warm.unfit():
                raise RuntimeError(reason)
            world.launch()
            world.gather()
            for number, task in enumerate(tasks):
                by_rank = world.measured(number, abandoned)
                found = {arm: _merged([r[arm] for r in by_rank]) for arm in task.arms}
                for name in COUNTED:
                    if (task.regime, name) in task.benchmark.varies:
                        found.get(TORCH, {}).pop(name, None)
                _relate(found)
                yield found

    def fresh_worlds(self, size: int, count: int) -> list[float]:
        """Seconds that each of `count` worlds took from nothing to ready, and to its end."""
        from benchmarks.run.world import MeasuredWorld

        seconds = []
        benchmark = named("benchmarks.bench_gather", "GatherStateDict")
        task = Task(benchmark, "", size, self.settings, {}, ())
        for _ in range(count):
            begin = time.perf_counter()
            world = MeasuredWorld(self._spec(size), SEED, [task])
            with world.ended():
                world.launch()
                world.gather()
            seconds.append(time.perf_counter() - begin)
        return seconds

    def _task(
        self,
        benchmark: Measured,
        regime: str,
        size: int,
        arms: tuple[str, ...],
        timed: bool,
        counted: bool,
    ) -> Task:
        here = tuple(a for a in arms if not benchmark.missing(a, self.settings))
        return Task(benchmark, regime, size, self.settings, self.data(regime), here, timed, counted)

    def data(self, regime: str) -> dict[str, torch.Tensor]:
        """The whole tensors of the regime, made once."""
        from benchmarks.rank_context import values

        if regime not in self._data:
            made = leaves(regime, self.settings.quick)
            self._data[regime] = {leaf.name: values(n, leaf) for n, leaf in enumerate(made)}
        return self._data[regime]

    def _spec(self, size: int, spent: float = 0.0) -> Any:
        from harness.settings.requirements import WorldSpec

        own = self.settings
        limit = max(own.limit - spent, 2.0)
        collective = min(own.collective, limit / 2)
        return WorldSpec(
            *(size, own.backend, own.device, collective, limit),
            reuse=False,
            share_gpus=own.share_gpus,
        )

    def _note(self, one: Wanted, found: Arms) -> None:
        if self._journal is not None:
            journal.write(self._journal, machine_label(self.settings), one, found)


def _known(worlds: Sequence[Arms]) -> bool:
    """Whether the ratios of all arms that have times in these worlds are known."""
    seconds = [[s for w in worlds for s in w[arm]["seconds"]] for arm in worlds[0]]
    return known([s for s in seconds if len(s) == len(worlds)])


def _merged(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One arm's numbers over all ranks of a world: of each the largest."""
    merged: dict[str, Any] = {"wrong": next((r["wrong"] for r in ranks if r["wrong"]), "")}
    if "profile" in ranks[0]:
        merged["profile"] = ranks[0]["profile"]
    rounds = ranks[0]["seconds"]  # of all ranks already
    merged["seconds"] = [rounds] if rounds else []
    for name in COUNTED:
        if all(name in r for r in ranks):
            merged[name] = max(r[name] for r in ranks)
    return _believed(merged)


def _together(worlds: list[dict[str, Any]]) -> dict[str, Any]:
    """One arm's numbers over all worlds; what only the first has is its own."""
    together = dict(worlds[0])
    together["wrong"] = next((w["wrong"] for w in worlds if w["wrong"]), "")
    together["seconds"] = [rounds for world in worlds for rounds in world["seconds"]]
    return _believed(together)


def _believed(numbers: dict[str, Any]) -> dict[str, Any]:
    """The numbers with their median; none where a result was wrong."""
    if numbers["wrong"]:
        return {"wrong": numbers["wrong"], "seconds": []}
    if numbers["seconds"]:
        numbers["median"] = typical(numbers["seconds"])
    return numbers


def _relate(found: Arms) -> None:
    for arm, numbers in found.items():
        for name, other in RATIOS.items():
            theirs = found.get(other, {}).get("seconds")
            if other != arm and theirs and numbers["seconds"]:
                numbers[name] = ratio(numbers["seconds"], theirs)
