"""Automatic mutants: what is changed, what is left alone, and names that hold."""

from __future__ import annotations

import argparse
import ast
import collections

import pytest

from mutants import mutation
from mutants.operators import Automatic, all_mutants, mutants_of
from mutants.statements import sources


def _changes(source: str) -> set[str]:
    return {f"{m.operator}: {m.changed(source)}" for m in mutants_of("some.py", source)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a < b\n", {"comparison: (a <= b)\n"}),
        ("x = a and b\n", {"boolean: x = (a or b)\n"}),
        ("x = not a\n", {"unary: x = (a)\n"}),
        ("x = 'é' if 2 else b + c\n", {"constant: x = 'é' if (3) else b + c\n"}),
        ("x += 1\n", {"drop statement: pass\n", "assignment: x -= 1\n"}),
        ("f(a, b)\n", {"drop argument: (f(a))\n", "swap arguments: (f(b, a))\n"}),
        ("f(a, key=b)\n", {"drop argument: (f(a))\n", "drop statement: pass\n"}),
        ("def f():\n    return x\n", {"return: def f():\n    return None\n"}),
        ("for x in y:\n    break\n", {"jump: for x in y:\n    continue\n"}),
        (
            "with a:\n    pass\n",
            {'context: with (__import__("contextlib").nullcontext()):\n    pass\n'},
        ),
        (
            "if a:\n    pass\n",
            {f"condition: if ({new}):\n    pass\n" for new in ("not (a)", "True", "False")},
        ),
        (
            "try:\n    f()\nexcept E:\n    pass\n",
            {"handler: try:\n    f()\nexcept E:\n    raise\n"},
        ),
    ],
)
def test_each_operator_changes_what_it_says(source: str, expected: set[str]) -> None:
    assert expected <= _changes(source)


@pytest.mark.parametrize(
    "source",
    [
        '"""A text."""\n',
        "import a\n",
        "x: Literal[1]\n",
        "X = A | B\n",
        '__all__ = ["a"]\n',
        "assert a < 1\n",
        'raise E(f"{a + 1}") from None\n',
        'x = f"{a + 1}"\n',
        "zip(a, b, strict=True)\n",
        "x = lru_cache(maxsize=1)(f)\n",
    ],
)
def test_what_a_contract_is_silent_about_is_left_alone(source: str) -> None:
    changes = [m for m in mutants_of("some.py", source) if m.operator != "drop statement"]
    assert [m.new for m in changes] == (["zip(a, strict=True)"] if "zip" in source else [])


def test_a_name_holds_while_lines_move_and_functions_come() -> None:
    source = "def f(a):\n    return a < 1\n\n\ndef g(a):\n    return (a < 1, a < 1)\n"
    later = "import x\n\n\n" + source.replace("a < 1\n", "(a\n            < 1)\n")
    before = {m.key for m in mutants_of("some.py", source)}
    assert before == {m.key for m in mutants_of("some.py", later)}
    assert {m.nth for m in mutants_of("some.py", source) if m.operator == "comparison"} == {0, 1}


def test_mutants_of_the_reference_are_told_apart_and_compile() -> None:
    mutants = all_mutants()
    assert len({m.key for m in mutants}) == len(mutants) > 5000
    texts = sources()
    for mutant in mutants[::97]:
        changed = mutant.changed(texts[mutant.file])
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(texts[mutant.file])), mutant.name


def _chosen(**options: object) -> list[Automatic]:
    every = {"module": None, "shard": None, "sample": None, "each": None, "seed": 0}
    return mutation.chosen_of(all_mutants(), argparse.Namespace(**(every | options)))


def test_shards_are_the_whole_and_a_sample_is_the_same_each_time() -> None:
    shards = [_chosen(shard=(k, 3)) for k in (1, 2, 3)]
    assert sorted(m.name for s in shards for m in s) == sorted(m.name for m in all_mutants())
    assert _chosen(sample=20) == _chosen(sample=20) != _chosen(sample=20, seed=1)
    two = _chosen(each=2)
    assert two == _chosen(each=2) != _chosen(each=2, seed=1)
    assert set(collections.Counter(m.file for m in two).values()) == {2}
    assert two[: len(two) // 2] == _chosen(each=1)
    assert {m.file for m in _chosen(module=["fsdp/boxes.py"])} == {"tensor/parallel/fsdp/boxes.py"}
