"""Faults that several small changes make together, as patches: `suites/mutants/patches/NAME.patch`.

Each is a unified diff against `reference/`, which `git apply` takes, below a header:

    Fault: what a user would suffer, in one line
    Dimension: 4
    Functions: _gather_state_dict, _broadcast_state_dict

The dimension is what the fault varies, see DIMENSIONS. The functions are those whose checks shall
catch it, by upstream's names.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import pytest

from mutants.executed import one_of_each_first
from mutants.judge import REFERENCE, SUBJECT, CannotPlantError
from mutants.scope import SCOPES, Scope

FOLDER = Path(__file__).parent / "patches"
DIMENSIONS = {
    1: "values",
    2: "keys and containers",
    3: "scale",
    4: "calls in sequence",
    5: "time",
    6: "groups and meshes",
    7: "ties",
    8: "claims that do not hold",
    9: "side effects",
    10: "documented errors and branches",
}
_FIELD = re.compile(r"(Fault|Dimension|Functions):\s*(.*)")
_FILE = re.compile(rf"^--- ((?:a/)?(?:reference/)?){SUBJECT}/(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Patch:
    """One fault, as its file tells it."""

    name: str
    fault: str
    dimension: int
    functions: tuple[str, ...]
    diff: str
    arguments: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Patch:
        """The patch in the file; CannotPlantError where its header is not as above."""
        text = path.read_text()
        start = re.search(r"^(diff |--- )", text, re.MULTILINE)
        if start is None:
            raise CannotPlantError(f"{path.name}: holds no unified diff")
        fields: dict[str, str] = {}
        last = ""
        for line in text[: start.start()].splitlines():
            if found := _FIELD.match(line):
                last = found[1]
                fields[last] = found[2].strip()
            elif last and line[:1].isspace() and line.strip():
                fields[last] += " " + line.strip()
        dimension = fields.get("Dimension", "").split(maxsplit=1)[0:1]
        functions = tuple(re.findall(r"[A-Za-z_][\w.]*", fields.get("Functions", "")))
        if not dimension or dimension[0].rstrip(",.:") not in map(str, DIMENSIONS):
            raise CannotPlantError(f"{path.name}: expected 'Dimension:' and a number from 1 to 10")
        if not functions or not fields.get("Fault"):
            raise CannotPlantError(
                f"{path.name}: expected 'Fault:' with one sentence and 'Functions:' with names"
            )
        number = int(dimension[0].rstrip(",.:"))
        return cls(path.stem, fields["Fault"], number, functions, text[start.start() :])

    def plant(self, folder: Path) -> None:
        """Apply the patch to the copy of the package in the folder."""
        found = _FILE.search(self.diff)
        if found is None:
            raise CannotPlantError(f"{self.name}: changes no file of reference/{SUBJECT}")
        done = subprocess.run(
            ["git", "apply", "--whitespace=nowarn", f"-p{found[1].count('/')}", "-"],
            input=self.diff,
            cwd=folder,
            # Inside a repository it would leave out, without a word, files that it does not hold.
            env=os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise CannotPlantError(f"{self.name}: does not apply: {done.stderr.strip()}")

    @property
    def scope(self) -> Scope:
        """That of the modules that it changes: the set, or torch's callers of it."""
        callers = SCOPES["callers"]
        return callers if any(map(callers.has, self.files())) else SCOPES["set"]

    def choose(self, items: Mapping[str, pytest.Item]) -> list[str]:
        """The checks of the functions that it names; of a caller, all: they train and save."""
        if self.scope is SCOPES["callers"]:
            return one_of_each_first(items)
        found: list[str] = []
        for function in self.functions:
            of_it = [i for i, item in items.items() if _judges(item, function)]
            if not of_it:
                raise CannotPlantError(f"{self.name}: no check judges {function}")
            found += of_it
        return list(dict.fromkeys(found))

    def files(self) -> list[str]:
        """The files that it changes, below the package."""
        return [found[2] for found in _FILE.finditer(self.diff)]

    def lines(self) -> dict[str, set[int]]:
        """The lines of today's reference that it takes away or adds to, by file below it.

        They are asked of the planted copy: its own numbers are of the day when it was written.
        """
        return {
            file: _changed((REFERENCE / file).read_text(), text)
            for file, text in self.planted().items()
        }

    def planted(self) -> dict[str, str]:
        """The text of each file that it changes, with the fault, by file below the package."""
        with tempfile.TemporaryDirectory(prefix="shardproof-patch-") as name:
            package = Path(name) / SUBJECT
            for file in self.files():
                (package / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REFERENCE / file, package / file)
            self.plant(package.parent)
            return {file: (package / file).read_text() for file in self.files()}


def _changed(before: str, after: str) -> set[int]:
    """The lines of the first text that the second lacks, and those around what it adds."""
    lines, others = before.splitlines(), after.splitlines()
    found: set[int] = set()
    for tag, begin, end, *_ in SequenceMatcher(None, lines, others, autojunk=False).get_opcodes():
        if tag == "insert":
            found |= {begin, begin + 1}
        elif tag != "equal":
            found |= set(range(begin + 1, end + 1))
    return found


def _judges(item: pytest.Item, function: str) -> bool:
    mark = item.get_closest_marker("judges")
    return mark is not None and f".{mark.args[0]}".endswith(f".{function}")


def read_all(folder: Path) -> list[Patch]:
    """The patches of a folder, by name."""
    return [Patch.read(path) for path in sorted(folder.glob("*.patch"))]
