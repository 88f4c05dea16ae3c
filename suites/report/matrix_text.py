"""The matrix of functions by laws as lines of text: in full where it fits, else shortened."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator

from report.laws import LAWS
from report.matrix import NOT_RUN, Cell, Rows

_COLUMN = 10
_NARROW = 5
_LETTERS = 3
_NO_LAW = "no law"

Paint = Callable[[str, str], str]
"""Colours a text by the state of a cell, or as a title."""


def matrix_lines(found: dict[str, Rows], width: int, paint: Paint) -> Iterator[str]:
    """The tables of all modules, and what the signs mean."""
    # A run may hold checks of laws that the contract does not name; they are shown, too.
    extra = {law for rows in found.values() for cells in rows.values() for law in cells} - set(LAWS)
    laws = [*LAWS, *sorted(extra)]
    names = [*found, *(function for rows in found.values() for function in rows)]
    longest = max(map(len, names)) + 1
    if longest + sum(map(_column, laws)) <= width:
        yield from _in_full(found, laws, longest, paint)
    else:
        yield from _shortened(found, laws, width, paint)


def _in_full(found: dict[str, Rows], laws: list[str], longest: int, paint: Paint) -> Iterator[str]:
    for module, rows in found.items():
        heads = "".join((law or _NO_LAW).rjust(_column(law)) for law in laws)
        yield paint(module.ljust(longest), "title") + heads
        for function, cells in rows.items():
            yield function.ljust(longest) + "".join(
                paint(str(cell).rjust(_column(law)), cell.state)
                for law in laws
                for cell in [cells.get(law, Cell())]
            )
        yield ""
    yield (
        "✓ n  all n checks hold    x h/n  known failures: h of n hold    "
        "✗ h/n  unexpected    ? some not run    · no check"
    )


def _column(law: str) -> int:
    return max(_COLUMN, len(law or _NO_LAW) + 1)


def _shortened(found: dict[str, Rows], laws: list[str], width: int, paint: Paint) -> Iterator[str]:
    """How many checks of each cell fail, below the first letters of its law."""
    room = width - _NARROW * len(laws)
    heads = "".join((law or "-")[:_LETTERS].rjust(_NARROW) for law in laws)
    for module, rows in found.items():
        if len(module) < room:
            yield paint(module.ljust(room), "title") + heads
        else:
            yield paint(module, "title")
            yield " " * room + heads
        for function, cells in rows.items():
            if len(function) >= room:
                yield function
                function = ""
            yield function.ljust(room) + "".join(
                paint(_short(cell).rjust(_NARROW), cell.state)
                for law in laws
                for cell in [cells.get(law, Cell())]
            )
        yield ""
    yield from textwrap.wrap(
        ", ".join(f"{law[:_LETTERS] or '-'} {law or _NO_LAW}" for law in laws), width
    )
    signs = "✓ all hold   xN N known failures   ✗N N unexpected   ? some not run   · no check"
    yield from textwrap.wrap(signs, width)


def _short(cell: Cell) -> str:
    unrun = sum(cell.verdicts[v] for v in NOT_RUN)
    mark = str(cell)[0]
    failed = cell.total - cell.held - unrun
    if cell.state == "unexpected":
        failed -= cell.verdicts["xfail"]
    count = str(failed or "")
    return mark + count + ("?" if unrun and mark != "?" else "")
