"""Worlds of a measurement go on until its ratios are known, and what they gave is kept."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import base, bench_tensor_parallel
from benchmarks.journal import read
from benchmarks.listing import benchmarks
from benchmarks.run.parent import Parent
from benchmarks.settings import FLOOR, REFERENCE, TORCH, Settings


@pytest.mark.parametrize(
    ("settings", "worlds"),
    [
        (Settings(), 20),
        (Settings(seconds=112), 28),
        (Settings(seconds=13), 3),
        (Settings(seconds=9), 2),
        (Settings(seconds=2), 1),
        (Settings(quick=True), 1),
    ],
)
def test_rounds_are_spread_over_worlds(settings: Settings, worlds: int) -> None:
    assert settings.worlds == worlds


@pytest.mark.parametrize(
    ("took", "spread", "worlds"),
    [(1, 0.0, 4), (1, 0.2, 10), (1, 1.0, 20), (100, 1.0, 6), (500, 1.0, 2), (700, 1.0, 1)],
)
def test_worlds_go_on_until_the_ratios_are_known(
    monkeypatch: pytest.MonkeyPatch, took: float, spread: float, worlds: int
) -> None:
    """Or the time for them is over; counts are those of the first.

    The floor's times are 1 and `spread` more in turns, whose standard deviation is about half of
    it. Of very long worlds none is begun that the deadline would end.
    """
    now, asked = 0.0, []

    def one_world(self: Parent, wanted: Any, *, counted: bool, **how: Any) -> Iterator[Any]:
        nonlocal now
        now += took
        asked.append(counted)
        odd = 1 + spread * (len(asked) % 2)
        floor = {"wrong": "", "seconds": [[odd]]}
        ours: dict[str, Any] = {"wrong": "", "seconds": [[1.0]]}
        yield {REFERENCE: ours | ({"calls": 5} if counted else {}), FLOOR: floor}

    monkeypatch.setattr(Parent, "measure_all", one_world)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    one = object.__new__(Parent)
    one.settings, one._journal = Settings(), None
    found = one.measure(benchmarks()[0], "many", 2)[REFERENCE]
    assert found["seconds"] == [[1.0]] * worlds
    assert found["calls"] == 5
    assert asked == [True] + [False] * (worlds - 1)


@pytest.mark.parametrize(
    ("worlds", "quick", "told"),
    [
        ([2.0, 2.05, 1.95, 2.0], False, True),
        ([2.0, 3.0, 1.5, 2.0], False, False),
        ([2.0, 2.0, 2.0], False, False),
        ([2.0], True, True),
    ],
)
def test_a_ratio_that_is_not_known_has_no_number(
    monkeypatch: pytest.MonkeyPatch, worlds: list[float], quick: bool, told: bool
) -> None:
    """Two runs would not agree about it; a quick run says quick in its name."""
    ours: dict[str, Any] = {"seconds": [[s] for s in worlds], "ratio_to_floor": 2.0, "peak": 5}
    arms = {REFERENCE: ours, FLOOR: {"seconds": [[1.0]] * len(worlds)}}
    monkeypatch.setattr(base, "_ask", lambda *_: arms)
    for name, value in Settings(quick=quick).environment().items():
        monkeypatch.setenv(name, value)
    benchmark: Any = bench_tensor_parallel.LocalizeDtensor()
    asked = (REFERENCE, "many", "4 ranks, gloo on cpu")
    got = benchmark.track_ratio_to_floor(*asked)
    assert got == 2.0 if told else math.isnan(got)
    assert benchmark.track_peak(*asked) == 5


def test_cpus_tick_as_long_as_their_parent_lives() -> None:
    """One process on each CPU, which ends with its parent however that ends."""
    code = (
        "import time; from benchmarks.run.awake import keep_awake\n"
        "print(*keep_awake(), flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        try:
            soon = time.monotonic() + 5
            while min(map(_switches, pids)) < 50:
                assert time.monotonic() < soon, f"{[_switches(pid) for pid in pids]} ticks in 5 s"
                time.sleep(0.05)
            each = [os.sched_getaffinity(pid) for pid in pids]
            assert each == [{cpu} for cpu in sorted(os.sched_getaffinity(0))]
        finally:
            parent.kill()
    deadline = time.monotonic() + 5
    while not all(map(_ended, pids)):
        assert time.monotonic() < deadline, f"one of {pids} lives on"
        time.sleep(0.01)


def _switches(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(ln for ln in lines if ln.startswith("voluntary_ctxt_switches")).split()[1])


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_wrong_arm_does_not_keep_a_measurement_going(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no times, so no ratio of it can become known."""

    def one_world(self: Parent, wanted: Any, **how: Any) -> Iterator[Any]:
        fine = {"wrong": "", "seconds": [[1.0]]}
        yield {REFERENCE: fine, FLOOR: fine, TORCH: {"wrong": "on purpose", "seconds": []}}

    monkeypatch.setattr(Parent, "measure_all", one_world)
    one = object.__new__(Parent)
    one.settings, one._journal = Settings(), None
    found = one.measure(benchmarks()[0], "many", 2)
    assert len(found[REFERENCE]["seconds"]) == 4
    assert found[TORCH] == {"wrong": "on purpose", "seconds": []}


def test_a_measurement_is_in_the_journal_as_soon_as_it_is_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its neighbour, which needs more worlds, does not hold it up.

    A run that is stopped keeps of that what it has.
    """
    file = tmp_path / "journal"
    worlds = 0

    def one_world(self: Parent, wanted: Any, **how: Any) -> Iterator[Any]:
        nonlocal worlds
        seconds = 1.0
        if wanted[0][2] == 4:
            worlds += 1
            seconds += worlds
            if worlds == 6:
                raise KeyboardInterrupt
        floor = {"wrong": "", "seconds": [[seconds]]}
        yield {REFERENCE: {"wrong": "", "seconds": [[1.0]]}, FLOOR: floor}

    monkeypatch.setattr(Parent, "measure_all", one_world)
    one = object.__new__(Parent)
    one.settings, one._journal = Settings(), file
    wanted = [(benchmarks()[0], "many", size) for size in (2, 4)]
    with pytest.raises(KeyboardInterrupt):
        one.measure_each(wanted)
    kept = read(file)[1]
    assert [line.rpartition(" x")[2] for line in kept] == ["2", "4"]
    assert [len(arms[REFERENCE]["seconds"]) for arms in kept.values()] == [4, 5]
