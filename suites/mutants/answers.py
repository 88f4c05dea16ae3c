"""Why automatic mutants survive: `suites/mutants/survivors.toml`, an entry for each.

    [[survivor]]
    file = "_core/sharding/blocks.py"
    function = "same_ranks"
    operator = "boolean"
    old = "ours is theirs or ours == theirs"
    new = "ours is theirs and ours == theirs"
    equivalent = "why nobody could tell"

or, where a check has been added that catches it, `check = "folder/test_file.py::Class::test"`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutants.judge import path_of
from mutants.operators import Automatic
from mutants.scope import current

PATH = Path(__file__).parent / "survivors.toml"
_FIELDS = ("file", "function", "operator", "old", "new")


class BadAnswerError(Exception):
    """An entry that says nothing, or nothing of a mutant of today."""


@dataclass(frozen=True)
class Answer:
    """What is said of one mutant."""

    equivalent: str = ""
    check: str = ""


def read(mutants: Iterable[Automatic], path: Path = PATH) -> dict[Automatic, Answer]:
    """The answers by mutant of the scope; BadAnswerError names the first that does not hold."""
    known = {mutant.key: mutant for mutant in mutants}
    found: dict[Automatic, Answer] = {}
    entries = tomllib.loads(path.read_text()).get("survivor", []) if path.exists() else []
    for entry in entries:
        told = f"{path.name}: {entry.get('file')}:{entry.get('function')}: {entry.get('old')!r}"
        if missing := [name for name in _FIELDS if not isinstance(entry.get(name), str)]:
            raise BadAnswerError(f"{told}: expected a text for {', '.join(missing)}")
        if unknown := entry.keys() - {*_FIELDS, "nth", "equivalent", "check"}:
            raise BadAnswerError(f"{told}: unknown: {', '.join(sorted(unknown))}")
        if not current().has(entry["file"]):
            continue
        named = Automatic(**{name: entry[name] for name in _FIELDS}, nth=entry.get("nth", 0))
        mutant = known.get(named.key)
        if mutant is None:
            raise BadAnswerError(f"{told}: the reference has no such mutant: take the entry out")
        if mutant in found:
            raise BadAnswerError(f"{told}: stands twice")
        answer = Answer(entry.get("equivalent", "").strip(), entry.get("check", "").strip())
        if bool(answer.equivalent) == bool(answer.check):
            raise BadAnswerError(f"{told}: expected either a reason, `equivalent`, or a `check`")
        if answer.check and not _exists(answer.check):
            raise BadAnswerError(f"{told}: there is no check {answer.check}")
        found[mutant] = answer
    return found


def _exists(check: str) -> bool:
    path = path_of(check)
    name = check.partition("[")[0].rpartition("::")[2]
    return bool(name) and path.is_file() and f"def {name}(" in path.read_text()


def entry_for(mutant: Automatic, **more: str) -> str:
    """An entry, to be completed by hand."""
    values: dict[str, Any] = {name: getattr(mutant, name) for name in _FIELDS}
    lines = [f"{name} = {_toml(value)}" for name, value in (values | more).items()]
    if mutant.nth:
        lines.append(f"nth = {mutant.nth}")
    return "\n".join(["[[survivor]]", *lines]) + "\n"


def _toml(text: str) -> str:
    if "'" not in text and "\n" not in text and ('"' in text or "\\" in text):
        return f"'{text}'"
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
