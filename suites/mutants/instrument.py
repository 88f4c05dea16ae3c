"""A copy of the reference that says which statements run, and which mutants could be told.

Most mutants compute what the code computes, most of the time: `a < b` and `a <= b` differ where a
equals b, `if a` and `if False` where a is true. So a mutant has a mark of its own, which is set
where its place is evaluated and the two differ; a check that never sets it cannot catch the mutant.
Where that cannot be seen without running the mutant, the mark says that its place is evaluated.
"""

from __future__ import annotations

import ast
import copy
import functools
import itertools
from collections.abc import Mapping
from pathlib import Path

from mutants import marks
from mutants.judge import SUBJECT
from mutants.operators import OF_STATEMENTS, ORDERS, Automatic, all_mutants
from mutants.statements import blocks_of, is_unmarked, sources, statements

_PURE = (ast.Name, ast.Attribute, ast.Constant, ast.BinOp, ast.operator, ast.Load)


@functools.cache
def marks_of_mutants() -> dict[Automatic, int]:
    """The number of each mutant's mark: its own, or that of the statement that it stands in."""
    numbers = {(s.file, s.line): n for n, s in enumerate(statements())}
    own = itertools.count(len(statements()))
    found = {}
    for mutant in all_mutants():
        number = numbers[mutant.file, mutant.line]
        whole = mutant.operator in OF_STATEMENTS or statements()[number].imported
        found[mutant] = number if whole else next(own)
    return found


def plant_marks(folder: Path) -> None:
    """Let each statement of the copy say that it runs, and each mutant that it would be another."""
    assert max(marks_of_mutants().values()) < marks.MOST
    number = 0
    for file, text in sources().items():
        tree = ast.parse(text)
        own = {m: mark for m, mark in marks_of_mutants().items() if mark >= len(statements())}
        blocks = list(blocks_of(tree))
        mark_mutants(tree, {m: mark for m, mark in own.items() if m.file == file})
        for _, _, body in blocks:
            marked: list[ast.stmt] = []
            for statement in body:
                if not is_unmarked(statement):
                    marked.append(ast.Expr(_mark([number])))
                    number += 1
                marked.append(statement)
            body[:] = marked
        start = sum(1 for _ in itertools.takewhile(is_unmarked, tree.body))
        tree.body[start:start] = ast.parse("from mutants.marks import mark as __mark__").body
        (folder / SUBJECT / file).write_text(ast.unparse(ast.fix_missing_locations(tree)))
    assert number == len(statements()), f"{number} statements, {len(statements())} known"


def mark_mutants(tree: ast.Module, numbers: Mapping[Automatic, int]) -> None:
    """Put the marks of these mutants around the expressions of the tree that they change."""
    of_place: dict[tuple[int, ...], dict[Automatic, int]] = {}
    for mutant, number in numbers.items():
        of_place.setdefault(mutant.place, {})[mutant] = number
    _Marked(of_place).visit(tree)
    assert not of_place, f"no place for {next(iter(next(iter(of_place.values())))).name}"


class _Marked(ast.NodeTransformer):
    def __init__(self, of_place: dict[tuple[int, ...], dict[Automatic, int]]) -> None:
        self._of_place = of_place

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.JoinedStr):  # no mutant is inside, nor do its places tell
            return node
        mutants: dict[Automatic, int] = {}
        if isinstance(node, ast.expr) and node.end_lineno and node.end_col_offset is not None:
            end = (node.end_lineno, node.end_col_offset)
            mutants = self._of_place.pop((node.lineno, node.col_offset, *end), {})
        changed = self.generic_visit(node)
        if mutants and isinstance(changed, ast.expr):
            return _with_marks(changed, mutants)
        return changed


def _mark(numbers: list[int]) -> ast.Call:
    return ast.Call(ast.Name("__mark__", ast.Load()), [ast.Constant(n) for n in numbers], [])


def _after(first: ast.expr, node: ast.expr) -> ast.expr:
    both = ast.Tuple([first, node], ast.Load())
    return ast.Subscript(both, ast.Constant(1), ast.Load())


def _with_marks(node: ast.expr, mutants: Mapping[Automatic, int]) -> ast.expr:
    tested = any(m.operator == "condition" for m in mutants)
    evaluated: list[int] = []
    true: list[int] = []
    false: list[int] = []
    told = node
    for mutant, mark in mutants.items():
        match mutant.operator, mutant.new:
            case "condition", "True":
                false.append(mark)
            case "condition", "False":
                true.append(mark)
            case "boolean", _ if tested and isinstance(node, ast.BoolOp):
                # `a and b` is true where both are, and then `a or b` is, too.
                (false if isinstance(node.op, ast.And) else true).append(mark)
            case "comparison", _ if isinstance(node, ast.Compare) and _is_order(node):
                equal = ast.Compare(node.left, [ast.Eq()], node.comparators)
                seen = ast.IfExp(copy.deepcopy(equal), _mark([mark]), ast.Constant(None))
                told = _after(seen, told)
            case _:
                evaluated.append(mark)
    if evaluated:
        told = _after(_mark(evaluated), told)
    if true or false:
        yes = _after(_mark(true), ast.Constant(True))
        no = _after(_mark(false), ast.Constant(False))
        told = ast.IfExp(told, yes, no)
    return told


def _is_order(node: ast.Compare) -> bool:
    """Whether it is an order of two values that can be compared a second time."""
    if len(node.ops) > 1 or not isinstance(node.ops[0], ORDERS):
        return False
    parts = [p for side in (node.left, *node.comparators) for p in ast.walk(side)]
    return all(isinstance(p, _PURE) for p in parts)
