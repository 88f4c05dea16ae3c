"""How each loss is planted: a function that makes the faulty job of this rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from prove.kit import jobs
from prove.kit.jobs import Job, local, net, started


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


def transposed(_: int) -> Job:
    """A weight that is not contiguous, as torch's broadcast permutes it."""
    model = nn.Linear(6, 4, bias=False)
    model.weight = nn.Parameter(torch.arange(24.0).reshape(6, 4).t())
    return Job(DistributedDataParallel(model), None, lambda: None)


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from torch.testing._internal.two_tensor import TwoTensor

        self.weight = nn.Parameter(TwoTensor(torch.ones(4, 4), torch.ones(4, 4)))


def subclass_broadcast(_: int) -> Job:
    """A tensor subclass that rank 0 would broadcast in parts, and the process would end."""
    return Job(_Pair(), None, lambda: None)


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
