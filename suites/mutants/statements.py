"""The statements of the reference, and which of them a line of its text is part of."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mutants.judge import REFERENCE
from mutants.scope import current

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Statement:
    """A statement of the reference."""

    file: str
    """Below reference/shardproof."""
    line: int
    end: int
    """Its last line."""
    function: str
    """Its qualified name; empty at the top of the module."""
    imported: bool
    """Whether it runs when the module is imported, and in no check."""
    text: str
    """Its first line."""
    defines: str
    """The qualified name of the function or class that it defines."""
    bound: frozenset[str]
    used: frozenset[str]


@functools.cache
def sources() -> dict[str, str]:
    """The text of each module of the scope, by its path, as it was when first asked for."""
    found = {str(path.relative_to(REFERENCE)): path for path in sorted(REFERENCE.rglob("*.py"))}
    return {file: path.read_text() for file, path in found.items() if current().has(file)}


@functools.cache
def digest_of_the_reference() -> str:
    """Of its syntax: comments and the places of lines change nothing that runs."""
    trees = [(file, ast.dump(ast.parse(text))) for file, text in sources().items()]
    return hashlib.sha256(repr(trees).encode()).hexdigest()[:16]


def _bodies(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        body = getattr(node, name, None)
        if isinstance(body, list) and body and isinstance(body[0], ast.stmt):
            yield body
    for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
        yield from _bodies(part)


def is_text(statement: ast.stmt) -> bool:
    """Whether the statement is a docstring, or the like."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def blocks_of(tree: ast.Module) -> Iterator[tuple[str, bool, list[ast.stmt]]]:
    """Each list of statements, with its function and whether it runs on import."""

    def walk(node: ast.AST, path: str, on_import: bool) -> Iterator[Any]:
        for body in _bodies(node):
            yield path, on_import, body
            for statement in body:
                name, inside = path, on_import
                if isinstance(statement, _DEFINITIONS):
                    name = f"{path}.{statement.name}".lstrip(".")
                    inside = on_import and isinstance(statement, ast.ClassDef)
                yield from walk(statement, name, inside)

    yield from walk(tree, "", True)


@functools.cache
def statements() -> tuple[Statement, ...]:
    """All statements of the reference that can be marked; their places are their numbers."""
    return tuple(
        Statement(
            file,
            s.lineno,
            s.end_lineno or s.lineno,
            function,
            imported,
            ast.unparse(s).partition("\n")[0],
            f"{function}.{s.name}".lstrip(".") if isinstance(s, _DEFINITIONS) else "",
            *_names(s, function if imported else ""),
        )
        for file, text in sources().items()
        for function, imported, body in blocks_of(ast.parse(text))
        for s in body
        if not is_unmarked(s)
    )


def _names(statement: ast.stmt, of_class: str) -> tuple[frozenset[str], frozenset[str]]:
    """The names that a statement of a module or class binds, and those that it uses."""
    bound = {of_class.rpartition(".")[2]} - {""}
    if isinstance(statement, _DEFINITIONS):
        bound.add(statement.name)
    used: set[str] = set()
    parts: list[ast.AST] = [statement]
    while parts:
        for child in ast.iter_child_nodes(parts.pop()):
            if isinstance(child, ast.stmt):
                continue
            parts.append(child)
            if isinstance(child, ast.Name):
                (bound if isinstance(child.ctx, ast.Store) else used).add(child.id)
            elif isinstance(child, ast.Attribute):
                used.add(child.attr)
    return frozenset(bound), frozenset(used)


def is_unmarked(statement: ast.stmt) -> bool:
    """Whether nothing can stand before it, or it is a docstring."""
    future = isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
    return future or is_text(statement)


def numbers_at(lines: dict[str, set[int]]) -> set[int]:
    """The innermost statements that the lines are part of, by file.

    A line outside of all, as a decorator's, is part of the statement that follows.
    """
    found = set()
    for file, of_it in lines.items():
        here = [(s.line, s.end, n) for n, s in enumerate(statements()) if s.file == file]
        for line in of_it:
            around = [p for p in here if p[0] <= line <= p[1]]
            after = [p for p in here if p[0] > line]
            if around or after:
                found.add(max(around)[2] if around else min(after)[2])
    return found
