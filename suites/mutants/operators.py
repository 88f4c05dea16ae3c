"""Automatic mutants: each place of the reference's syntax tree, changed in each of a few ways.

The operators are those of mutation testing's literature and tools (comparison, boolean and
arithmetic operators, constants, conditions, statements, arguments, returned values, jumps), and
two for this code: the context that a `with` enters, and the body of an `except`. Left out is what
a contract is silent about: texts of messages, annotations, asserts, `zip(strict=True)`, what caches
hold.
"""

from __future__ import annotations

import ast
import collections
import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mutants.judge import SUBJECT
from mutants.statements import blocks_of, is_text, sources

_COMPARISONS: Mapping[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ORDERS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_ARITHMETIC: Mapping[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.BitXor: ast.BitAnd,
}
_KEPT_CALLS = {"min", "max", "isinstance", "issubclass", "hasattr", "getattr", "setattr", "zip"}
"""Calls whose arguments are not swapped: nothing would change, or nothing would run."""
_CACHES = {"cache", "lru_cache"}
"""Calls that are left alone: how much is remembered changes nothing but the time."""
_KEPT_DECORATORS = {"cache", "lru_cache", "dataclass", "property", "overload", "setter"}
_KEPT_DECORATORS |= {"classmethod", "staticmethod"}
_ANNOTATIONS = ("annotation", "returns")
_NO_CONTEXT = '__import__("contextlib").nullcontext()'


@dataclass(frozen=True)
class Automatic:
    """One automatic mutant; its identity holds while the code around it changes."""

    file: str
    """Below reference/shardproof."""
    function: str
    operator: str
    old: str
    """The node that is replaced, as `ast.unparse` writes it."""
    new: str
    nth: int = 0
    """Which of several that are alike in one function."""
    line: int = field(default=0, compare=False)
    """Of the statement that it stands in."""
    span: tuple[int, int] = field(default=(0, 0), compare=False)
    place: tuple[int, int, int, int] = field(default=(0, 0, 0, 0), compare=False)
    """Line and column of its begin and of its end."""

    @property
    def name(self) -> str:
        """Its identity as a text."""
        nth = f" #{self.nth}" if self.nth else ""
        where = f"{self.file}:{self.function or '<module>'}"
        return f"{where} {self.operator}: {self.old} -> {self.new}{nth}"

    @property
    def key(self) -> tuple[str, ...]:
        """Its identity, the same however a version of Python writes its syntax tree as a text."""
        texts = (re.sub(r"[\s()'\",]", "", text) for text in (self.old, self.new))
        return (self.file, self.function, self.operator, *texts, str(self.nth))

    def changed(self, source: str) -> str:
        """The text of its file with the change."""
        data = source.encode()
        new = f"({self.new})" if self.operator not in OF_STATEMENTS else self.new
        return (data[: self.span[0]] + new.encode() + data[self.span[1] :]).decode()

    def plant(self, folder: Path) -> None:
        """Make the change in the copy of the package in the folder."""
        path = folder / SUBJECT / self.file
        path.write_text(self.changed(path.read_text()))


OF_STATEMENTS = frozenset({"drop statement", "return", "jump", "handler", "assignment"})


def mutants_of(file: str, source: str) -> list[Automatic]:
    """All mutants of one module, in the order of its text."""
    tree = ast.parse(source)
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def offset(line: int, column: int) -> int:
        return starts[line - 1] + column

    found: list[Automatic] = []
    seen: collections.Counter[object] = collections.Counter()
    for function, on_import, body in blocks_of(tree):
        for statement in body:
            if is_text(statement) or _is_silent(statement, function):
                continue
            for operator, node, new in _changes(statement, on_import and not function):
                if isinstance(node, ast.stmt | ast.expr) and node.end_lineno is not None:
                    begin = offset(node.lineno, node.col_offset)
                    end = offset(node.end_lineno, node.end_col_offset or 0)
                    at = node.lineno if operator == "handler" else statement.lineno
                    ends = (node.end_lineno, node.end_col_offset or 0)
                    place = (at, (begin, end), (node.lineno, node.col_offset, *ends))
                    words = (file, function, operator, ast.unparse(node), new)
                    key = Automatic(*words).key
                    found.append(Automatic(*words, seen[key], *place))
                    seen[key] += 1
    return found


def all_mutants() -> list[Automatic]:
    """All mutants of the reference."""
    return [mutant for file, text in sources().items() for mutant in mutants_of(file, text)]


def _is_silent(statement: ast.stmt, function: str) -> bool:
    """Whether nothing of the statement is mutated."""
    if isinstance(statement, ast.Import | ast.ImportFrom | ast.Assert | ast.Global | ast.Nonlocal):
        return True
    if function or not isinstance(statement, ast.Assign):
        return False
    names = {t.id for t in statement.targets if isinstance(t, ast.Name)}
    made = _called(statement.value) if isinstance(statement.value, ast.Call) else ""
    return "__all__" in names or made in {"TypeVar", "ParamSpec"}


def _called(call: ast.Call) -> str:
    return getattr(call.func, "id", "") or getattr(call.func, "attr", "")


_Change = tuple[str, ast.AST, str]
"""The operator, the node that it replaces, and the new text."""


def _changes(statement: ast.stmt, at_the_top: bool) -> Iterator[_Change]:
    """The changes of one statement, without those of the statements inside it."""
    yield from _of_statement(statement)
    alias = at_the_top and isinstance(getattr(statement, "value", None), ast.BinOp)
    if not isinstance(statement, ast.Raise) and not alias:
        yield from _inside(statement)


def _inside(node: ast.AST) -> Iterator[_Change]:
    for name, value in ast.iter_fields(node):
        if name in _ANNOTATIONS:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.ExceptHandler | ast.match_case):
                continue
            if isinstance(child, ast.keyword) and child.arg == "strict":
                continue
            if isinstance(child, ast.AST) and not isinstance(child, ast.stmt | ast.JoinedStr):
                if name == "decorator_list":
                    yield from _of_decorator(child)
                    continue
                if isinstance(child, ast.Call) and _called(child) in {"warn", *_CACHES}:
                    continue
                yield from _of_expression(child)
                yield from _inside(child)


def _of_statement(node: ast.stmt) -> Iterator[_Change]:
    match node:
        case ast.Expr(value=ast.Call() | ast.Await()) | ast.Delete() | ast.Raise():
            yield "drop statement", node, "pass"
        case ast.AugAssign(op=op):
            yield "drop statement", node, "pass"
            if type(op) in _ARITHMETIC:
                yield "assignment", node, _with(node, op=_ARITHMETIC[type(op)]())
        case ast.Assign(targets=targets, value=value):
            used = {n.id for n in ast.walk(value) if isinstance(n, ast.Name)}
            own = any(isinstance(t, ast.Name) and t.id in used for t in targets)
            if own or any(isinstance(t, ast.Attribute | ast.Subscript) for t in targets):
                yield "drop statement", node, "pass"
        # None for False is as false, and what returns True instead is another mutant.
        case ast.Return(value=value) if value and not _is_none(value) and not _is_false(value):
            yield "return", node, "return None"
        case ast.Break():
            yield "jump", node, "continue"
        case ast.Continue():
            yield "jump", node, "break"
        case ast.If(test=test) | ast.While(test=test):
            yield from _of_condition(test, force_true=isinstance(node, ast.If))
        case ast.With(items=items):
            for item in items:
                if item.optional_vars is None:
                    yield "context", item.context_expr, _NO_CONTEXT
        case ast.Try(handlers=handlers):
            for handler in handlers:
                if not isinstance(handler.body[0], ast.Raise):
                    yield "handler", handler.body[0], "raise"


def _of_condition(test: ast.expr, *, force_true: bool = True) -> Iterator[_Change]:
    if isinstance(test, ast.Constant):
        return
    negated = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
    flipped = isinstance(test, ast.Compare) and not isinstance(test.ops[0], ORDERS)
    if not negated and not flipped:  # those are mutants of the expression already
        yield "condition", test, f"not ({ast.unparse(test)})"
    if force_true:
        yield "condition", test, "True"
    yield "condition", test, "False"


def _of_expression(node: ast.AST) -> Iterator[_Change]:
    match node:
        case ast.Compare(ops=ops):
            for place, op in enumerate(ops):
                changed = [*ops[:place], _COMPARISONS[type(op)](), *ops[place + 1 :]]
                yield "comparison", node, _with(node, ops=changed)
        case ast.BoolOp(op=op):
            other = ast.Or() if isinstance(op, ast.And) else ast.And()
            yield "boolean", node, _with(node, op=other)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield "unary", node, ast.unparse(operand)
        case ast.BinOp(op=op, left=left, right=right):
            if type(op) in _ARITHMETIC and not (_is_string(left) or _is_string(right)):
                yield "arithmetic", node, _with(node, op=_ARITHMETIC[type(op)]())
        case ast.Constant(value=bool(value)):
            yield "constant", node, str(not value)
        case ast.Constant(value=int(value)) | ast.Constant(value=float(value)):
            yield "constant", node, str(value + 1)
        case ast.Constant(value=str(value)) if value.isidentifier():
            yield "constant", node, repr(value + "_")
        case ast.IfExp(test=test):
            yield from _of_condition(test)
        case ast.comprehension(ifs=tests):
            for test in tests:
                yield from _of_condition(test)
        case ast.Call():
            yield from _of_call(node)


def _of_call(node: ast.Call) -> Iterator[_Change]:
    args, keywords, name = node.args, node.keywords, _called(node)
    for place, keyword in enumerate(keywords):
        if keyword.arg not in {None, "strict"}:
            rest = [*keywords[:place], *keywords[place + 1 :]]
            yield "drop argument", node, _with(node, keywords=rest)
    if len(args) < 2 or any(isinstance(a, ast.Starred) for a in args):
        return
    yield "drop argument", node, _with(node, args=args[:-1])
    if name not in _KEPT_CALLS:
        yield "swap arguments", node, _with(node, args=[args[1], args[0], *args[2:]])


def _of_decorator(node: ast.AST) -> Iterator[_Change]:
    name = _called(node) if isinstance(node, ast.Call) else ast.unparse(node).rpartition(".")[2]
    if name not in _KEPT_DECORATORS:
        yield "decorator", node, "lambda found: found"


def _with(node: ast.AST, **fields: object) -> str:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return ast.unparse(changed)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _is_string(node: ast.expr) -> bool:
    constant = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return constant or isinstance(node, ast.JoinedStr)
