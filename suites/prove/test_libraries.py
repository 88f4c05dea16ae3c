"""Jobs of libraries that are right are whole: torchtitan, transformers, accelerate, peft.

They run where the libraries are, in the environment of `ci/ecosystem`:
`.venvs/ecosystem/bin/python -m harness --subject torch.distributed suites/prove/test_libraries.py`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import shardproof
from prove.kit.jobs import Job
from prove.kit.watch import State

LIMIT = 100.0


def whole(job: Job, **options: Any) -> Any:
    """Prove it: whole on all roads, and left as it was."""
    before = State(job)
    proof = shardproof.prove(job.model, job.optimizer, limit=LIMIT, progress=False, **options)
    assert not before.differences()
    assert proof.whole, str(proof)
    return proof


@pytest.mark.needs("package torchtitan")
@pytest.mark.world(4, collective=100, limit=200)
@pytest.mark.parametrize("mesh_of", ["fsdp2 x tp2", "hsdp", "ddp4"])
def test_torchtitan(monkeypatch: pytest.MonkeyPatch, mesh_of: str) -> None:
    """Its smallest Llama is whole under its own parallelism, and costs one bucket of memory."""
    from torchtitan.distributed import parallel_dims

    from ecosystem.test_torchtitan import titan

    monkeypatch.setattr(parallel_dims, "device_type", "cpu")
    made = titan(mesh_of)
    made.step(0)
    (optimizer,) = made.optimizers
    job = Job(made.model, optimizer, lambda: None)
    proof = whole(job, scheduler=made.schedulers)
    assert proof.cost["own_peak_bytes"] < 64 << 20
    assert any(finding.kind == "scheduler" for finding in proof.findings)


@pytest.mark.needs("package transformers")
@pytest.mark.world(4, collective=100, limit=200)
def test_transformers(monkeypatch: pytest.MonkeyPatch, shared: Path, rank: int) -> None:
    """A tied Llama under its own TP plan and FSDP2 is whole, but for a save that torch refuses.

    async_save() raises "Attempted to call copy_() on an invalid python storage" on ranks 1 to 3
    without prove, too.
    """
    import tqdm

    from ecosystem.test_transformers import Trainee, random_weights

    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)  # else a bar leaves a thread behind

    made = Trainee(random_weights(shared, rank), "fsdp2 x tp2")
    made.step(0)
    job = Job(made.model, made.optimizer, lambda: None)
    before = State(job)
    proof = shardproof.prove(job.model, job.optimizer, limit=LIMIT, progress=False)
    assert not before.differences()
    assert {(f.where, f.side, f.severity) for f in proof.losses} == {
        ("dcp-async", "model", "unsafe")
    }, str(proof)


@pytest.mark.needs("package accelerate", "package transformers")
@pytest.mark.world(4, collective=100, limit=200)
def test_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate has prepared is whole, its optimizer taken as it gives it."""
    from ecosystem.test_accelerate import Trainee, on_the_cpu

    for _ in on_the_cpu._get_wrapped_function()(monkeypatch):
        made = Trainee("fsdp4", "SHARDED_STATE_DICT")
        made.step(0)
        before = State(Job(made.model, made.optimizer.optimizer, lambda: None))
        proof = shardproof.prove(made.model, made.optimizer, limit=LIMIT, progress=False)
        assert not before.differences()
        assert proof.whole, str(proof)


@pytest.mark.needs("package peft")
@pytest.mark.world(4, collective=100, limit=200)
def test_peft(mesh: Any) -> None:
    """LoRA over a frozen base is whole under fully_shard x TP."""
    from ecosystem.test_peft import Trainee

    made = Trainee(mesh(2, 2))
    made.step(0)
    whole(Job(made.model, made.optimizer, lambda: None))
