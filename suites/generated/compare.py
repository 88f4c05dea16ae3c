"""What a rank told of a call against what the oracle expects of it: plain data on both sides.

A script that repeats a failure holds a copy, as of `rig`.
"""

from __future__ import annotations

from typing import Any

REFUSALS = ("ValueError", "TypeError", "RuntimeError", "CompanionMismatch", "KeyError")
"""Errors that are an answer to wrong input; any other is an accident."""


class Comparison:
    """Holds the calls of one rank, in order, against what is expected of them.

    Objects and memories have numbers on both sides, which need not be the same: whatever is one
    there has to be one here.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], int] = {}

    def difference(self, expected: dict[str, Any], told: dict[str, Any]) -> str:
        """The first difference in words; empty when there is none."""
        raised = told["word"] == "raised"
        kind, text = told.get("error", ("", ""))
        said = f"it raised {kind}: {text[:300]}"
        if told["changed"]:
            return f"the call left changed: {', '.join(told['changed'])}"
        if raised and expected["raises"] is None and not expected["open"]:
            return "" if expected["may_raise"] and kind in REFUSALS else said
        for name, value in expected["given"].items():
            if found := self._tree(value, told["given"][name], name):
                return f"after the call {found}"
        if expected["open"]:
            return ""
        if not raised:
            if expected["raises"] is None:
                return self._tree(expected["result"], told["result"], "the result")
            return f"it returned, and must raise {_named(expected['raises'])}"
        kinds = expected["kinds"] or REFUSALS
        if kind not in kinds:
            return f"{said} (expected {' or '.join(kinds)})"
        plain = text.replace("\\", "")  # the text of a KeyError is the repr of its message
        words = expected["raises"]
        if words and not any(word.replace("\\", "") in plain for word in words):
            return f"{said} (expected a message{_named(words)})"
        return ""

    def _tree(self, expected: Any, told: Any, path: str) -> str:
        if expected == "any":
            return ""
        if isinstance(expected, dict):
            return self._leaf(expected, told, path)
        kind, items, more = expected
        if not isinstance(told, tuple) or told[0] != kind:
            return f"{path} is {_short(told)}, expected a {kind}"
        keys, got = ([key for key, _ in some] for some in (items, told[1]))
        if got != keys:
            return f"{path} has the keys {got}, expected {keys}"
        if more != told[2]:
            return f"{path} has the attributes {told[2]}, expected {more}"
        for (key, value), (_, item) in zip(items, told[1], strict=True):
            if found := self._tree(value, item, f"{path}[{key}]"):
                return found
        return ""

    def _leaf(self, expected: dict[str, Any], told: Any, path: str) -> str:
        if not isinstance(told, dict):
            return f"{path} is {_short(told)}, expected a {expected.get('kind', 'tensor')}"
        for name, value in expected.items():
            other = told.get(name)
            if name in ("object", "memory"):
                if found := self._same(name, value, other):
                    return f"{path} {found}"
            elif name == "local":
                if found := self._leaf(value, other, f"{path}'s local tensor"):
                    return found
            elif name == "shards":
                if [at for at, _ in value] != [at for at, _ in other or ()]:
                    return f"{path} has other shards on this rank"
                for (at, shard), (_, item) in zip(value, other or (), strict=True):
                    if found := self._leaf(shard, item, f"{path}'s shard at {at}"):
                        return found
            elif value != other:
                return f"{path} has {name} {other!r}, expected {value!r}"
        return ""

    def _same(self, what: str, mine: int, theirs: Any) -> str:
        if self._known.setdefault((what, mine), theirs) != theirs:
            if what == "object":
                return "is another object than what it is tied to"
            return "shares no memory with what it is tied to"
        if self._known.setdefault((f"{what} told", theirs), mine) != mine:
            if what == "object":
                return "is the same object as something that it must be apart from"
            return "shares memory with something that it must be apart from"
        return ""


def _named(words: Any) -> str:
    return f" that names {' or '.join(map(repr, words))}" if words else ""


def _short(told: Any) -> str:
    if isinstance(told, tuple):
        return f"a {told[0]}"
    if isinstance(told, dict) and "value" in told:
        return f"{told['value'][:60]} (a {told['kind']})"
    return f"a {told['kind']}" if isinstance(told, dict) else repr(told)
