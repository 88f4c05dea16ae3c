"""A small suite on the record of a rank's collectives; run by test_collective_faults.py."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # what DDP would import, in its first world
import torch.distributed as dist
from torch._C import _distributed_c10d
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import _functional_collectives as functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from harness.rank import rank_process as rank_side
from harness.rank import recording
from harness.records import call_ring
from harness.records.call_ring import Calls

pytestmark = pytest.mark.world(3)
FOREVER = 10_000


def gather() -> None:
    tensor = torch.ones(4, 3)
    dist.all_gather([torch.empty_like(tensor) for _ in range(3)], tensor)


def functional_reduce() -> None:
    assert dist.group.WORLD is not None
    functional.all_reduce(torch.ones(3), "sum", dist.group.WORLD).sum()


class TestRoads:
    """Ranks that are missed on other roads than torch.distributed's functions."""

    def test_sleeps_before_a_functional_collective(self, rank: int) -> None:
        dist.barrier()
        if rank == 1:
            time.sleep(FOREVER)
        functional_reduce()

    def test_sleeps_before_backward_of_ddp(self, rank: int) -> None:
        model = DistributedDataParallel(torch.nn.Linear(3, 3))
        loss = model(torch.ones(2, 3)).sum()
        if rank == 1:
            time.sleep(FOREVER)
        loss.backward()

    def test_calls_the_backend_itself(self, rank: int) -> None:
        assert dist.group.WORLD is not None
        backend: Any = dist.group.WORLD._get_backend(torch.device("cpu"))
        backend.allreduce([torch.ones(3)], dist.AllreduceOptions()).wait()
        if rank == 1:
            time.sleep(FOREVER)
        dist.barrier()


class Seen(TorchDispatchMode):
    """Names of collectives, as what counts them sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in {"c10d", "_c10d_functional"}:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


# What Gloo makes of some: https://github.com/pytorch/pytorch ProcessGroupGloo.cpp
AS_GLOO = {
    "reduce_scatter": ["all_reduce"] * 3,
    "all_reduce_coalesced": ["all_reduce"],
    "all_to_all_single": ["all_to_all"],
    "monitored_barrier": [],
}


def every_road(rank: int) -> None:
    """Collectives by each road on which code issues them."""
    world = dist.group.WORLD
    assert world is not None
    tensor = torch.ones(4, 3)
    dist.all_reduce(tensor)
    world.allreduce([tensor], dist.AllreduceOptions()).wait()
    functional.all_reduce(tensor, "sum", world).sum()
    dist.all_gather_object([None] * 3, rank)
    dist.broadcast_object_list([rank], src=2)
    dist.reduce(tensor, dst=1)
    dist.reduce_scatter(torch.ones(2), [torch.ones(2)] * 3)
    dist.scatter(torch.ones(2), [torch.ones(2)] * 3 if rank == 0 else None)
    dist.gather(torch.ones(2), [torch.empty(2) for _ in range(3)] if rank == 0 else None)
    dist.all_to_all_single(torch.empty(3), torch.ones(3))
    with dist._coalescing_manager():  # type: ignore[attr-defined]
        dist.all_reduce(torch.ones(2))
        dist.all_reduce(torch.ones(3))
    model = DistributedDataParallel(torch.nn.Linear(3, 3))
    model(tensor).sum().backward()
    dist.barrier()
    if rank == 0:
        dist.send(tensor, dst=2)
    if rank == 2:
        dist.recv(tensor, src=0)
    dist.monitored_barrier(timeout=datetime.timedelta(seconds=20))


def recorded() -> Calls:
    """The calls of this rank, as its parent would read them."""
    assert rank_side.current is not None
    with Path(rank_side.current.rank_spec.calls).open("rb") as file:
        found = Calls.from_json(call_ring.read(file.fileno()))
    assert found is not None
    return found


@pytest.mark.world(3, collective=60, limit=120)
class TestRecord:
    """What a rank's record holds."""

    def test_every_road_is_seen(self, rank: int) -> None:
        every_road(rank)
        calls = recorded()
        assert not calls.missing
        assert {c.state for c in calls.calls} == {"issued"}
        # What Gloo carries out in C++, as torch's own recorder sees it there.
        dump = _distributed_c10d._dump_fr_trace_json  # type: ignore[attr-defined]
        torchs = json.loads(dump(True, False))["entries"]
        ours: list[str] = []
        for call in calls.calls:
            ours += AS_GLOO.get(call.op, [call.op] if call.stream.way is None else [])
        assert ours == [entry["profiling_name"].removeprefix("gloo:") for entry in torchs]
        ways = [str(c) for c in calls.calls if c.stream.way is not None]
        of = "of group (0, 1, 2), float32 (4, 3)"
        assert ways == {0: [f"send to rank 2 #1 {of}"], 2: [f"recv from rank 0 #1 {of}"]}.get(
            rank, []
        )

    def test_what_counts_collectives_counts_the_same(self) -> None:
        with Seen() as seen:
            gather()
            functional_reduce()
        assert seen.names[:2] == ["c10d::allgather_", "_c10d_functional::all_reduce"]
        assert not any("c10d::all" in name for name in seen.names[2:])
        assert [c.op for c in recorded().calls] == ["all_gather", "all_reduce"]

    def test_a_refused_call_counts_for_nothing(self) -> None:
        with pytest.raises(RuntimeError, match="invalid tensor size at index 0"):
            dist.all_gather([torch.ones(3)] * 3, torch.ones(4))
        gather()
        assert [(c.number, c.state) for c in recorded().calls] == [(1, "refused"), (1, "issued")]

    def test_nothing_is_sent_under_fake_tensors(self) -> None:
        with FakeTensorMode():
            functional_reduce()
        assert recorded().calls == []

    def test_compiling_does_not_look_at_it(self) -> None:
        model = DistributedDataParallel(torch.nn.Linear(3, 3))
        torch.compile(model, backend="eager")(torch.ones(2, 3)).sum().backward()
        assert recorded().calls[-1].op == "all_reduce"

    def test_tensors_are_not_kept(self) -> None:
        tensor = torch.ones(3)
        gone = threading.Event()
        weakref.finalize(tensor, gone.set)
        dist.all_reduce(tensor)
        del tensor
        # A thread of the backend may let go of it a little later.
        assert gone.wait(3), "the tensor is still held"

    def test_forks_of_a_rank_note_nothing(self) -> None:
        if (pid := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                assert recording._ring is None
                os._exit(0)
            os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0

    def test_more_calls_than_it_holds(self) -> None:
        for count in range(300):
            dist.all_reduce(torch.ones(count))
        calls = recorded()
        assert [c.number for c in calls.calls] == list(range(173, 301))
        assert list(calls.counts.values()) == [300]

    def test_more_groups_than_it_holds(self) -> None:
        for tag in range(1025):
            work = dist.isend(torch.ones(1), (dist.get_rank() + 1) % 3, tag=tag)
            dist.recv(torch.ones(1), (dist.get_rank() - 1) % 3, tag=tag)
            assert work is not None
            work.wait()
        assert recorded().missing == "it used more groups than the record has room for"
