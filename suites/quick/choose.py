"""A pytest plugin: takes a share of each function's and law's checks that fits the time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TypeVar

import pytest

from harness.settings import requirements

T = TypeVar("T")
FUNCTIONS, FILES, MOST = (f"SHARDPROOF_QUICK_{name}" for name in ("FUNCTIONS", "FILES", "MOST"))
"""Environment: what the change reaches, a line each, and how many checks may run."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    functions = frozenset(os.environ[FUNCTIONS].splitlines())
    files = frozenset(os.environ[FILES].splitlines())
    requirements.leave_out_thorough(config, items)
    reached = [i for i in items if str(i.path) in files or _judged(i) in functions]
    chosen = set(spread(reached, [_group(i) for i in reached], int(os.environ[MOST])))
    config.hook.pytest_deselected(items=[i for i in items if i not in chosen])
    items[:] = [i for i in items if i in chosen]
    names = sorted({_judged(i) for i in reached} - {""})
    print("reached:", ", ".join(names) or "no function of the contract")
    print(f"checks: {len(items)} of {len(reached)} that this change reaches")


def spread(items: Sequence[T], groups: Iterable[object], most: int) -> list[T]:
    """So many of the items, taken from each group in turn."""
    queues: dict[object, deque[T]] = {}
    for item, group in zip(items, groups, strict=True):
        queues.setdefault(group, deque()).append(item)
    chosen: list[T] = []
    while len(chosen) < min(most, len(items)):
        for queue in queues.values():
            if queue and len(chosen) < most:
                chosen.append(queue.popleft())
    return chosen


def _judged(item: pytest.Item) -> str:
    mark = item.get_closest_marker("judges")
    return str(mark.args[0]) if mark else ""


def _group(item: pytest.Item) -> object:
    law = item.get_closest_marker("law")
    return _judged(item), law and law.args, item.path
