"""Many cheap cases in one check: all of them are tried, and those that fail are named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import pytest

from harness.rank.reporter import assertion_of

Case = TypeVar("Case")


def each(cases: Iterable[Case], body: Callable[[Case], Any]) -> None:
    """Call `body` with each case; an AssertionError lists the cases that failed, and why.

    For checks on one rank: on several, a case that fails on one rank alone would tear them apart.
    """
    total, failed = 0, []
    for case in cases:
        total += 1
        try:
            body(case)
        except Exception as error:
            text = str(error).strip().partition("\nassert ")[0]
            text = text.partition("\n")[0] + assertion_of(error) if assertion_of(error) else text
            failed.append(f"{case}: {type(error).__name__}: {text}")
    assert total, "no case was tried"
    assert not failed, f"{len(failed)} of {total} cases fail: " + "\n  ".join(failed)


def every_second(cases: Sequence[Any], start: int = 0) -> pytest.MarkDecorator:
    """The mark of a check that runs every second case each time, the others with --thorough.

    For examples that several checks share. With `start` 0 in some of the checks and 1 in others,
    each run judges every example somewhere; all examples in all checks would take too long.
    """
    return pytest.mark.thorough(but=[getattr(case, "id", case) for case in cases[start::2]])
