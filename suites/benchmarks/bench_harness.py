"""What the harness costs: a fresh world, and a check in one."""

from __future__ import annotations

from typing import Any, ClassVar

from benchmarks.base import AsvSettings, sampled
from benchmarks.settings import Settings

_COUNT = 8


def _fresh_worlds(params: tuple[Any, ...]) -> list[float]:
    from benchmarks import session_client

    settings = Settings.from_environment()
    if reason := settings.beyond(int(params[0])):
        raise NotImplementedError(reason)
    answer = session_client.ask({"fresh_worlds": int(params[0]), "count": _COUNT}, settings)
    return list(answer["seconds"])


def _checks(params: tuple[Any, ...]) -> list[float]:
    from benchmarks.world_cost import FRESH, measure

    return measure(FRESH.format(cases=_COUNT), fresh=True)


class FreshWorld(AsvSettings):
    """Ranks forked from the warm parent, joined in a process group, and ended."""

    params: ClassVar[list[list[int]]] = [[2, 4]]
    param_names = ("ranks",)
    time_call = sampled(_fresh_worlds)


class TrivialCheck(AsvSettings):
    """A check of 4 ranks, a 2-D mesh and a gathered DTensor, from set-up to its end."""

    time_call = sampled(_checks)
