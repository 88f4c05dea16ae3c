"""The simulation of a case: all ranks at once, one call after the other."""

from __future__ import annotations

from collections.abc import Iterator

from generated import data
from generated.calls import CALLS
from generated.oracle import (  # each registers its rules
    flat,  # noqa: F401
    gather,  # noqa: F401
    load,  # noqa: F401
    local,  # noqa: F401
    modules,
    seams,  # noqa: F401
    sims,
)
from generated.oracle.sims import Case, Sim
from generated.oracle.steps import RULES, Env, Scene, Step
from generated.oracle.tell import Outcome


def simulate(case: Case) -> Iterator[list[Outcome]]:
    """For each call in turn what it must come to on each rank.

    An outcome holds the simulated values themselves, which the next call changes.
    """
    envs = [sims.build(case, rank) for rank in range(case["world"])]
    for step in case["steps"]:
        if "rewrite" in step:
            _rewrite(case, envs, step)
        elif "freeze" in step:
            for env in envs:
                env["module"][step["freeze"]].grad = False
        elif "train" in step:
            modules.train(case, envs, step)
        elif "put" in step:
            tree, key, number = step["put"]
            for env in envs:
                env[tree][key] = env[f"t{number}"]
        else:
            outcomes = RULES[step["call"]](Scene(case, envs, step))
            for number, fill in step.get("then", ()):
                _rewrite(case, envs, {"rewrite": number, "fill": fill})
            for rank, outcome in enumerate(outcomes):
                if outcome.given:
                    continue
                names = CALLS[step["call"]].given(step)
                outcome.given = {name: envs[rank][name] for name in names}
            yield outcomes
            if "into" in step:
                for env, outcome in zip(envs, outcomes, strict=True):
                    if outcome.raises is None:
                        env[step["into"]] = outcome.result


def _rewrite(case: Case, envs: list[Env], step: Step) -> None:
    entry = case["pool"][step["rewrite"]]
    whole = data.pattern(entry["dtype"], entry["shape"], step["fill"])
    for rank, env in enumerate(envs):
        sim: Sim = env[f"t{step['rewrite']}"]
        values = whole
        if sim.mesh is not None:
            values = sims.cut(whole, sim.mesh, sim.placements, rank)
        if sim.local is not None and sim.local.numel():
            data.written(sim.local, values)
