"""Each package lists its modules in its docstring, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parents[2] / "reference" / "shardproof"
PACKAGES = sorted(path.parent for path in REFERENCE.rglob("__init__.py"))
_LISTED = re.compile(r"^- ``(\w+)``: \S", re.MULTILINE)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: str(p.relative_to(REFERENCE.parent)))
def test_a_package_lists_its_modules(package: Path) -> None:
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    modules |= {path.parent.name for path in package.glob("*/__init__.py")}
    listed = _LISTED.findall(docstring)
    assert sorted(listed) == sorted(modules), (
        f"{package.relative_to(REFERENCE.parents[1])}/__init__.py: expected a line "
        "'- ``module``: what is in it' for each module, in reading order"
    )


SUITES = Path(__file__).parents[1]
_IN_A_TABLE = re.compile(r"^(?: {4})?(\w+)/? {2,}\S", re.MULTILINE)
MAPPED = [
    SUITES / "harness",
    *sorted(path.parent for path in (SUITES / "harness").glob("*/__init__.py")),
    SUITES / "benchmarks" / "run",
    SUITES / "benchmarks" / "results",
    SUITES / "quick",
    SUITES / "report",
    SUITES / "report" / "html",
    SUITES / "report" / "browser",
]


@pytest.mark.parametrize("package", MAPPED, ids=lambda p: str(p.relative_to(SUITES)))
def test_a_package_of_the_suites_lists_its_modules(package: Path) -> None:
    docstring = (
        ast.get_docstring(ast.parse((package / "__init__.py").read_text()), clean=False) or ""
    )
    own = {path.stem for path in package.glob("*.py") if not path.name.startswith("test_")}
    own |= {path.parent.name for path in package.glob("*/__init__.py")}
    listed = set(_IN_A_TABLE.findall(docstring))
    own, listed = own - {"__init__", "__main__"}, listed - {"__main__"}
    assert listed == own, f"{package.relative_to(SUITES)}/__init__.py lists other modules"
