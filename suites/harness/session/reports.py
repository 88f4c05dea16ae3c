"""What pytest's own reporters are told: the terminal, junit.xml, --lf, -x."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from _pytest.junitxml import xml_key

from harness.records.verdicts import UNEXPECTED, Judgement, Verdict
from harness.session.expectations import Entry

STATUS = {
    Verdict.FAIL: ("failed", "F", "FAIL"),
    Verdict.ERROR: ("failed", "E", "ERROR"),
    Verdict.TIMEOUT: ("failed", "T", "TIMEOUT"),
    Verdict.CRASH: ("failed", "C", "CRASH"),
    Verdict.XPASS: ("failed", "X", "XPASS"),
    Verdict.PRECONDITION: ("precondition", "p", "PRECONDITION"),
}
"""How a verdict stands in pytest's counts: its category, letter and word."""


def phase_report(item: pytest.Item, when: Any, at: float) -> pytest.TestReport:
    """A phase that passed: the ranks ran it, and the check's own report has its verdict."""
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords={},
        outcome="passed",
        longrepr=None,
        when=when,
        duration=0.0,
        start=at,
        stop=at,
    )


def check_report(
    item: pytest.Item, judgement: Judgement, entry: Entry | None, began: float
) -> pytest.TestReport:
    """The report of a check by its judgement; ``entry`` is the expectation that it met."""
    verdict = judgement.verdict
    report = phase_report(item, "call", began)
    report.duration, report.stop = judgement.seconds, time.time()
    if verdict in UNEXPECTED:
        report.outcome = "failed"
        report.longrepr = "\n".join(filter(None, (judgement.message, judgement.text)))
    elif verdict in {Verdict.XFAIL, Verdict.PRECONDITION}:
        report.outcome = "skipped"
        path, line, _ = item.location
        report.longrepr = (path, (line or 0) + 1, judgement.message)
    if verdict is Verdict.XFAIL:
        report.wasxfail = entry.why if entry else ""
    report.verdict = verdict  # type: ignore[attr-defined]
    return report


def write_junit(config: pytest.Config) -> str:
    """Write junit.xml, which pytest does next, and ends in a traceback where it cannot; why not."""
    xml = config.stash.get(xml_key, None)
    try:
        if xml:
            xml.pytest_sessionfinish()
    except OSError as error:
        config.stash[xml_key].logfile = os.devnull
        return f"junit.xml cannot be written: {error}"
    return ""
