"""A job that is right is whole, on every road that torch has right, and stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardproof
from prove.kit import jobs, unusual
from prove.kit.watch import State

LIMIT = 45.0


def _named(some: dict[str, Callable[[], Any]]) -> list[Any]:
    return [pytest.param(make, id=name) for name, make in some.items()]


def prove(job: jobs.Job, **options: Any) -> Any:
    """Prove it, and see that nothing of it has changed."""
    before = State(job)
    proof = shardproof.prove(
        job.model, job.optimizer, step=job.step, limit=LIMIT, progress=False, **options
    )
    assert not before.differences()
    return proof


@pytest.mark.world(2, collective=60, limit=120)
@pytest.mark.parametrize("make", _named(jobs.TWO))
@pytest.mark.thorough(but=["DDP, tied weights", "many dtypes", "TP"])
def test_two_ranks(make: Any) -> None:
    """A right job is whole on all roads under torch as it is, and is left as it was."""
    proof = prove(make())
    assert proof.whole, str(proof)
    proof.require()
    proof.require("dcp", "full")


@pytest.mark.world(4, collective=60, limit=120)
@pytest.mark.parametrize("make", _named(jobs.FOUR))
@pytest.mark.thorough
def test_four_ranks(make: Any) -> None:
    """A right job is whole on all roads under torch as it is, and is left as it was."""
    proof = prove(make())
    assert proof.whole, str(proof)


@pytest.mark.world(1)
def test_one_rank() -> None:
    """A model in one process is whole."""
    assert prove(jobs.plain()).whole


@pytest.mark.world(2, collective=60, limit=120)
@pytest.mark.parametrize("make", _named(jobs.FLAT))
@pytest.mark.thorough
def test_fsdp1(make: Any) -> None:
    """FSDP1's own roads are whole, and what torch breaks on a CPU is said to be unsafe or lossy."""
    proof = prove(make())
    for road in ("sharded", "dcp", "dcp-mesh", "full"):
        assert (proof.verdict(road), proof.verdict(road, "optimizer")) == ("whole", "whole"), road
    assert {finding.where for finding in proof.losses} <= {"flat", "dcp-async", "broadcast", "file"}


@pytest.mark.world(4, collective=60, limit=120)
@pytest.mark.thorough
def test_fsdp1_with_replicas() -> None:
    """So are those of FSDP1 with replicas."""
    proof = prove(jobs.hsdp1(), roads=["sharded", "dcp", "dcp-mesh", "full"])
    assert proof.whole, str(proof)


@pytest.mark.world(2, collective=60, limit=120)
def test_pipeline() -> None:
    """Stages of a pipeline are whole where the optimizer is saved flat; the rest is named."""
    proof = prove(jobs.pipeline())
    proof.require("flat", "sharded")
    assert proof.verdict("dcp") == "whole"
    assert proof.verdict("dcp", "optimizer") == "lossy"
    assert proof.verdict("broadcast") == "not run"
    with pytest.raises(shardproof.NotWholeError, match="not run"):
        proof.require("broadcast")


@pytest.mark.world(2, collective=60, limit=120)
@pytest.mark.thorough
def test_unusual_optimizers() -> None:
    """Nested and factored state, two optimizers and an extra state are whole on every road."""
    proof = prove(unusual.one_with_nested_state())
    assert proof.whole, str(proof)


@pytest.mark.world(2, collective=60, limit=120)
@pytest.mark.thorough
def test_values_that_do_not_compare() -> None:
    """What a parameter group holds may be an array, a NaN or an object: unchanged is no loss."""
    proof = prove(unusual.with_values_in_groups(), roads=["sharded", "flat"])
    assert proof.whole, str(proof)


@pytest.mark.world(2, collective=60, limit=120)
def test_unusual_tensors() -> None:
    """Conjugate, quantized, empty and overlapping buffers are whole where torch can load them."""
    roads = ["sharded", "sharded-cpu", "full"]
    proof = prove(unusual.odd_tensors(), roads=roads)
    assert proof.whole, str(proof)


@pytest.mark.world(2, collective=60, limit=120)
def test_stages_of_a_pipeline(rank: int) -> None:
    """A list of stages is whole, and what torch cannot save is refused on every rank alike."""
    job = unusual.stages(rank)
    before = State(job)
    roads = ["sharded", "sharded-cpu", "flat", "full"]
    proof = shardproof.prove(job.model, job.optimizer, roads=roads, limit=LIMIT, progress=False)
    assert proof.whole, str(proof)
    assert not before.differences()
    params = [param for model in job.model for param in model.parameters()]
    for model, optimizer, says in (
        (job.model, torch.optim.SGD(params), "optimizer 0 has parameters of models"),
        ([job.model[0], job.model[0]], None, "models 0 and 1 both have"),
        ([job.model[0], 3], None, "item 1 is int"),
        ([], None, "got an empty list"),
    ):
        with pytest.raises(shardproof.WrongUseError, match=says):
            shardproof.prove(model, optimizer, limit=LIMIT, progress=False)


@pytest.mark.world(2, collective=60, limit=120)
def test_an_optimizer_without_state_is_no_alarm() -> None:
    """Before the first step the optimizer is empty, and prove gives it no state."""
    job = jobs.started(torch.nn.parallel.DistributedDataParallel(jobs.net()), steps=0)
    proof = prove(job)
    assert proof.verdict("dcp", "optimizer") == "empty"
    assert not job.optimizer.state


@pytest.mark.exercises("prove")
@pytest.mark.world(4, collective=60, limit=120)
@pytest.mark.parametrize("make", _named({"fully_shard x TP": jobs.sharded_tp}))
@pytest.mark.thorough
def test_under_the_subject(make: Any) -> None:
    """What is whole without the subject is whole with it."""
    proof = prove(make())
    assert proof.whole, str(proof)


@pytest.mark.exercises("prove")
@pytest.mark.world(2, collective=60, limit=120)
@pytest.mark.thorough
def test_a_mesh_out_of_order(subject: Any) -> None:
    """What is lost on a mesh of ranks [1, 0] is torch's, and named; the rest is whole."""
    proof = prove(jobs.sharded_on([1, 0]))
    torchs = set() if subject.root == "shardproof" else {"SP-031"}
    assert {finding.defect for finding in proof.losses} == {"SP-094", *torchs}, str(proof)
    assert proof.verdict("full") == "whole", str(proof)


@pytest.mark.exercises("prove")
@pytest.mark.world(4, collective=60, limit=120)
def test_tensor_parallelism_under_ddp(subject: Any) -> None:
    """With the reference the model's roads are whole, and the optimizer's loss is named.

    The module holds plain local tensors, which differ between ranks: they are shards, no drift.
    """
    proof = prove(jobs.ddp_tp(), roads=["dcp", "full"])
    if subject.root != "shardproof":
        assert {"SP-001"} <= {finding.defect for finding in proof.losses}
        assert proof.verdict("dcp") == "lossy"
        return
    assert proof.verdict("dcp") == proof.verdict("full") == "whole", str(proof)
    assert proof.verdict("dcp", "optimizer") == "lossy"
    assert {finding.defect for finding in proof.losses} == {"SP-069"}
