"""The public roads of torch over which a job can save and load: each as a save and a load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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

    models: list[nn.Module]
    """One; several where a rank of a pipeline has several stages."""
    optimizers: list[torch.optim.Optimizer]
    """Empty where only the model is."""
    rank: int
    size: int
    side: str
    """model or optimizer: which of them is saved and loaded."""
    names: list[set[str]] = field(default_factory=list)
    """What the last get found in each of the models."""

    def get(self, **options: bool) -> State:
        """The state of model or optimizer; those of several models in one."""
        asked = StateDictOptions(**options)  # type: ignore[arg-type]
        found: list[Any]
        if self.side == "model":
            found = [torch_api.get_model_state_dict(model, options=asked) for model in self.models]
        else:
            found = [
                torch_api.get_optimizer_state_dict(model, optimizers, options=asked)
                for model, optimizers in self._pairs()
            ]
        self.names = [_names(state) for state in found]
        return {self.side: found[0] if len(found) == 1 else _merged(found)}

    def set(self, state: State, **options: bool) -> None:
        """Load the state of model or optimizer, each model's own part of it."""
        asked = StateDictOptions(**options)  # type: ignore[arg-type]
        mine = state.get(self.side, {})
        states = [mine]
        if len(self.models) > 1:
            states = [_of(names, mine) for names in self.names]
        if self.side == "model":
            for model, one in zip(self.models, states, strict=True):
                torch_api.set_model_state_dict(model, one, options=asked)
        else:
            for (model, optimizers), one in zip(self._pairs(), states, strict=True):
                torch_api.set_optimizer_state_dict(model, optimizers, one, options=asked)

    def _pairs(self) -> list[tuple[nn.Module, Any]]:
        """Each model with its optimizers, as torch's functions take them."""
        if len(self.models) == 1:
            one = self.optimizers[0] if len(self.optimizers) == 1 else self.optimizers
            return [(self.models[0], one)]
        owners = owners_of(self.models, self.optimizers)
        return [
            (model, [o for o, at in zip(self.optimizers, owners, strict=True) if at == {number}])
            for number, model in enumerate(self.models)
        ]


def owners_of(
    models: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]
) -> list[set[int]]:
    """Of each optimizer, the models whose parameters it has."""
    owner = {id(param): at for at, model in enumerate(models) for param in model.parameters()}
    return [
        {owner[id(p)] for group in one.param_groups for p in group["params"] if id(p) in owner}
        for one in optimizers
    ]


def _names(state: State) -> set[str]:
    """Of what a state dict holds: its keys, or the parameters of an optimizer's."""
    if "param_groups" in state:
        grouped = [name for group in state["param_groups"] for name in group["params"]]
        return {*state.get("state", {}), *grouped}
    return set(state)


def _merged(states: list[State]) -> State:
    if any("param_groups" in state for state in states):
        return {
            "state": {k: v for state in states for k, v in state.get("state", {}).items()},
            "param_groups": [g for state in states for g in state.get("param_groups", [])],
        }
    return {key: value for state in states for key, value in state.items()}


def _of(names: set[str], state: State) -> State:
    if "param_groups" in state:
        return {
            "state": {k: v for k, v in state.get("state", {}).items() if k in names},
            "param_groups": [g for g in state["param_groups"] if names >= {*g["params"]}],
        }
    return {key: value for key, value in state.items() if key in names}


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
    incomplete: bool = False
    """Whether one tensor is taken out of what was saved, and the load has to refuse it."""
    asked_only: bool = False
    """Whether it is taken only where the caller names it: no checkpoint depends on it."""
    other_mesh: bool = False
    """Whether the files are read on another mesh, and nothing live is loaded."""


def _full_file(job: Job, folder: Path) -> Any:
    state = job.get(full_state_dict=True, cpu_offload=True)
    if job.rank == 0:
        torch.save(state["model"], folder / "model.pt")
    return state


def _load_file(job: Job, _: Any, folder: Path) -> None:
    state: State = {}
    if job.rank == 0:
        state = torch.load(folder / "model.pt", map_location="cpu", mmap=True, weights_only=True)
    job.set({"model": state}, full_state_dict=True, broadcast_from_rank0=job.size > 1)


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
        Road(
            "full-flat",
            "get and set with full_state_dict and flatten_optimizer_state_dict",
            lambda job, _: job.get(full_state_dict=True, flatten_optimizer_state_dict=True),
            lambda job, saved, _: job.set(
                saved, full_state_dict=True, flatten_optimizer_state_dict=True
            ),
            full="all",
            only="optimizer",
            asked_only=True,
        ),
        Road(
            "incomplete",
            "set with full_state_dict, of a state that lacks a tensor: every rank has to refuse it",
            lambda job, _: job.get(full_state_dict=True),
            lambda job, saved, _: job.set(saved, full_state_dict=True),
            full="all",
            only="model",
            incomplete=True,
            asked_only=True,
        ),
        Road(
            "incomplete-broadcast",
            "the same with broadcast_from_rank0",
            lambda job, _: job.get(full_state_dict=True, cpu_offload=True),
            lambda job, saved, _: job.set(saved, full_state_dict=True, broadcast_from_rank0=True),
            full="first",
            distributed=True,
            only="model",
            from_first=True,
            incomplete=True,
            asked_only=True,
        ),
    )
}
DEFAULT = [road.name for road in ROADS.values() if not road.asked_only]
"""The roads that are taken where none is named."""


def chosen(asked: Any, *, distributed: bool) -> list[Road]:
    """The roads to take; ValueError names one that there is not."""
    names = DEFAULT if asked is None else [asked] if isinstance(asked, str) else list(asked)
    if unknown := [name for name in names if name not in ROADS]:
        raise ValueError(f"roads={unknown[0]!r}: prove knows the roads {', '.join(ROADS)}")
    if not names:
        raise ValueError(f"roads is empty: name some of {', '.join(ROADS)}, or leave it out")
    return [ROADS[name] for name in names if distributed or not ROADS[name].distributed]
