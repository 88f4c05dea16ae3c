"""What simulates a call: the scene that it is given, and the rules by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from generated.oracle.sims import Case
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
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register what simulates a call."""

    def register(body: Rule) -> Rule:
        for name in names:
            RULES[name] = body
        return body

    return register


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
