"""Jobs with what people add to models and optimizers: extra states, inner optimizers, stages."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import (
    PowerSGDState,
    powerSGD_hook,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from prove.kit import jobs
from prove.kit.jobs import Job, net, started


class Counter(nn.Module):
    """With an extra state: a number and a tensor."""

    def __init__(self, seen: int) -> None:
        super().__init__()
        self.seen = seen

    def get_extra_state(self) -> Any:
        return {"seen": self.seen, "mean": torch.tensor([float(self.seen)])}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


class Forgetful(Counter):
    """Takes a new state, but for the one that it had."""

    def set_extra_state(self, state: Any) -> None:
        self.seen = 0 if state["seen"] == 7 else state["seen"]


class Nested(torch.optim.Optimizer):
    """State in nested dicts, beside counters that are no tensors."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 2**-6})

    def step(self, closure: Any = None) -> Any:
        for param in (p for group in self.param_groups for p in group["params"]):
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                state["moments"] = {"first": torch.zeros_like(param)}
                state["told"] = {"count": 0}
            state["moments"]["first"].add_(param.grad)
            state["told"]["count"] += 1
            with torch.no_grad():
                param.sub_(self.param_groups[0]["lr"] * state["moments"]["first"])


class Around(torch.optim.Optimizer):
    """An optimizer that steps another one, whose state it does not tell of."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.inner = torch.optim.AdamW(self.param_groups, foreach=False)
        self.averages = [torch.zeros(3)]

    def step(self, closure: Any = None) -> Any:
        self.inner.step()
        self.averages[0].add_(1)


class Holder:
    """A plain object with a tensor."""

    __slots__ = ("average",)

    def __init__(self) -> None:
        self.average = torch.ones(3)


def counter_of_its_own(rank: int) -> Job:
    model = net()
    model.counter = Counter(5 + rank)
    return started(DistributedDataParallel(model))


def counter_forgotten(_: int) -> Job:
    model = net()
    model.counter = Forgetful(7)
    return started(DistributedDataParallel(model))


def frozen_on_one_rank(rank: int) -> Job:
    job = jobs.sharded()
    if rank == 1:
        job.model.up.bias.requires_grad_(False)
    return job


def layer_on_one_rank(rank: int, *, wrap: bool = True) -> Job:
    model = net(norm=False)
    wrapped = DistributedDataParallel(model) if wrap else model
    if rank == 1:
        model.added = nn.Linear(2, 2)
    return Job(wrapped, None, lambda: None)


def nested_moment(rank: int) -> Job:
    model = net()
    job = started(DistributedDataParallel(model), Nested(model.up.parameters()))
    if rank == 1:
        job.optimizer.state[model.up.weight]["moments"]["first"][3, 2] = 5
    return job


def nested_count(_: int) -> Job:
    """A load after which a counter in a nested dict begins again."""
    model = net()
    job = started(DistributedDataParallel(model), Nested(model.up.parameters()))

    def forget(optimizer: torch.optim.Optimizer) -> None:
        for values in optimizer.state.values():
            values["told"]["count"] = 0

    job.optimizer.register_load_state_dict_post_hook(forget)
    return job


def layers_in_a_list(_: int) -> Job:
    """Nobody registers what lies in a list; the optimizer was given it by hand."""
    model: Any = net(norm=False)
    model.experts = [nn.Linear(8, 8)]
    params = [*model.up.parameters(), *model.experts[0].parameters()]
    return Job(model, torch.optim.SGD(params), lambda: None)


def average_in_an_object(_: int) -> Job:
    job = jobs.sharded()
    job.model.holder = Holder()
    return job


def scaler(_: int) -> Job:
    job = jobs.sharded()
    job.model.scaler = torch.amp.GradScaler("cpu")
    return job


def inner_optimizer(_: int) -> Job:
    model = net()
    return started(DistributedDataParallel(model), Around(model.up.parameters()))


def rate_in_a_later_stage(rank: int) -> Job:
    """Ranks 2 and 3 have the second stage of a pipeline."""
    model = nn.ModuleDict({str(rank // 2): nn.Linear(8, 8)})
    return Job(model, torch.optim.SGD(model.parameters(), lr=2**-5 + rank // 3), lambda: None)


def _sharded_rows(local: torch.Tensor) -> nn.Parameter:
    mesh = init_device_mesh("cpu", (2,))
    made = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    return nn.Parameter(made, requires_grad=False)


def _of(**params: nn.Parameter) -> Job:
    model = nn.Module()
    for name, param in params.items():
        setattr(model, name, param)
    return Job(model, None, lambda: None)


def integers(rank: int) -> Job:
    return _of(table=_sharded_rows(torch.arange(4, dtype=torch.int16) + 4 * rank))


def other_order(rank: int) -> Job:
    params = {"one": _sharded_rows(torch.ones(2)), "two": _sharded_rows(torch.zeros(2))}
    return _of(**{name: params[name] for name in sorted(params, reverse=rank == 1)})


def other_dtype(rank: int) -> Job:
    dtype = [torch.float16, torch.bfloat16][rank]
    return _of(weight=_sharded_rows(torch.ones(2, dtype=dtype)))


def localized(_: int) -> Job:
    """Tensor parallelism under DDP, before the first forward."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = DistributedDataParallel(jobs.tp_net(mesh["tp"]), device_mesh=mesh["dp"])
    return started(model, steps=0)


def hybrid_tp(_: int) -> Job:
    """FSDP1 with replicas, over tensor parallelism."""
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("rep", "dp", "tp"))
    model = jobs.tp_net(mesh["tp"])
    model.frozen.requires_grad_(True)
    wrapped = FullyShardedDataParallel(
        model,
        device_mesh=mesh["rep", "dp"],
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        device_id=jobs.CPU,
        use_orig_params=True,
    )
    return started(wrapped, torch.optim.AdamW(wrapped.parameters(), lr=2**-6, foreach=False))


def one_with_nested_state() -> Job:
    """Right: nested state, an extra state that all ranks share, moments that are factored."""
    model = net()
    model.counter = Counter(7)
    others = Nested(model.up.parameters())
    factored = torch.optim.Adafactor(model.down.parameters())
    wrapped = DistributedDataParallel(model)
    started(wrapped, others)
    started(wrapped, factored)
    return Job(wrapped, [others, factored], lambda: None)


def odd_tensors() -> Job:
    """Right: a conjugate view, a quantized buffer, one without elements, one in shared memory."""
    model = net()
    complex_ones = torch.arange(4.0).to(torch.complex64) * (1 + 2j)
    model.register_buffer("conjugate", complex_ones.conj())
    model.register_buffer(
        "levels", torch.quantize_per_tensor(torch.arange(6.0), 0.5, 1, torch.quint8)
    )
    model.register_buffer("nothing", torch.empty(0, 3))
    model.register_buffer("row", model.frozen.weight.detach()[0])
    return Job(model, None, lambda: None)


class Restless(nn.Module):
    """A load changes its plain attributes, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.count = 5
        self.history: list[Any] = [1, {"a": 2}]
        self.holder = Holder()
        self.generator = torch.Generator().manual_seed(3)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.count = 0
        self.history.append(3)
        self.history[1]["a"] = 4
        self.holder.average = torch.zeros(3)
        self.fresh = numpy.random.rand() + float(torch.rand(1, generator=self.generator))


def restless(_: int) -> Job:
    model = Restless()
    optimizer = Nested(model.parameters())  # whose load adds to its defaults
    model.weight.grad = torch.ones(3)
    optimizer.step()
    optimizer.zero_grad()
    return Job(model, optimizer, lambda: None)


def stages(rank: int) -> Job:
    """Right: two stages of a pipeline on each rank, each with its optimizer."""
    models = [nn.Sequential() for _ in range(2)]
    for number, model in enumerate(models):
        model.add_module(f"layer{rank + 2 * number}", nn.Linear(8, 8))
    optimizers = [torch.optim.AdamW(model.parameters(), foreach=False) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return Job(models, optimizers, lambda: None)


def compressed() -> tuple[Job, PowerSGDState]:
    """DDP with gradients that PowerSGD compresses, which keeps its errors for the next step."""
    model = DistributedDataParallel(nn.Linear(8, 64))
    state = PowerSGDState(None, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook)
    return started(model, steps=4), state


class Schedule:
    """Of a user's own, without an __eq__."""

    def __init__(self) -> None:
        self.rates = [0.5, 0.25]


def with_values_in_groups() -> Job:
    """Parameter groups with an array, a NaN and an object, which compare with nothing."""
    job = jobs.sharded()
    job.optimizer.param_groups[0].update(
        scale=numpy.array([1.0, 2.0]),
        curve=nn.functional.relu,
        best=float("nan"),
        plan={"schedule": Schedule(), "steps": [numpy.float32(2), numpy.ones(2)]},
    )
    return job


def table_of_its_own(rank: int) -> Job:
    """A table in a parameter group, longer than its repr() is."""
    table = numpy.zeros(5000)
    table[2500] = rank
    job = jobs.sharded()
    job.optimizer.param_groups[0]["table"] = table
    return job
