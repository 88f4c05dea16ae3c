"""Which check executes which statement of the reference, measured once and kept in a file.

A copy of the reference says of each statement that it is about to run, in memory that the parent
shares with all ranks: that holds for threads of autograd and for ranks that are killed, and costs
no file and no tracer. What was measured of a check holds while the reference and the check's own
source stay as they were.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mutants import marks
from mutants.judge import REFERENCE, ROOT, SUBJECT, SUITE, Judge, path_of

FOLDER = ROOT / "out" / "mutation"
_SAVE_EVERY = 100
_IMPORT = "<import>"
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
    """The text of each module of the reference, by its path, as it was when first asked for."""
    found = sorted(REFERENCE.rglob("*.py"))
    return {str(path.relative_to(REFERENCE)): path.read_text() for path in found}


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
        if not _unmarked(s)
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


def _unmarked(statement: ast.stmt) -> bool:
    future = isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
    return future or is_text(statement)


def plant_marks(folder: Path) -> None:
    """Let each statement of the copy say that it runs."""
    number = 0
    for file, text in sources().items():
        tree = ast.parse(text)
        for _, _, body in list(blocks_of(tree)):
            marked: list[ast.stmt] = []
            for statement in body:
                if not _unmarked(statement):
                    marked += ast.parse(f"__mark__({number})").body
                    number += 1
                marked.append(statement)
            body[:] = marked
        start = sum(1 for _ in itertools.takewhile(_unmarked, tree.body))
        tree.body[start:start] = ast.parse("from mutants.marks import mark as __mark__").body
        (folder / SUBJECT / file).write_text(ast.unparse(tree))
    assert number == len(statements()) <= marks.MOST, (
        f"{number} statements, {len(statements())} known"
    )


def _taken() -> dict[str, Any]:
    return {"executed": f"{marks.taken():x}"}


@dataclass
class Ran:
    """What was measured of one check."""

    source: str
    """A digest of what the check consists of."""
    seconds: float
    verdict: str
    executed: str
    """Hexadecimal, a bit for each statement."""

    @functools.cached_property
    def bits(self) -> int:
        return int(self.executed, 16)


@dataclass
class Executed:
    """What each check executes."""

    path: Path
    checks: dict[str, Ran] = field(default_factory=dict)
    on_import: str = "0"
    """What the import of the reference executes, as in Ran."""

    @classmethod
    def read(cls, folder: Path = FOLDER) -> Executed:
        """What was measured of the reference of today, perhaps nothing."""
        path = folder / f"executed-{digest_of_the_reference()}.json"
        data = json.loads(path.read_text()) if path.exists() else {}
        on_import = data.pop(_IMPORT, "0")
        return cls(path, {check: Ran(**ran) for check, ran in data.items()}, on_import)

    def write(self) -> None:
        """Keep it; the file is whole at every moment."""
        path = self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        step = path.with_suffix(".part")
        data: dict[str, Any] = {c: dataclasses.asdict(ran) for c, ran in self.checks.items()}
        data[_IMPORT] = self.on_import
        step.write_text(json.dumps(data) + "\n")
        step.replace(path)

    def measure(self, judge: Judge, say: Callable[[int, int], None]) -> None:
        """Run the checks that have not been seen to pass, and forget those that are gone."""
        digests = {check: _digest(check.partition("::")[0]) for check in judge.items}
        self.checks = {
            check: ran
            for check, ran in self.checks.items()
            if digests.get(check) == ran.source and ran.verdict in {"pass", "precondition"}
        }
        missing = [check for check in judge.items if check not in self.checks]
        judge.after_check = _taken
        try:
            with marks.in_a_file():
                self._take(judge, missing, digests, say)
        finally:
            judge.after_check = dict
            self.write()

    def _take(
        self,
        judge: Judge,
        missing: list[str],
        digests: dict[str, str],
        say: Callable[[int, int], None],
    ) -> None:
        for done, word in enumerate(judge.run(plant_marks, missing, to_the_end=True)):
            if reason := word.get("broken") or word.get("import") or word.get("silent"):
                raise RuntimeError(f"the checks could not be measured: {reason}")
            if "on_import" in word:
                self.on_import = word["on_import"]["executed"]
            if "check" in word:
                self.checks[word["check"]] = Ran(
                    digests[word["check"]], word["seconds"], word["verdict"], word["executed"]
                )
            if done % _SAVE_EVERY == 0:
                self.write()
                say(done, len(missing))

    def checks_of(self, numbers: Iterable[int]) -> list[str]:
        """The checks that execute one of the statements, those first that are likely to tell.

        These are the ones of which the functions around the statements are the greatest part, for
        their time.
        """
        every = statements()
        wanted = sum(1 << n for n in set(numbers))
        around = {(every[n].file, every[n].function) for n in numbers}
        near = sum(1 << n for n, s in enumerate(every) if (s.file, s.function) in around)
        found = [c for c, ran in self.checks.items() if ran.bits & wanted]

        def worth(check: str) -> float:
            ran = self.checks[check]
            return (ran.bits & near).bit_count() / ran.bits.bit_count() / (0.1 + ran.seconds)

        return one_of_each_first(sorted(found, key=worth, reverse=True))

    def unexecuted(self) -> list[Statement]:
        """The statements that neither a check nor the import executes."""
        union = int(self.on_import, 16) | self._executed()
        return [s for n, s in enumerate(statements()) if not s.imported and not union >> n & 1]

    def _executed(self) -> int:
        union = 0
        for ran in self.checks.values():
            union |= ran.bits
        return union

    def users_of(self, number: int) -> set[int]:
        """The statements that checks run where they depend on this one.

        Itself, or where it runs on import only: those that use a name that it binds, or one that is
        bound with the help of such a name; and all that is inside of it, where it is a function or
        a class.
        """
        every = statements()
        here = every[number]
        early = (int(self.on_import, 16) & ~self._executed()) >> number & 1
        if not here.imported and not early:
            return {number}
        names: set[str] = set()
        new = set(here.bound) if here.imported else {here.function.rpartition(".")[2]}
        found: set[int] = set()
        while new:
            names |= new
            found |= {n for n, s in enumerate(every) if s.used & new}
            new = {name for n in found if every[n].imported for name in every[n].bound} - names
        if here.imported and (inside := here.defines or here.function):
            found |= {
                n
                for n, s in enumerate(every)
                if s.file == here.file and f"{s.function}.".startswith(f"{inside}.")
            }
        return {n for n in found if not every[n].imported}


def one_of_each_first(checks: Iterable[str]) -> list[str]:
    """One variant of each check before the second of any, for they mostly agree."""
    seen: collections.Counter[str] = collections.Counter()
    order: dict[str, int] = {}
    for check in checks:
        family = check.partition("[")[0]
        order[check] = seen[family]
        seen[family] += 1
    return sorted(order, key=lambda c: order[c])


@functools.cache
def _digest(file: str) -> str:
    """Of a file of checks and of what all checks share."""
    suite = ROOT / SUITE
    parts = [path_of(file), suite / "conftest.py", *sorted((suite / "kit").glob("*.py"))]
    return hashlib.sha256(b"".join(p.read_bytes() for p in parts)).hexdigest()[:16]


def numbers_at(lines: dict[str, set[int]]) -> set[int]:
    """The innermost statements that the lines are part of, by file."""
    found = set()
    for file, of_it in lines.items():
        here = [(s.line, s.end, n) for n, s in enumerate(statements()) if s.file == file]
        for line in of_it:
            found |= {max([p for p in here if p[0] <= line <= p[1]], default=(0, 0, -1))[2]}
    return found - {-1}
