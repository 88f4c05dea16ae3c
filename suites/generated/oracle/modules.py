"""A module whose DTensor parameters data parallelism is to take, simulated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from generated import data
from generated.oracle import sims
from generated.oracle.sims import ANY, Sim
from generated.oracle.steps import Env, Scene, rule
from generated.oracle.tell import Outcome

_NEW = frozenset({"object", "kind", "shared", "stride"})
"""What nothing is said of where a tensor is a new object over known memory."""


def _wholes(env: Env) -> dict[int, Sim]:
    """Of a local Parameter, by its id, the DTensor that it is a part of."""
    found: dict[int, Sim] = env.setdefault("wholes", {})
    return found


def _told(env: Env) -> dict[str, Any]:
    """The parameters as they stand between forwards, and the state dict."""
    wholes = _wholes(env)
    state = {}
    for name, sim in env["module"].items():
        whole = wholes.get(id(sim), sim)
        state[name] = replace(whole, grad=False, open=_NEW)
    return {"parameters": env["module"], "state": state}


@rule("wrap")
def wrap(scene: Scene) -> list[Outcome]:
    """Local Parameters take the places of DTensors, over the same memory, ties and flags kept."""
    outcomes = []
    for env in scene.envs:
        made: dict[int, Sim] = {}
        wholes = _wholes(env)
        for name, sim in env["module"].items():
            if sim.mesh is None:
                continue
            if id(sim) not in made:
                made[id(sim)] = Sim("Parameter", sim.local, sim.grad)
                wholes[id(made[id(sim)])] = sim
            env["module"][name] = made[id(sim)]
        outcomes.append(Outcome(ANY, given=_told(env)))
    return outcomes


@rule("forward")
def forward(scene: Scene) -> list[Outcome]:
    """Inside there are DTensors over the same memory; afterwards all is as before."""
    outcomes = []
    for env in scene.envs:
        wholes = _wholes(env)
        seen = {}
        more = {"grad"} if scene.step.get("no_grad") else set()
        for name, sim in env["module"].items():
            whole = wholes.get(id(sim))
            seen[name] = sim
            if whole is not None:
                seen[name] = replace(whole, grad=sim.grad, open=_NEW | more)
        if scene.step.get("fail"):
            raised = Outcome(raises=("on purpose",), kinds=("RuntimeError",), given=_told(env))
            outcomes.append(raised)
        else:
            outcomes.append(Outcome(seen, given=_told(env)))
    return outcomes


@rule("load")
def load(scene: Scene) -> list[Outcome]:
    """Full tensors or DTensors are loaded into the memory that is there."""
    outcomes = []
    for rank, env in enumerate(scene.envs):
        for name, number in scene.step["names"]:
            _write(scene.case, env, rank, name, number, scene.step["fill"])
        outcomes.append(Outcome(ANY, given=_told(env)))
    return outcomes


def train(case: sims.Case, envs: list[Env], step: dict[str, Any]) -> None:
    """An optimizer writes into a parameter."""
    name, number, fill = step["train"]
    for rank, env in enumerate(envs):
        _write(case, env, rank, name, number, fill)


def _write(case: sims.Case, env: Env, rank: int, name: str, number: int, fill: int) -> None:
    entry = case["pool"][number]
    values = data.pattern(entry["dtype"], entry["shape"], fill)
    if entry["kind"] == "dtensor":
        values = sims.cut(values, sims.mesh_of(entry, rank), entry["placements"], rank)
    memory = env["module"][name].local
    if memory.numel():
        data.written(memory, values)
