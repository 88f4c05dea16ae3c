"""The simulation of a case: all ranks at once, one call after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from generated import data
from generated.calls import CALLS
from generated.oracle import sims
from generated.oracle.sims import Case, Sim
from generated.oracle.tell import Outcome

Env = dict[str, Any]
Step = dict[str, Any]


@dataclass
class Scene:
    """A call on all ranks: the case, what each rank has, and the call's options."""

    case: Case
    envs: list[Env]
    step: Step

    @property
    def ranks(self) -> range:
        return range(len(self.envs))

    @property
    def pg(self) -> tuple[int, ...]:
        """The ranks of the call's group, in its numbering."""
        return self.step.get("pg") or tuple(self.ranks)

    def tree(self, rank: int, name: str | None = None) -> Any:
        return self.envs[rank][name or self.step.get("tree", "state")]


Rule = Callable[[Scene], list[Outcome]]
_rules: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register what simulates a call."""

    def register(body: Rule) -> Rule:
        for name in names:
            _rules[name] = body
        return body

    return register


def simulate(case: Case) -> Iterator[list[Outcome]]:
    """For each call in turn what it must come to on each rank.

    An outcome holds the simulated values themselves, which the next call changes.
    """
    from generated.oracle import flat, gather, load, local, modules, seams  # noqa: F401

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
            outcomes = _rules[step["call"]](Scene(case, envs, step))
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


def connected(members: list[tuple[int, ...]], size: int) -> list[set[int]]:
    """For each rank the ranks that it meets in any of these groups, over several of them too."""
    met = [{rank} for rank in range(size)]
    changed = True
    while changed:
        changed = False
        for ranks in members:
            together = set().union(*(met[rank] for rank in ranks))
            for rank in together:
                if not together <= met[rank]:
                    met[rank] = met[rank] | together
                    changed = True
    return met


def words_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """What a message that names a path holds: its first key."""
    return (str(path[0]),) if path else ("",)
