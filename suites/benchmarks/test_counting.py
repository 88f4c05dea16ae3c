"""What is counted of a call: collectives, bytes from others, memory, calls."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

from benchmarks.run import peaks
from benchmarks.run.counting import Traffic, count, python_calls
from benchmarks.run.peaks import PEAKS, Settled, peak_bytes, settle
from benchmarks.run.profiling import CALLS, MOST_CALLS, profile
from benchmarks.statistics import (
    FEWEST,
    PRECISION,
    interval,
    middle,
    ratio,
    ratios,
    settled,
    typical,
    width,
)

CPU = torch.device("cpu")


@pytest.mark.world(4)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_bytes_that_come_from_others(world: Any, rank: int) -> None:
    """Each collective counts once, with the bytes that this rank did not have."""
    part, whole = torch.ones(8), torch.ones(32)
    parts = [torch.ones(8) for _ in range(4)]
    cases = [
        ("all-gather", lambda: dist.all_gather_into_tensor(whole, part), 96),
        ("all-gather of a list", lambda: dist.all_gather(parts, part), 96),
        ("broadcast", lambda: dist.broadcast(part, 2), 0 if rank == 2 else 32),
        ("scatter", lambda: dist.scatter(part, parts if rank == 1 else None, 1), 32 * (rank != 1)),
        ("gather", lambda: dist.gather(part, parts if rank == 0 else None), 96 * (rank == 0)),
        ("all-reduce", lambda: dist.all_reduce(part), 48),
        ("all-to-all", lambda: dist.all_to_all_single(torch.empty(32), whole), 96),
        ("barrier", dist.barrier, 0),
    ]
    for name, call, received in cases:
        with Traffic() as seen:
            call()
        assert seen.received == received, f"{name}: {seen.received} bytes"
        assert seen.names.total() == (name != "barrier"), f"{name}: {seen.names}"


@pytest.mark.world(2)
def test_an_unknown_collective_is_refused(world: Any) -> None:
    """A collective whose bytes nobody stated is an error, not a zero."""
    tensor = torch.ones(4)
    with pytest.raises(NotImplementedError, match="reduce is not known"), Traffic():
        dist.reduce(tensor, 0)


@pytest.mark.world(1)  # the profiler starts a thread, and the parent has none to fork with
def test_the_peak_counts_what_is_freed_within_the_call(world: Any) -> None:
    def call() -> torch.Tensor:
        large = torch.empty(1 << 20, dtype=torch.uint8)
        del large
        return torch.empty(1 << 10, dtype=torch.uint8)

    assert peak_bytes(call, CPU) == 1 << 20
    assert peak_bytes(call, CPU) == 1 << 20


def test_settling_waits_for_a_thread_that_has_work_left() -> None:
    """However late it runs: no time is enough on a machine that is busy."""
    begun = threading.Event()
    end = time.monotonic() + 0.2

    def works() -> None:
        begun.set()
        while time.monotonic() < end:
            sum(range(1000))

    thread = threading.Thread(target=works)
    thread.start()
    begun.wait()
    settle()
    assert time.monotonic() >= end
    thread.join()


def test_a_thread_that_never_sleeps_is_named(monkeypatch: Any) -> None:
    monkeypatch.setattr(peaks, "LONGEST_SETTLING", 0.0)
    monkeypatch.setattr(peaks, "_running", lambda: "71 (spins)")
    with pytest.raises(TimeoutError, match=r"the thread 71 \(spins\) runs"):
        settle()


@pytest.mark.world(2)
def test_the_peak_is_settled_after_each_collective(world: Any, monkeypatch: Any) -> None:
    """Once before the next operation, for one that its caller waits for and for a functional one.

    Not while it is under way: threads that wait for the other rank sleep, and hold its buffers.
    """
    waits: list[int] = []
    group = dist.group.WORLD
    assert group is not None
    monkeypatch.setattr(peaks, "settle", lambda: waits.append(1))
    tensor = torch.ones(4)
    with Settled():
        work = dist.all_reduce(tensor, async_op=True)
        assert work is not None
        work.wait()
        assert not waits
        torch.empty(1)
        torch.empty(1)
        assert len(waits) == 1
        funcol.all_reduce(tensor, "sum", group).add(1)
        assert len(waits) == 2
        torch.empty(1)
    assert len(waits) == 2


def test_calls_are_those_of_the_call() -> None:
    def leaf() -> None: ...

    def call() -> None:
        for _ in range(5):
            leaf()

    assert python_calls(call) == 6


@pytest.mark.world(1)
def test_counts_reset_before_each_call(world: Any) -> None:
    resets = 0

    def reset() -> None:
        nonlocal resets
        resets += 1

    count(lambda: None, reset, CPU)
    assert resets == 2 + PEAKS


def test_a_ratio_is_of_the_same_rounds() -> None:
    """A machine that is slow for a while slows both, and the ratio stays."""
    assert ratio([[2.0, 20.0, 2.0]], [[1.0, 10.0, 1.0]]) == 2.0


def test_each_world_counts_once() -> None:
    """However many rounds the odd one had."""
    ours, floor = [[2.0] * 9, [5.0] * 50, [2.2] * 9], [[1.0] * 9, [1.0] * 50, [1.0] * 9]
    assert ratios(ours, floor) == [2.0, 5.0, 2.2]
    assert ratio(ours, floor) == 2.2
    assert ratio([*ours, [2.4]], [*floor, [1.0]]) == middle([2.0, 5.0, 2.2, 2.4])
    assert typical(ours) == 2.2


def test_an_odd_world_in_four_is_forgiven() -> None:
    """It lies among the five that are alike, and each of those counts."""
    assert 1.0 < middle([1.0, 1.05, 1.1, 1.15, 1.2, 9.0]) < 1.2
    assert middle([2.0, 8.0]) == pytest.approx(4.0)
    assert middle([3.0] * 5 + [30.0]) == 3.0


def test_rounds_are_the_samples_where_there_is_one_world() -> None:
    assert ratios([[2.0, 3.0, 4.0]], [[1.0, 1.0, 2.0]]) == [2.0, 3.0, 2.0]


@pytest.mark.parametrize(
    ("count", "bounds"), [(1, (0, 0)), (5, (0, 4)), (8, (0, 7)), (20, (5, 14))]
)
def test_the_median_lies_in_an_interval_of_order(count: int, bounds: tuple[int, int]) -> None:
    """As tables of the sign test have it for 95 %."""
    shuffled = [float(n * 7 % count) for n in range(count)]
    assert interval(shuffled) == tuple(map(float, bounds))


def test_rounds_end_when_every_ratio_is_known() -> None:
    """One pair of arms that nobody knows yet keeps all going; few rounds are never enough."""
    calm = [1.0, 1.01, 0.99] * 10
    noisy = [1.0, 1.3, 0.7] * 10
    assert width(calm) < PRECISION < width(noisy)
    assert settled([calm, [2.0] * 30])
    assert not settled([calm, [2.0] * 30, noisy])
    assert not settled([calm[: FEWEST - 1], [2.0] * (FEWEST - 1)])
    assert not settled([calm]), "a single arm has no ratio"


@pytest.mark.parametrize(("said", "calls"), [(10.0, CALLS), (0.1, 5), (1e-6, MOST_CALLS)])
def test_a_profile_names_where_the_time_goes(said: float, calls: int) -> None:
    """Of calls enough that the scheduler does not decide; numbers are those of one call."""
    resets = []

    def call() -> None:
        time.sleep(0.01)

    found = profile(call, lambda: resets.append(1), said)
    seconds, entries, where = found[0]
    assert where == "time.sleep"
    assert entries == 1
    assert 0.01 <= seconds < 0.1
    assert len(resets) == calls
