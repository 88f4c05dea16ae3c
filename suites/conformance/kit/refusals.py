"""What counts as an answer to wrong input: an exception of a fitting kind that names the input.

Without the kind any accident passes: a warning that became an error, an attribute of None, a
collective that a peer left. Without the words a bare `RuntimeError("failed")` passes, and nobody
finds the one leaf among thousands. Words are those that any implementation has: a key, a
rank, a shape. An AssertionError counts where it has them: then it was written for the
caller, and a bare `assert` never has them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from harness.rank.reporter import kind_of_error

Mention = str | re.Pattern[str]

MISFIT: tuple[type[Exception], ...] = (ValueError, TypeError, RuntimeError, AssertionError)
"""Kinds for what is there and does not fit. A KeyError, which names its key whatever went wrong,
is none."""
MISSING: tuple[type[Exception], ...] = (*MISFIT, LookupError, AttributeError)
"""Kinds for what was asked for and is not there."""
_ACCIDENTS = (RecursionError, Warning)


def shape_of(*sizes: int) -> str:
    """A pattern for a shape as messages write it: (4, 3), [4, 3], 4x3."""
    return r"\b" + r"\s*[,x]\s*".join(map(str, sizes)) + r"\b"


SHAPE = re.compile("(?i)shape|size|dim|element")
"""What a message says that refuses a shape, if not in numbers."""


def attempt(call: Callable[[], Any]) -> BaseException | None:
    """The exception that the call raised, or None."""
    try:
        call()
    except Exception as error:
        return error
    return None


def flaw(
    error: BaseException | None,
    mentions: tuple[Mention, ...] = (),
    kinds: tuple[type[Exception], ...] = MISFIT,
) -> str:
    """Why the exception is no answer to wrong input, or an empty text."""
    if error is None:
        return "no error: it is accepted"
    text = str(error)
    said = f"{type(error).__name__}: {text or '(no text)'}"
    expected = ", ".join(kind.__name__ for kind in kinds)
    if kind_of_error(error) != "error":
        return f"a collective that a peer left, not an answer: {said}"
    if isinstance(error, _ACCIDENTS) or not (isinstance(error, kinds) or _of_its_own(error)):
        return f"an accident, not an answer: {said} (expected {expected}, or a type of its own)"
    if not text.strip():
        return f"{said} says nothing"
    for mention in mentions:
        if not re.search(re.escape(mention) if isinstance(mention, str) else mention, text):
            name = mention if isinstance(mention, str) else mention.pattern
            return f"{name!r} is not named: {said}"
    return ""


def _of_its_own(error: BaseException) -> bool:
    """Whether it is of a type beside Python's own kinds of errors, as CompanionMismatch is."""
    built_in = {t for t in type(error).__mro__ if t.__module__ == "builtins"}
    return type(error) not in built_in and built_in == {Exception, BaseException, object}


def refused(
    call: Callable[[], Any],
    *mentions: Mention,
    kinds: tuple[type[Exception], ...] = MISFIT,
    what: str = "",
) -> BaseException:
    """The call raises an answer of one of `kinds` that names each of `mentions`.

    For what one rank does alone; `agree.assert_raises_everywhere` is for all of them together.
    """
    error = attempt(call)
    assert_refusal(error, *mentions, kinds=kinds, what=what)
    assert error is not None
    return error


def assert_refusal(
    error: BaseException | None,
    *mentions: Mention,
    kinds: tuple[type[Exception], ...] = MISFIT,
    what: str = "",
) -> None:
    """What `attempt` gave is an answer of one of `kinds` that names each of `mentions`."""
    found = flaw(error, mentions, kinds)
    if found:
        raise AssertionError(f"{what}: {found}" if what else found) from error
