"""A rank that raises, hangs or is interrupted is named by the others; all have their state back."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

import shardproof
from prove.kit import jobs, unusual
from prove.kit.watch import State


def _hooked(job: jobs.Job, hook: Any) -> jobs.Job:
    job.model.register_state_dict_post_hook(lambda *_: hook())
    return job


@pytest.mark.world(2, collective=30, limit=60)
@pytest.mark.thorough
def test_a_rank_that_raises(rank: int) -> None:
    """An error of one rank is named with the rank, other roads go on, and nothing has changed."""

    def fail() -> None:
        raise MemoryError("no room on this rank")

    job = _hooked(jobs.sharded(), fail) if rank == 1 else jobs.sharded()
    before = State(job)
    proof = shardproof.prove(job.model, job.optimizer, roads="dcp", limit=9, progress=False)
    assert not before.differences()
    assert proof.verdict("dcp") == "unsafe"
    assert proof.verdict("dcp", "optimizer") == "whole"
    named = [f for f in proof.losses if "MemoryError" in f.what]
    assert named
    assert named[0].ranks == [1]
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    assert total == 2  # the job's own connections are unhurt


@pytest.mark.world(2, collective=30, limit=60)
@pytest.mark.thorough
def test_a_rank_that_waits_for_another(rank: int) -> None:
    """A collective that only one rank enters is unsafe, and the job's own groups still work."""

    def wait() -> None:
        torch.distributed.all_reduce(torch.ones(1))

    job = _hooked(jobs.sharded(), wait) if rank == 0 else jobs.sharded()
    before = State(job)
    proof = shardproof.prove(job.model, job.optimizer, roads="sharded", limit=9, progress=False)
    assert not before.differences()
    assert proof.verdict("sharded") == "unsafe"
    assert any("hangs" in finding.what and finding.ranks == [0] for finding in proof.losses)
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    assert total == 2


@pytest.mark.world(2, collective=30, limit=60)
def test_an_interrupt(rank: int) -> None:
    """An interrupt passes through its rank; the other names it; both have their state back."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    job = _hooked(jobs.sharded(), interrupt) if rank == 1 else jobs.sharded()
    before = State(job)
    expected = KeyboardInterrupt if rank == 1 else shardproof.RankLostError
    with pytest.raises(expected, match="" if rank == 1 else "rank 1 left prove.*KeyboardInterrupt"):
        shardproof.prove(job.model, job.optimizer, roads="sharded", limit=20, progress=False)
    assert not before.differences()


@pytest.mark.world(2, collective=30, limit=60)
def test_a_rank_that_hangs(rank: int, world: Any) -> None:
    """A rank that does something else is named within the limit."""
    job = jobs.sharded()
    before = State(job)
    if rank == 1:
        deadline = time.monotonic() + 50
        while world.read("named", 0) is None and time.monotonic() < deadline:
            threading.Event().wait(0.05)
        return
    begun = time.monotonic()
    with pytest.raises(shardproof.RankLostError, match="rank 1 did not answer within"):
        shardproof.prove(job.model, job.optimizer, limit=3, progress=False)
    took = time.monotonic() - begun
    world.post("named", "yes")
    assert took < 10
    assert not before.differences()


@pytest.mark.world(2, collective=30, limit=60)
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"roads": "cdp"}, "roads='cdp': prove knows the roads"),
        ({"roads": []}, "roads is empty"),
        ({"model": torch.nn.Sequential(torch.nn.LazyLinear(3))}, "0.weight is not initialized"),
        (
            {"model": []},
            "prove takes a torch.nn.Module as model, or a list of them: got an empty list",
        ),
    ],
)
def test_wrong_use_on_one_rank(rank: int, arguments: Any, says: str) -> None:
    """What is wrong on one rank raises the same on every rank, before anything is touched."""
    job = jobs.sharded()
    before = State(job)
    given = {"model": job.model, **(arguments if rank else {})}
    with pytest.raises(shardproof.WrongUseError, match=f"rank 1: {says}"):
        shardproof.prove(optimizer=job.optimizer, limit=20, progress=False, **given)
    assert not before.differences()


@pytest.mark.world(2, collective=30, limit=60)
def test_ranks_that_ask_for_other_roads(rank: int) -> None:
    """Ranks that ask for different roads are told so, all of them."""
    job = jobs.sharded()
    with pytest.raises(shardproof.WrongUseError, match="different roads"):
        shardproof.prove(
            job.model, job.optimizer, roads=["dcp", "full"][rank], limit=20, progress=False
        )


@pytest.mark.world(2, collective=30, limit=60)
def test_no_room(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one rank has no room, all refuse with the same words, before anything is touched."""
    from shardproof._prove import room

    if rank == 1:
        monkeypatch.setattr(room, "available_memory", lambda: 100)
    job = jobs.sharded()
    before = State(job)
    with pytest.raises(shardproof.NoRoomError, match="does not fit into CPU memory"):
        shardproof.prove(job.model, job.optimizer, snapshot="cpu", limit=20, progress=False)
    assert not before.differences()


@pytest.mark.world(2, collective=30, limit=60)
def test_snapshot_on_disk(rank: int) -> None:
    """A snapshot in a file brings everything back, and the file is gone afterwards."""
    job = jobs.ddp()
    before = State(job)
    proof = shardproof.prove(
        job.model,
        job.optimizer,
        roads=["sharded", "dcp"],
        snapshot="disk",
        limit=20,
        progress=False,
    )
    assert proof.whole
    assert not before.differences()


@pytest.mark.world(2, collective=30, limit=60)
@pytest.mark.thorough
def test_no_room_for_a_road(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A road that does not fit beside the snapshot is not run; asked for, it is refused."""
    from shardproof._prove import room

    job = jobs.sharded()
    shards = sum(p.to_local().nbytes for p in job.model.parameters())  # thrice, with the moments
    if rank == 1:  # room for the snapshots and two shards, not for two whole states
        monkeypatch.setattr(room, "available_memory", lambda: 14 * shards)
    proof = shardproof.prove(job.model, job.optimizer, snapshot="cpu", limit=20, progress=False)
    verdicts = [proof.verdict(road, "optimizer") for road in ("dcp", "full")]
    assert verdicts == ["whole", "not run"], str(proof)
    before = State(job)
    with pytest.raises(shardproof.NoRoomError, match="the road full has no room"):
        shardproof.prove(job.model, job.optimizer, roads="full", limit=20, progress=False)
    assert not before.differences()


@pytest.mark.world(2, collective=30, limit=60)
def test_attributes_and_generators_stay(rank: int) -> None:
    """What a load changes beside tensors is put back: attributes, containers, defaults, draws."""
    job = unusual.restless(rank)
    before = State(job)
    drawn = job.model.generator.get_state()
    proof = shardproof.prove(job.model, job.optimizer, roads="sharded", limit=20, progress=False)
    assert [finding.name for finding in proof.losses] == ["holder.average"]
    assert not before.differences()
    assert torch.equal(job.model.generator.get_state(), drawn)
    assert job.model.holder.average.tolist() == [1, 1, 1]


@pytest.mark.world(2, collective=30, limit=60)
def test_the_state_of_a_communication_hook(rank: int) -> None:
    """It is in no state dict, and stays when prove trains a step."""
    job, state = unusual.compressed()
    count, errors = state.iter, state.error_dict[0].clone()
    proof = shardproof.prove(
        job.model, job.optimizer, step=job.step, roads="sharded", limit=20, progress=False
    )
    assert proof.whole, str(proof)
    assert "PowerSGDState.error_dict[0]" in [finding.name for finding in proof.findings]
    assert state.iter == count
    assert torch.equal(state.error_dict[0], errors)


@pytest.mark.world(2, collective=30, limit=60)
def test_a_default_device(rank: int) -> None:
    """Another default device takes nothing of prove's."""
    job = jobs.sharded()
    with torch.device("meta"):
        proof = shardproof.prove(
            job.model, job.optimizer, roads="sharded", limit=20, progress=False
        )
    assert proof.whole, str(proof)


@pytest.mark.world(2, collective=30, limit=60)
def test_gradients_stay(rank: int) -> None:
    """Gradients that are accumulated are no loss, and stay, the same objects with the same bits."""
    job = jobs.sharded()
    job.model(torch.ones(2, 8)).sum().backward()
    before = State(job)
    proof = shardproof.prove(
        job.model, job.optimizer, step=job.step, roads="sharded", limit=20, progress=False
    )
    assert proof.whole
    assert not before.differences()
    assert job.model.up.weight.grad is not None
