"""What a rank notes while pytest runs a check on it, and what it answers its parent."""

from __future__ import annotations

import errno
import linecache
import time
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

from harness.settings import subject_warnings
from harness.system import stacks
from harness.system.channel import RankEnd


class RankReporter:
    """Notes on the rank when each phase began, and when and of what it first failed."""

    def __init__(self, channel: RankEnd, subject: str) -> None:
        self._channel = channel
        self._subject = subject
        self.warned = subject_warnings.IssuedWarnings()
        self.failing: dict[str, Any] = {}
        """What was said of the first exception when it was raised."""
        self.asserted = ""
        self.reports: list[pytest.TestReport] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool:
        with subject_warnings.collecting(self._subject, self.warned):
            self.reports = runtestprotocol(item, log=False, nextitem=None)
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Iterator[None]:
        if call.excinfo is not None and not self.failing:
            error = call.excinfo.value
            self.asserted = assertion_of(error)
            self.failing = {
                "outcome": "raised" if call.when == "call" else "broken",
                "phase": call.when,
                "failed_at": time.monotonic(),
                "message": one_line(error)[:2000] + self.asserted,
                "kind_of_error": kind_of_error(error),
                "waiting_in": stacks.collective_of_traceback(call.excinfo.tb),
            }
            if not isinstance(error, pytest.skip.Exception):
                # Before pytest makes its report: reading and parsing sources takes seconds under
                # load, and the parent would end the world before it knew the cause.
                self._channel.send("failing", **self.failing)
        return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        self._channel.send("phase", phase="setup")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self) -> None:
        self._channel.send("phase", phase="call")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self) -> None:
        self._channel.send("phase", phase="teardown")


def answer(watcher: RankReporter, seconds: float) -> dict[str, Any]:
    """The check's outcome on this rank, with its cause where it did not pass."""
    found: dict[str, Any] = {
        "outcome": "passed",
        "seconds": seconds,
        "warnings": watcher.warned.of_calls,
    }
    reports = watcher.reports
    bad = next((r for r in reports if r.outcome != "passed"), None)
    if bad is None:
        if [r.when for r in reports] == ["setup", "call", "teardown"]:
            return found
        return found | {
            "outcome": "broken",
            "failed_at": time.monotonic(),
            "message": f"pytest reported {[r.when for r in reports]} instead of all three phases",
        }
    if bad.outcome == "skipped":
        return found | {
            "outcome": "broken",
            "failed_at": watcher.failing.get("failed_at", 0.0),
            "message": "skipped itself on a rank; state what the check needs in its marks",
            "details": str(bad.longrepr),
        }
    crash = getattr(bad.longrepr, "reprcrash", None)
    message = crash.message if crash else bad.longreprtext.strip().rpartition("\n")[2]
    first, newline, rest = message.partition("\n")
    return found | {
        "failed_at": 0.0,  # of a report that no exception led to
        **watcher.failing,
        "outcome": "raised" if bad.when == "call" else "broken",
        "phase": bad.when,
        "message": first + watcher.asserted + newline + rest,
        "details": bad.longreprtext,
        "sections": [list(s) for s in bad.sections],
    }


def raised(error: BaseException, seconds: float, said: str = "") -> dict[str, Any]:
    """The outcome of what ended with an exception that pytest did not see."""
    told = of_an_exception(error)
    told["message"] = said + told["message"]
    return {"outcome": "raised", "failed_at": time.monotonic(), "seconds": seconds, **told}


def of_an_exception(error: BaseException) -> dict[str, Any]:
    """What a rank says of an exception, in whatever frame it says it."""
    return {
        "message": one_line(error),
        "details": "".join(traceback.format_exception(error)),
        "kind_of_error": kind_of_error(error),
        "waiting_in": stacks.collective_of_traceback(error.__traceback__),
    }


def assertion_of(error: BaseException) -> str:
    """The source of an assert that gives no message, whose values alone say little: `, asserted …`.

    "assert [1] is not [1]" says neither what was expected nor of what; the expression does.
    """
    trace = error.__traceback__
    if not isinstance(error, AssertionError) or trace is None:
        return ""
    if not text_of(error).startswith("assert "):
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    line = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno).strip()
    return f", asserted {line.removeprefix('assert ')!r}"[:300] if line else ""


def kind_of_error(error: BaseException) -> str:
    """Whose doing the error is: a lost peer's, a collective that nobody joined, a full disk's."""
    import torch.distributed as dist

    seen: BaseException | None = error
    while seen is not None:
        text = text_of(seen)
        if isinstance(seen, OSError) and seen.errno in {errno.ENOSPC, errno.EDQUOT}:
            return "broken"
        if isinstance(seen, dist.DistError) or (
            isinstance(seen, RuntimeError)
            # "Wait timeout" alone is a FileStore's, where ranks of a group look for each other.
            and any(s in text for s in ("gloo/", "ProcessGroup", "NCCL", "[c10d]", "Wait timeout"))
        ):
            if any(s in text for s in ("Timed out", "timed out", "Timeout", "timeout")):
                return "collective timeout"
            if any(
                s in text
                for s in (
                    "closed by peer",
                    "reset by peer",
                    "Broken pipe",
                    "remote process exited",
                    "Connection refused",
                )
            ):
                return "peer lost"
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return "error"


def text_of(error: BaseException) -> str:
    """The exception's text; an exception that cannot be shown must not hide that it was raised."""
    try:
        return str(error)
    except Exception as trouble:
        return f"(its text cannot be had: {type(trouble).__name__})"


def one_line(error: BaseException) -> str:
    """The exception in one line: type and the first line of its text."""
    text = text_of(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
