"""Which modules of this repository import which, read from their sources."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = (ROOT / "reference", ROOT / "suites")

Graph = Mapping[str, frozenset[str]]
"""Module to the modules of this repository that it imports."""


def module_of(path: Path) -> str | None:
    """The dotted name of a file's module; None for a file that is no module of this repository."""
    for top in SOURCES:
        if path.suffix == ".py" and path.is_relative_to(top):
            parts = path.relative_to(top).with_suffix("").parts
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return None


def modules() -> dict[str, Path]:
    """All modules, by their dotted names."""
    files = (path for top in SOURCES for path in sorted(top.rglob("*.py")))
    return {name: path for path in files if (name := module_of(path)) is not None}


@functools.cache
def graph() -> Graph:
    """What each module imports, at its top or within a function."""
    known = modules()
    return {name: frozenset(_imported(name, path, known)) for name, path in known.items()}


def _imported(name: str, path: Path, known: Mapping[str, Path]) -> Iterable[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                # `from package import module` needs the module; a name needs the module it is in.
                whole = f"{node.module}.{alias.name}"
                target = whole if whole in known else node.module
                if target in known and target != name:
                    yield target


def importers(changed: Iterable[str], imports: Graph) -> frozenset[str]:
    """The changed modules, and all that import one of them, directly or through others."""
    found, left = set(changed), set(changed)
    while left:
        left = {m for m, targets in imports.items() if m not in found and targets & left}
        found |= left
    return frozenset(found)
