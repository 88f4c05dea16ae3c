"""What Gloo takes for a moment when a scatter starts on a device is within the bucket.

On the CPU it takes that room as well. Nothing is ever written there, so that it is free, and the
reference leaves it out; but the allocator's record has it. Told that it is not free, the reference
has to stay within the bucket by that record, as it has to on a device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.results.cost_model import BUCKET, broadcast
from benchmarks.run.counting import Traffic
from benchmarks.run.peaks import Settled, peak_bytes
from benchmarks.settings import Leaf
from conformance.kit.layouts import S, dtensor
from shardproof._core.comms import collectives
from shardproof._state_dict_utils import _broadcast_state_dict

CPU = torch.device("cpu")

MODELS = {
    "one large": [Leaf("weight", (24 << 20,))],
    "many that share buckets": [Leaf(f"layer{n}.weight", (64, 6144)) for n in range(64)],
}


@pytest.mark.world(4)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_counted_in(world: Any, rank: int, name: str, monkeypatch: Any) -> None:
    """At most a bucket of memory, in no more collectives than the cost model says; all arrives."""
    monkeypatch.setattr(collectives, "_LAZY", set())
    leaves = MODELS[name]
    mesh = DeviceMesh("cpu", torch.arange(4))
    wholes = {
        leaf.name: torch.arange(float(leaf.nbytes // 4)).reshape(leaf.shape) for leaf in leaves
    }
    local = {key: dtensor(torch.zeros_like(whole), mesh, [S(0)]) for key, whole in wholes.items()}
    full = wholes if rank == 0 else {}

    def call() -> None:
        with Settled():
            _broadcast_state_dict(dict(full), dict(local), CPU)

    with Traffic() as seen:
        call()
    for key, target in local.items():
        assert torch.equal(target._local_tensor, wholes[key].chunk(4)[rank]), key
    assert seen.names.total() <= broadcast(leaves, 4, backend="gloo", device="cuda").collectives
    assert peak_bytes(call, CPU) <= BUCKET
