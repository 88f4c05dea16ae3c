"""Losses that are planted into right jobs, and how a proof has to name each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from prove.kit import jobs
from prove.kit.jobs import Job, local, net, started

Plant = Callable[[int], Job]
"""Makes the faulty job of this rank."""


@dataclass(frozen=True)
class Loss:
    """One planted loss."""

    what: str
    plant: Plant
    names: str
    """The tensor that a finding has to name."""
    ranks: tuple[int, ...] | None
    """The ranks that it has to name; None: any."""
    roads: tuple[str, ...]
    where: tuple[str, ...]
    """Where it has to be found: roads, inventory or coverage."""
    severity: str = "loss"
    first: str = ""
    """The first differing element."""
    defect: str = ""
    world: int = 2


def _flip_last_bit(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        flat = local(tensor).view(torch.int32).view(-1)
        flat[-1] ^= 1


def _on(rank: int, wrong: int, make: Callable[[], Job], change: Callable[[Job], Any]) -> Job:
    job = make()
    if rank == wrong:
        change(job)
    return job


def _module(job: Job, name: str) -> Any:
    model = job.model.module if isinstance(job.model, DistributedDataParallel) else job.model
    return model.get_submodule(name)


def _state(job: Job, name: str, entry: str) -> torch.Tensor:
    module, _, leaf = name.rpartition(".")
    param = getattr(_module(job, module), leaf)
    found: torch.Tensor = job.optimizer.state[param][entry]
    return found


def replica_bit(rank: int) -> Job:
    return _on(rank, 1, jobs.ddp, lambda job: _flip_last_bit(_module(job, "up").weight))


def dtensor_replica_bit(rank: int) -> Job:
    return _on(rank, 1, jobs.experts, lambda job: _flip_last_bit(job.model.router))


def moment_of_one_rank(rank: int) -> Job:
    return _on(rank, 1, jobs.ddp, lambda job: _state(job, "down.weight", "exp_avg").mul_(2))


def step_of_one_rank(rank: int) -> Job:
    return _on(rank, 1, jobs.ddp, lambda job: _state(job, "up.bias", "step").add_(1))


def rate_of_one_rank(rank: int) -> Job:
    def change(job: Job) -> None:
        job.optimizer.param_groups[0]["lr"] *= 2

    return _on(rank, 1, jobs.sharded, change)


def _with_data_of_its_own(rank: int, tensor: nn.Parameter) -> Job:
    model = nn.Module()
    model.experts = nn.ModuleList([nn.Linear(2, 2, bias=False)])
    model.experts[0].weight = tensor
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    optimizer.zero_grad()
    return Job(model, optimizer, lambda: None)


def experts_renumbered(rank: int) -> Job:
    """Expert `rank` of the whole model is expert 0 on each rank."""
    return _with_data_of_its_own(rank, nn.Parameter(torch.full((2, 2), 1.0 + rank)))


def padded_flat_buffer(rank: int) -> Job:
    """Seven elements over two ranks: four on each, the last one is padding."""
    whole = torch.cat([torch.arange(1.0, 8.0), torch.zeros(1)])
    return _with_data_of_its_own(rank, nn.Parameter(whole.chunk(2)[rank].clone()))


def buffer_of_its_own(rank: int) -> Job:
    job = jobs.sharded()
    job.model.register_buffer("seen", torch.tensor([5 + rank]))
    return job


def _hooked(job: Job, hook: Callable[[dict[str, Any], str], Any]) -> Job:
    def on_saving(_: Any, state: dict[str, Any], prefix: str, __: Any) -> None:
        hook(state, prefix)

    job.model._register_state_dict_hook(on_saving)
    return job


def key_dropped_on_one_rank(rank: int) -> Job:
    job = jobs.sharded()
    return _hooked(job, lambda state, prefix: state.pop(f"{prefix}up.weight")) if rank else job


def key_dropped_on_all(rank: int) -> Job:
    return _hooked(jobs.sharded(), lambda state, prefix: state.pop(f"{prefix}up.bias"))


def old_tensor_kept(rank: int) -> Job:
    """A load that takes the live tensor for the saved one, on one rank."""

    def change(job: Job) -> None:
        module = _module(job, "down")

        def keep(state: dict[str, Any], prefix: str, *_: Any) -> None:
            state[f"{prefix}weight"] = module.weight.detach()

        module._register_load_state_dict_pre_hook(keep)

    return _on(rank, 1, jobs.ddp, change)


def buffer_not_loaded(rank: int) -> Job:
    """A load that drops what it should take, and says nothing."""
    job = jobs.sharded()
    job.model.register_buffer("seen", torch.tensor([5]))

    def keep(state: dict[str, Any], prefix: str, *_: Any) -> None:
        state[f"{prefix}seen"] = job.model.seen.clone()

    job.model._register_load_state_dict_pre_hook(keep)
    return job


def narrower_dtype(rank: int) -> Job:
    """Saved as bfloat16, and loaded into float32 again."""

    def narrow(state: dict[str, Any], prefix: str) -> None:
        state[f"{prefix}up.weight"] = state[f"{prefix}up.weight"].to(torch.bfloat16)

    return _hooked(jobs.sharded(), narrow)


def dtype_changed_by_the_load(rank: int) -> Job:
    job = jobs.ddp()
    module = _module(job, "up")

    def change(*_: Any) -> None:
        module.weight.data = module.weight.data.double()

    module.register_load_state_dict_post_hook(change)
    return job


def _swapped(tensor: DTensor) -> DTensor:
    """With the shard of the other rank."""
    mine = tensor._local_tensor.contiguous()
    other = torch.empty_like(mine)
    rank = dist.get_rank()
    waits = [dist.isend(mine, 1 - rank), dist.irecv(other, 1 - rank)]
    for wait in waits:
        assert wait is not None
        wait.wait()
    return DTensor.from_local(
        other,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def moment_swapped_between_ranks(rank: int) -> Job:
    job = jobs.sharded()

    def swap(optimizer: Any, state: dict[str, Any]) -> None:
        values = state["state"][0]
        values["exp_avg"] = _swapped(values["exp_avg"])

    job.optimizer.register_state_dict_post_hook(swap)
    return job


def shards_exchanged(rank: int) -> Job:
    def swap(state: dict[str, Any], prefix: str) -> None:
        state[f"{prefix}up.weight"] = _swapped(state[f"{prefix}up.weight"])

    return _hooked(jobs.sharded(), swap)


def moments_exchanged(rank: int) -> Job:
    """A load that gives each moment the values of the other."""
    job = jobs.ddp()

    def swap(optimizer: torch.optim.Optimizer) -> None:
        values = next(iter(optimizer.state.values()))
        values["exp_avg"], values["exp_avg_sq"] = values["exp_avg_sq"], values["exp_avg"]

    job.optimizer.register_load_state_dict_post_hook(swap)
    return job


def step_forgotten(rank: int) -> Job:
    """A load after which the optimizer counts from one again, on one rank."""

    def change(job: Job) -> None:
        def forget(optimizer: torch.optim.Optimizer) -> None:
            for values in optimizer.state.values():
                values["step"] = torch.tensor(0.0)

        job.optimizer.register_load_state_dict_post_hook(forget)

    return _on(rank, 1, jobs.ddp, change)


def rate_forgotten(rank: int) -> Job:
    job = jobs.ddp()

    def forget(optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[0]["lr"] = 1e-3

    job.optimizer.register_load_state_dict_post_hook(forget)
    return job


def tie_lost(rank: int) -> Job:
    job = jobs.tied()
    module = _module(job, "twin")

    def untie(*_: Any) -> None:
        module.weight = nn.Parameter(module.weight.detach().clone())

    module.register_load_state_dict_post_hook(untie)
    return job


def frozen_trains(rank: int) -> Job:
    job = jobs.ddp()
    module = _module(job, "frozen")

    def thaw(*_: Any) -> None:
        module.requires_grad_(True)

    module.register_load_state_dict_post_hook(thaw)
    return job


def parameter_detached(rank: int) -> Job:
    """A plain attribute that the optimizer trains."""
    job = jobs.sharded()
    module = job.model.down
    bias = module.bias
    del module.bias
    module.bias = bias.detach().requires_grad_()
    return job


def optimizer_of_another_layer(rank: int) -> Job:
    """The layer was replaced after the optimizer was made."""
    model = DistributedDataParallel(net())
    job = started(model)
    model.module.down = nn.Linear(16, 6)
    return job


def attribute(rank: int) -> Job:
    job = jobs.ddp()
    job.model.module.running = {"ema": torch.ones(3)}
    return job


def shards_too_large(rank: int) -> Job:
    """Padded shards that claim to be a DTensor of the unpadded shape."""
    mesh = init_device_mesh("cpu", (2,))
    padded = torch.arange(4.0) + 4 * rank
    made = DTensor.from_local(
        padded, mesh, [Shard(0)], run_check=False, shape=torch.Size([7]), stride=(1,)
    )
    model = nn.Module()
    model.flat = nn.Parameter(made)
    return Job(model, None, lambda: None)


def other_shapes(rank: int) -> Job:
    model = nn.Module()
    model.table = nn.Parameter(torch.ones(3 + rank, 2))
    return Job(model, None, lambda: None)


def other_placements(rank: int) -> Job:
    """One rank says that it holds all, the other one that it holds its rows."""
    mesh = init_device_mesh("cpu", (2,))
    placement = [Replicate()] if rank == 0 else [Shard(0)]
    made = DTensor.from_local(
        torch.ones(4 if rank == 0 else 2),
        mesh,
        placement,
        run_check=False,
        shape=torch.Size([4]),
        stride=(1,),
    )
    model = nn.Module()
    model.odd = nn.Parameter(made)
    return Job(model, None, lambda: None)


LOSSES: dict[str, Loss] = {
    loss.what: loss
    for loss in (
        Loss("one bit of a replica differs on one rank", replica_bit, "up.weight", (1,),
             ("sharded",), ("inventory",), first="[15, 7]"),
        Loss("one bit of a replicated DTensor differs on one rank", dtensor_replica_bit,
             "router", (1,), ("sharded",), ("inventory",), first="[2]"),
        Loss("an optimizer moment of a replica differs on one rank", moment_of_one_rank,
             "exp_avg of down.weight", (1,), ("sharded",), ("inventory",), first="[0, 0]"),
        Loss("a step counter differs on one rank", step_of_one_rank, "step of up.bias", (1,),
             ("sharded",), ("inventory",)),
        Loss("a learning rate differs on one rank", rate_of_one_rank, "lr of param_groups[0]",
             (1,), ("sharded",), ("inventory",)),
        Loss("experts are renumbered on each rank", experts_renumbered, "experts.0.weight", (1,),
             ("dcp",), ("inventory", "dcp"), first="[0, 0]"),
        Loss("a padded flat buffer is cut without a placement", padded_flat_buffer,
             "experts.0.weight", (1,), ("dcp",), ("inventory", "dcp"), first="[0]"),
        Loss("a buffer has other data on each rank", buffer_of_its_own, "seen", (1,),
             ("broadcast",), ("inventory", "broadcast")),
        Loss("a hook drops a key on one rank", key_dropped_on_one_rank, "up.weight", (1,),
             ("full", "broadcast"), ("full", "broadcast"), "unsafe", defect="SP-033"),
        Loss("a hook drops a key on all ranks", key_dropped_on_all, "up.bias", (0, 1),
             ("sharded", "dcp"), ("sharded", "dcp"), "unsafe"),
        Loss("a load keeps one old tensor on one rank", old_tensor_kept, "down.weight", (1,),
             ("sharded", "full"), ("sharded", "full")),
        Loss("a load keeps an old buffer", buffer_not_loaded, "seen", (0, 1),
             ("sharded", "full"), ("sharded", "full")),
        Loss("a road saves in a narrower dtype", narrower_dtype, "up.weight", (0, 1),
             ("dcp", "full"), ("dcp", "full")),
        Loss("a load changes the dtype", dtype_changed_by_the_load, "up.weight", (0, 1),
             ("sharded",), ("sharded",)),
        Loss("two ranks swap an optimizer moment", moment_swapped_between_ranks,
             "exp_avg of up.weight", (0, 1), ("dcp", "sharded"), ("dcp", "sharded")),
        Loss("two ranks exchange their shards of a weight", shards_exchanged, "up.weight", (0, 1),
             ("dcp", "sharded"), ("dcp", "sharded")),
        Loss("a load gives each moment the values of the other", moments_exchanged,
             "exp_avg of up.weight", (0, 1), ("sharded",), ("sharded",)),
        Loss("a load forgets the step on one rank", step_forgotten, "step of up.weight", (1,),
             ("sharded", "dcp"), ("sharded", "dcp")),
        Loss("a load forgets the learning rate", rate_forgotten, "lr of param_groups[0]", (0, 1),
             ("sharded", "dcp"), ("sharded", "dcp")),
        Loss("tied weights come apart in a load", tie_lost, "twin.weight", (0, 1),
             ("sharded",), ("sharded",)),
        Loss("frozen weights train after a load", frozen_trains, "frozen.weight", (0, 1),
             ("sharded",), ("sharded",)),
        Loss("a parameter is detached from its module", parameter_detached, "down.bias", (0, 1),
             ("sharded",), ("coverage",)),
        Loss("the optimizer trains a layer that the model no longer has",
             optimizer_of_another_layer, "(parameter 4 of param_groups[0])", (0, 1),
             ("sharded",), ("coverage",)),
        Loss("a buffer is not persistent", lambda _: jobs.ddp(), "scale", (0, 1),
             ("sharded",), ("coverage",), "note"),
        Loss("a plain attribute holds a tensor", attribute, "running['ema']", (0, 1),
             ("sharded",), ("coverage",), "note"),
        Loss("padded shards claim an unpadded shape", shards_too_large, "flat", (1,),
             ("sharded",), ("inventory",)),
        Loss("ranks have other shapes under one name", other_shapes, "table", (0, 1),
             ("sharded",), ("inventory",)),
        Loss("ranks disagree about a placement", other_placements, "odd", (0, 1),
             ("sharded",), ("inventory",)),
        Loss("tensor parallelism under DDP: parameters vanish after a forward",
             lambda _: jobs.ddp_tp(), "up.weight", (0, 1, 2, 3), ("dcp",), ("coverage",),
             defect="SP-001", world=4),
        Loss("FSDP1 on a CPU: a full optimizer state with one moment twice",
             lambda _: jobs.fsdp1(), "exp_avg of up.weight", (0,), ("broadcast",),
             ("broadcast",), defect="SP-083"),
        Loss("FSDP1 on a CPU: a full state dict that ends the process",
             lambda _: jobs.fsdp1(), "", None, ("broadcast",), ("broadcast",), "unsafe",
             defect="SP-070"),
    )
}  # fmt: skip
"""By what is planted."""


def missing(loss: Loss, proof: Any) -> str:
    """What the proof does not say of the loss; empty where it says all."""
    for where in loss.where:
        found = [
            finding
            for finding in proof.findings
            if finding.where == where and finding.severity == loss.severity
        ]
        named = [
            finding
            for finding in found
            if finding.name == loss.names
            or (loss.names and loss.names in finding.what)
            or (not loss.names and finding.defect == loss.defect)
        ]
        if not named:
            return f"{where} does not name {loss.names}: {[str(f) for f in proof.findings]}"
        if loss.ranks is not None and not any(
            set(loss.ranks) <= set(finding.ranks) for finding in named
        ):
            return f"{where} names ranks {[f.ranks for f in named]}, expected {loss.ranks}"
        place = f"element {loss.first}" if where == "inventory" and loss.first else ""
        if not any(place in finding.first for finding in named):
            return f"{where} names {[f.first for f in named]}, expected {loss.first}"
        if loss.defect and not any(finding.defect == loss.defect for finding in named):
            return f"{where}: {[(f.defect, str(f)) for f in named]}, expected {loss.defect}"
    return ""
