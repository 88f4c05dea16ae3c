"""The public roads of torch over which a job can save and load: each as a save and a load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
from torch import nn

# Looked up at each call: what install() has put there is what the job would use.
from torch.distributed.checkpoint import state_dict as torch_api
from torch.distributed.checkpoint.state_dict import StateDictOptions

State = dict[str, Any]
dcp: Any = torch.distributed.checkpoint  # hands its functions on without listing them


@dataclass
class Job:
    """What is saved and loaded."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    """Empty where only the model is."""
    rank: int
    size: int
    side: str
    """model or optimizer: which of them is saved and loaded."""

    @property
    def asked(self) -> Any:
        """Optimizers as torch's functions take them."""
        return self.optimizers[0] if len(self.optimizers) == 1 else self.optimizers

    def get(self, **options: bool) -> State:
        """The state of model or optimizer."""
        asked = StateDictOptions(**options)  # type: ignore[arg-type]
        if self.side == "model":
            return {"model": torch_api.get_model_state_dict(self.model, options=asked)}
        return {
            "optimizer": torch_api.get_optimizer_state_dict(self.model, self.asked, options=asked)
        }

    def set(self, state: State, **options: bool) -> None:
        """Load the state of model or optimizer."""
        asked = StateDictOptions(**options)  # type: ignore[arg-type]
        if self.side == "model":
            torch_api.set_model_state_dict(self.model, state.get("model", {}), options=asked)
        else:
            torch_api.set_optimizer_state_dict(
                self.model, self.asked, state.get("optimizer", {}), options=asked
            )


Save = Callable[[Job, Path], Any]
Load = Callable[[Job, Any, Path], None]


@dataclass(frozen=True)
class Road:
    """One way to save and to load."""

    name: str
    what: str
    """The public calls."""
    save: Save
    load: Load
    files: bool = False
    """Whether it writes files, which all ranks must see."""
    full: str = ""
    """Who has the whole state in memory after the save: all, first, or nobody."""
    snapshot: bool = False
    """Whether torch promises that training may go on while the state is being saved."""
    offloads: bool = False
    """Whether the saved state is to lie in CPU memory of its own."""
    distributed: bool = False
    """Whether it needs a process group."""
    only: str = ""
    """The one side that it is for."""
    from_first: bool = False
    """Whether all that is loaded comes from rank 0."""
    other_mesh: bool = False
    """Whether the files are read on another mesh, and nothing live is loaded."""


def _full_file(job: Job, folder: Path) -> Any:
    state = {"model": torch_api.get_model_state_dict(job.model, options=_FULL_CPU)}
    if job.rank == 0:
        torch.save(state["model"], folder / "model.pt")
    return state


def _load_file(job: Job, _: Any, folder: Path) -> None:
    state: State = {}
    if job.rank == 0:
        state = torch.load(folder / "model.pt", map_location="cpu", mmap=True, weights_only=True)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=job.size > 1)
    torch_api.set_model_state_dict(job.model, state, options=options)


_FULL_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)


def _dcp(job: Job, folder: Path) -> Any:
    state = job.get()
    dcp.save(state, checkpoint_id=folder, no_dist=job.size == 1)
    return state


def _dcp_flat(job: Job, folder: Path) -> Any:
    state = job.get(flatten_optimizer_state_dict=True)
    dcp.save(state, checkpoint_id=folder, no_dist=job.size == 1)
    return state


def _load_flat(job: Job, _: Any, folder: Path) -> None:
    state = job.get(flatten_optimizer_state_dict=True)
    dcp.load(state, checkpoint_id=folder, no_dist=job.size == 1)
    job.set(state, flatten_optimizer_state_dict=True)


def _dcp_async(job: Job, folder: Path) -> Any:
    return dcp.async_save(job.get(), checkpoint_id=folder)


def _load_dcp(job: Job, _: Any, folder: Path) -> None:
    state = job.get()
    dcp.load(state, checkpoint_id=folder, no_dist=job.size == 1)
    job.set(state)


def _load_async(job: Job, saved: Any, folder: Path) -> None:
    saved.result()
    _load_dcp(job, saved, folder)


ROADS = {
    road.name: road
    for road in (
        Road(
            "sharded",
            "get_model_state_dict(), get_optimizer_state_dict(), and set",
            lambda job, _: job.get(),
            lambda job, saved, _: job.set(saved),
        ),
        Road(
            "sharded-cpu",
            "the same with cpu_offload",
            lambda job, _: job.get(cpu_offload=True),
            lambda job, saved, _: job.set(saved, cpu_offload=True),
            offloads=True,
        ),
        Road(
            "dcp",
            "torch.distributed.checkpoint.save() and load() of the sharded state, in files",
            _dcp,
            _load_dcp,
            files=True,
        ),
        Road(
            "flat",
            "the same with flatten_optimizer_state_dict",
            _dcp_flat,
            _load_flat,
            files=True,
            only="optimizer",
        ),
        Road(
            "dcp-async",
            "torch.distributed.checkpoint.async_save(), while training goes on, and load()",
            _dcp_async,
            _load_async,
            files=True,
            snapshot=True,
            distributed=True,
        ),
        Road(
            "dcp-mesh",
            "torch.distributed.checkpoint.save(), and load() on another mesh: all ranks in a row",
            _dcp,
            _load_dcp,
            files=True,
            distributed=True,
            other_mesh=True,
        ),
        Road(
            "full",
            "get and set with full_state_dict, on every rank",
            lambda job, _: job.get(full_state_dict=True),
            lambda job, saved, _: job.set(saved, full_state_dict=True),
            full="all",
        ),
        Road(
            "broadcast",
            "get with full_state_dict and cpu_offload, set with broadcast_from_rank0",
            lambda job, _: job.get(full_state_dict=True, cpu_offload=True),
            lambda job, saved, _: job.set(saved, full_state_dict=True, broadcast_from_rank0=True),
            full="first",
            offloads=True,
            distributed=True,
            from_first=True,
        ),
        Road(
            "file",
            "the full model in one file of rank 0, as Hugging Face saves it, and broadcast",
            _full_file,
            _load_file,
            files=True,
            full="first",
            offloads=True,
            only="model",
            from_first=True,
        ),
    )
}


def chosen(asked: Any, *, distributed: bool) -> list[Road]:
    """The roads to take; ValueError names one that there is not."""
    names = list(ROADS) if asked is None else [asked] if isinstance(asked, str) else list(asked)
    if unknown := [name for name in names if name not in ROADS]:
        raise ValueError(f"roads={unknown[0]!r}: prove knows the roads {', '.join(ROADS)}")
    if not names:
        raise ValueError(f"roads is empty: name some of {', '.join(ROADS)}, or leave it out")
    return [ROADS[name] for name in names if distributed or not ROADS[name].distributed]
