"""What scripts of a page read of checks: the same as results.json, without what is empty."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_WORST_FIRST = ("crash", "timeout", "error", "fail", "xpass", "xfail", "precondition", "pass")


def checks(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The checks, worst first. A rank whose stack is another's has the other's number in `as`."""
    ranked = sorted(found, key=lambda check: _WORST_FIRST.index(check["verdict"]))
    return [_check(check) for check in ranked]


def _check(check: dict[str, Any]) -> dict[str, Any]:
    full = check | {"name": f"{check['module']}.{check['function']}".strip(".")}
    del full["module"], full["function"]
    return _filled(full | {"ranks": _ranks(check["ranks"])})


def _ranks(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first: dict[str, int] = {}
    found = []
    for rank in ranks:
        told = rank["details"]
        same = first.setdefault(told, rank["rank"]) if told else rank["rank"]
        apart = {} if same == rank["rank"] else {"details": "", "as": same}
        found.append(_filled(rank | apart))
    return found


def _filled(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in ("", None, [], {})}
