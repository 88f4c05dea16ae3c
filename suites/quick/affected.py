"""From changed files to the functions and the test files that depend on them."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from quick.imports import graph, importers, module_of, modules

_TWINS = ("shardproof._state_dict_utils", "shardproof.tensor.parallel")


@dataclass(frozen=True)
class Affected:
    """What a change reaches."""

    functions: frozenset[str]
    """Of the contract, as checks name them: `_state_dict_utils._gather_state_dict`."""
    tests: tuple[Path, ...]
    """Files of tests that changed, or that import what changed."""
    unknown: tuple[Path, ...]
    """Changed files that no check depends on by an import: pages, data, commands."""


def affected_by(changed: Iterable[Path]) -> Affected:
    """What the changed files reach through imports; paths are absolute."""
    known = modules()
    names = {path: module_of(path) for path in changed}
    reached = importers([n for n in names.values() if n in known], graph())
    functions = frozenset(
        f"{twin.removeprefix('shardproof.')}.{function}"
        for module in reached
        for twin in _TWINS
        if module.startswith(twin)
        for function in _functions_of(known[module], module, twin)
    )
    tests = (known[m] for m in sorted(reached) if known[m].name.startswith("test_"))
    return Affected(
        functions,
        tuple(tests),
        tuple(path for path, name in names.items() if name not in known),
    )


def _functions_of(path: Path, module: str, twin: str) -> Iterable[str]:
    """The functions and classes that the file defines, below the twin of upstream's file."""
    inner = module.removeprefix(twin).strip(".").partition(".")[0]
    # Upstream has files in a package there, and a package that is one file here.
    prefix = f"{inner}." if twin.endswith("parallel") and inner else ""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name
