"""The loop of a run that judges several checks at a time."""

from __future__ import annotations

from typing import Any, Protocol

import pytest

from harness.parent.judge import Judge
from harness.parent.machines import Machines
from harness.records.verdicts import Judgement, Verdict
from harness.session.judge_pool import JudgePool, Outcome
from harness.session.progress import Progress
from harness.settings import requirements
from harness.settings.options import Settings
from harness.system import warm


class Reporter(Protocol):
    """What the loop needs of the run."""

    def must_stop(self, session: pytest.Session) -> bool: ...
    def needs_no_world(self, item: pytest.Item) -> bool: ...
    def is_expected(self, item: pytest.Item, judgement: Judgement) -> bool: ...
    def report(self, item: pytest.Item, judgement: Judgement, began: float) -> None: ...
    def this_machine(self) -> Machines: ...


class Loop:
    """Deals the items out to judges, and has each outcome reported."""

    def __init__(self, run: Reporter, settings: Settings, progress: Progress) -> None:
        self._run = run
        self._settings = settings
        self._progress = progress
        self._timed_out: dict[int, Judgement] = {}

    @pytest.hookimpl
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Judge side by side; where one is judged at a time, pytest's own loop does."""
        items, count = session.items, self._settings.jobs
        # A debugger talks to the process that has the terminal.
        if session.testsfailed or len(items) < 2 or session.config.option.usepdb:
            return None
        if reason := warm.unfit():
            pytest.exit(f"--jobs {count}: {reason}; --jobs 1 starts no judges", 3)
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(f"{count} checks at a time (--jobs)")
        last = {i for i, item in enumerate(items) if item.get_closest_marker("warns_of_nothing")}
        judges = JudgePool(
            session, self._settings, lambda: Judge(self._settings, self._run.this_machine())
        )

        def must_stop() -> bool:
            self._progress.running({items[i].nodeid: began for i, began in judges.at_work()})
            return self._run.must_stop(session)

        for outcome in judges.outcomes(
            lambda i: i in last or self._run.needs_no_world(items[i]), must_stop
        ):
            self._take(items[outcome.item], outcome, judges)
        for i in sorted(last):
            if not self._run.must_stop(session):
                self._run.needs_no_world(items[i])
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        return True

    def _take(self, item: pytest.Item, outcome: Outcome, judges: JudgePool) -> None:
        judgement = outcome.judgement
        if judgement is None:
            _replay(item, outcome.reports)
            return
        first = self._timed_out.pop(outcome.item, None)
        if first is None and self._may_be_the_loads(item, judgement):
            self._timed_out[outcome.item] = judgement
            judges.again(outcome.item)
            return
        if first is not None and judgement.verdict is not Verdict.TIMEOUT:
            said = f"judged alone, after a timeout beside other checks: {first.message}"
            judgement.message = f"{judgement.message} ({said})" if judgement.message else said
        self._run.report(item, judgement, outcome.began)

    def _may_be_the_loads(self, item: pytest.Item, judgement: Judgement) -> bool:
        """Whether a timeout has to be seen when nothing runs beside the check, before it counts."""
        return (
            judgement.verdict is Verdict.TIMEOUT
            and not requirements.needs_the_machine(item)
            and not self._run.is_expected(item, judgement)
        )


def _replay(item: pytest.Item, reports: list[dict[str, Any]]) -> None:
    hook = item.config.hook
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for data in reports:
        report = hook.pytest_report_from_serializable(config=item.config, data=data)
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
