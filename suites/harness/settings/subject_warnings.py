"""Warnings that come out of the subject: collected, and judged by checks of their own.

The suites run with warnings as errors, so that nothing of theirs, or of the reference, goes
unseen. A subject must not fail a clause like "bit for bit" because it calls a function that torch
has announced the end of. So a warning that a rank issues is looked at where it is issued: the
innermost Python frame that is neither the standard library's nor an installed package's decides.
Where that is a frame of the subject, or there is none (a thread of torch), the warning is noted
and the call goes on; where it is the check's own, the filters hold as they stand. What torch's
compiler warns of while it reads a check's code is nobody's of these: it is shown, and the call goes
on. Filters that ignore a warning, and what the subject does with its own warnings, stay as they
are. The reference gets no such leave: it is this project's code.

A test marked `warns_of_nothing` is judged by what was noted, at the end of the run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from harness.records.verdicts import Judgement, Verdict
from harness.settings.subjects import INSTALLED_TORCH, MODULES

IMPORT = "import"
CALL = "call"
COMPILER = "compiler"
CALLERS = "exercises"
_REFERENCE = Path(__file__).parents[3] / "reference"
_LIBRARIES = tuple(
    sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
_MOST = 50
"""Different warnings that are kept of one check on one rank."""


class IssuedWarnings:
    """The warnings noted in one place: what they said, and whether an import issued them."""

    def __init__(self) -> None:
        self.texts: dict[str, bool] = {}

    def add(self, text: str, imported: bool) -> None:
        if len(self.texts) < _MOST:
            self.texts.setdefault(text, imported)

    @property
    def of_calls(self) -> list[str]:
        return [text for text, imported in self.texts.items() if not imported]


@functools.cache
def of_this_repository(root: str) -> bool:
    """Whether the subject is the reference, in this repository."""
    try:
        spec = importlib.util.find_spec(root.partition(".")[0])
    except ValueError:
        return False
    return spec is not None and Path(spec.origin or "/").is_relative_to(_REFERENCE)


class _Active:
    """Who listens, in this process."""

    def __init__(self, root: str, noted: IssuedWarnings, previous: Any) -> None:
        self.root, self.noted, self.previous = root, noted, previous
        self.modules = {f"{root}.{name}" for name in MODULES}

    def is_subjects(self, frame: FrameType) -> bool:
        name = str(frame.f_globals.get("__name__", ""))
        if name in self.modules:
            return True
        return self.root != INSTALLED_TORCH and (name + ".").startswith(self.root + ".")

    def issued_by(self, frame: FrameType | None) -> str:
        """Whose warning this frame issues: `CALL` or `IMPORT` of the subject, `COMPILER`, or "".

        It is the compiler's where torch.compile warns of the code that it reads, and the check
        called torch.compile, not the subject. Compilation may start below the subject: after a
        graph break the subject runs uncompiled, and what it calls is compiled at the call.
        """
        outermost, compiling, by_the_check, past_subject = None, False, False, False
        while frame is not None:
            if not past_subject and self.is_subjects(frame):
                outermost, by_the_check = frame, False
            elif not past_subject and not _of_a_library(frame):
                if outermost is None:
                    return COMPILER if compiling else ""
                past_subject = True
            if str(frame.f_globals.get("__name__", "")).startswith("torch._dynamo."):
                compiling |= outermost is None
                by_the_check = True
            frame = frame.f_back
        if outermost is not None and compiling and by_the_check:
            return COMPILER
        imported = outermost is not None and outermost.f_code.co_name == "<module>"
        return IMPORT if imported else CALL

    def show(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: Any = None,
        line: str | None = None,
    ) -> None:
        """Note what is the subject's; for all else, what stood in `warnings.showwarning` before."""
        origin = self.issued_by(sys._getframe(1))
        if origin in ("", COMPILER):
            self.previous(message, category, filename, lineno, file, line)
            return
        first = str(message).strip().partition("\n")[0][:300]
        where = f"{os.path.basename(filename)}:{lineno}"
        self.noted.add(f"{category.__name__}: {first} ({where})", origin == IMPORT)


_active: _Active | None = None


class _Asks(type):
    """Lets a filter look at the frame that issues a warning: filters ask for its category."""

    def __subclasscheck__(cls, category: type) -> bool:
        return _active is not None and bool(_active.issued_by(sys._getframe(1)))


class _OfTheSubject(Warning, metaclass=_Asks):
    """Stands in a filter, for every warning of the subject."""


def _of_a_library(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return file.startswith("<") or file.startswith(_LIBRARIES)


@contextlib.contextmanager
def collecting(root: str, noted: IssuedWarnings) -> Iterator[None]:
    """Note the warnings of the subject in this block, whatever thread issues them."""
    global _active
    if of_this_repository(root):
        yield
        return
    with warnings.catch_warnings():
        outer, _active = _active, _Active(root, noted, warnings.showwarning)
        warnings.showwarning = _active.show
        _add_filter()
        try:
            yield
        finally:
            _active = outer


def _add_filter() -> None:
    """Ask after what ignores a warning, and before what makes an error of it."""
    filters: Any = warnings.filters
    actions = [entry[0] for entry in filters]
    at = actions.index("error") if "error" in actions else 0
    filters.insert(at, ("always", None, _OfTheSubject, None, 0))
    # The insertion has told the interpreter nothing, which remembers what it decided; this does.
    warnings.simplefilter("default", category=_Nothing, append=True)


class _Nothing(Warning):
    """Never issued."""


def key_of(item: pytest.Item) -> str:
    """The function that a check judges; `CALLERS` for one of torch's public API."""
    mark = item.get_closest_marker("judges")
    if mark is not None:
        return str(mark.args[0])
    return CALLERS if item.get_closest_marker("exercises") else ""


class Warned:
    """What was noted in the checks of a run, by the function that they judge."""

    def __init__(self, at_import: Iterable[str]) -> None:
        self._at_import = at_import
        self._ran: dict[str, int] = {}
        self._found: dict[str, dict[str, list[str]]] = {}

    def add(self, item: pytest.Item, judgement: Judgement) -> None:
        """Take in a check that has been judged."""
        if judgement.verdict is Verdict.PRECONDITION:
            return
        key = key_of(item)
        self._ran[key] = self._ran.get(key, 0) + 1
        texts = {t: None for r in judgement.ranks for t in r.extra.get("warnings", ())}
        if texts:
            self._found.setdefault(key, {})[item.nodeid] = list(texts)

    def judge(self, item: pytest.Item) -> Judgement:
        """The verdict on a test marked `warns_of_nothing`."""
        key = key_of(item) or IMPORT
        if key == IMPORT:
            texts = list(self._at_import)
            said = f"the import warns: {texts[0]}" if texts else ""
            return Judgement(Verdict.FAIL if texts else Verdict.PASS, said, "\n".join(texts))
        if not self._ran.get(key):
            return Judgement(Verdict.PRECONDITION, "no check that calls the function was run")
        found = self._found.get(key, {})
        if not found:
            return Judgement(Verdict.PASS)
        first = next(iter(found))
        distinct = list(dict.fromkeys(text for texts in found.values() for text in texts))
        return Judgement(
            Verdict.FAIL,
            f"warnings in {len(found)} of {self._ran[key]} checks, the first: {distinct[0]}",
            "\n".join([*distinct[:20], f"first in {first}"]),
            repeat=[first],
        )

    def told(self) -> str:
        """One line on what was noted, for the end of a run; empty where nothing was."""
        checks = [texts for found in self._found.values() for texts in found.values()]
        if not checks:
            return ""
        kinds = {text for texts in checks for text in texts}
        return f"the subject warned in {len(checks)} checks, of {len(kinds)} things: " + min(kinds)
