"""A check can tell a mutant only where what the mutant changes computes something else."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from mutants.instrument import mark_mutants, plant_marks
from mutants.judge import SUBJECT
from mutants.operators import OF_STATEMENTS, mutants_of
from mutants.statements import sources


def _told(source: str, **values: Any) -> set[str]:
    """The mutants of the source whose marks are set when it runs."""
    mutants = [m for m in mutants_of("some.py", source) if m.operator not in OF_STATEMENTS]
    tree = ast.parse(source)
    mark_mutants(tree, {m: n for n, m in enumerate(mutants)})
    seen: set[int] = set()
    code = compile(ast.unparse(ast.fix_missing_locations(tree)), "some.py", "exec")
    exec(code, {**values, "__mark__": lambda *numbers: seen.update(numbers)})
    return {m.new for n, m in enumerate(mutants) if n in seen}


@pytest.mark.parametrize(
    ("source", "values", "told"),
    [
        ("if a < b: pass", {"a": 1, "b": 2}, {"not (a < b)", "False"}),
        ("if a < b: pass", {"a": 2, "b": 1}, {"not (a < b)", "True"}),
        ("x = a < b", {"a": 2, "b": 1}, set()),
        ("x = a < b", {"a": 1, "b": 1}, {"a <= b"}),
        ("x = abs(a) < b", {"a": 2, "b": 1}, {"abs(a) <= b"}),
        ("if a and b: pass", {"a": 1, "b": 1}, {"not (a and b)", "False"}),
        ("if a and b: pass", {"a": 0, "b": 1}, {"not (a and b)", "True", "a or b"}),
        ("x = [1 for x in a if x]", {"a": [0]}, {"not (x)", "True"}),
        ("x = a and f'{1 + a}'", {"a": 1}, {"a or f'{1 + a}'"}),
        ("x = 1 if a else 2", {"a": 1}, {"not (a)", "False", "2"}),
    ],
)
def test_what_computes_the_same_is_not_told(
    source: str, values: dict[str, Any], told: set[str]
) -> None:
    assert _told(source, **values) == told


@pytest.mark.thorough
def test_the_whole_reference_can_be_marked(tmp_path: Path) -> None:
    for file in sources():
        (tmp_path / SUBJECT / file).parent.mkdir(parents=True, exist_ok=True)
    plant_marks(tmp_path)
    for file in sources():
        compile((tmp_path / SUBJECT / file).read_text(), file, "exec")
