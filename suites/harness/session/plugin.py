"""The pytest plugin: runs marked items as checks on ranks, everything else as pytest does."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.nodes import follower
from harness.nodes.cluster import Cluster, NodesError
from harness.parent import local_ranks
from harness.parent.judge import Judge
from harness.parent.machines import Machines, starter
from harness.rank import recording
from harness.rank.fixtures import device, judged, mesh, rank, shared, subject, world
from harness.records.verdicts import UNEXPECTED, Judgement, Verdict
from harness.session import certified, ending, results
from harness.session.expectations import Entry, Expectations, Facts, append
from harness.session.judging_loop import Loop
from harness.session.progress import Progress
from harness.session.reports import STATUS, check_report, phase_report, write_junit
from harness.settings import options, requirements, subject_import, subjects
from harness.settings.options import SETTINGS, Settings
from harness.settings.subject_warnings import Warned
from harness.system import devices, processes, warm

__all__ = ["device", "judged", "mesh", "rank", "shared", "subject", "world"]

_LEFT_OUT: pytest.StashKey[int] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    options.add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    for mark in requirements.MARKS:
        config.addinivalue_line("markers", mark)
    if config.option.help or getattr(config.option, "markers", False):
        return
    warm.limit_threads()
    if config.option.certified:
        certified.refuse_what_narrows(config.invocation_params.args)
    config.stash[SETTINGS] = settings = options.read_settings(config)
    subjects.install_early(settings.subject, settings.install_at, callers=settings.callers)
    if subject_import.in_spawned_rank or config.option.collectonly:
        return
    if settings.torchrun is not None and not settings.torchrun.leads:
        config.pluginmanager.register(follower.Follower(config, settings), "shardproof-node")
        return
    if settings.certified:
        certified.refuse_changes(config.rootpath, results.commit_of(config.rootpath))
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    if not getattr(config.option, "xmlpath", None):  # not there with -p no:junitxml
        config.option.xmlpath = str(settings.run_dir / "junit.xml")
    progress = Progress(config, settings)
    run = Run(config, settings, progress)
    config.pluginmanager.register(run, "shardproof-run")
    config.pluginmanager.register(progress, "shardproof-progress")
    if settings.jobs > 1:
        config.pluginmanager.register(Loop(run, settings, progress), "shardproof-loop")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    requirements.parametrize_world(metafunc)


def pytest_report_header(config: pytest.Config) -> str:
    settings = config.stash.get(SETTINGS, None)
    if settings is None:
        return ""
    import torch

    return (
        f"subject: {settings.subject} {settings.known.version}; torch {torch.__version__}, "
        f"{settings.backend} on {settings.device}, start method {settings.start_method}, "
        f"order {settings.order}, seed {settings.seed}, "
        f"{settings.jobs} at a time"
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None]:
    if not any("::" in argument for argument in config.args):
        requirements.validate_thorough(items)
    yield
    settings = config.stash[SETTINGS]
    config.stash[_LEFT_OUT] = requirements.leave_out_thorough(config, items)
    for item in items:
        requirements.level_of(item)
        if requirements.is_check(item):
            requirements.spec_of(item, settings)  # a mark that contradicts itself stops here
            item.add_marker(pytest.mark.timeout(0))  # its clocks are the harness's
    options.arrange(items, settings.order)


class Run:
    """One session: its checks, their verdicts, and what it leaves."""

    def __init__(self, config: pytest.Config, settings: Settings, progress: Progress) -> None:
        self._config = config
        self._settings = settings
        self._progress = progress
        self._started = time.time()
        self._deadline = time.monotonic() + settings.session_limit
        self._checks: list[dict[str, Any]] = []
        self._plain: dict[str, Judgement] = {}
        self._decided: set[str] = set()
        self._items: dict[str, pytest.Item] = {}
        self._collected: list[str] = []
        self._starter = starter(config, settings, lambda nodeid: self._items[nodeid])
        self._machines = self.this_machine()
        self.judge = Judge(settings, self._machines, progress.tick)
        self._stopped = ""
        self._warned = Warned(settings.known.warnings)
        self._notes: list[str] = []
        self._nodes: list[dict[str, Any]] = []
        self._environment = results.environment(settings, config.rootpath)
        self._write_at = time.monotonic()
        import torch

        self._expectations = Expectations(
            settings.expectations,
            settings.subject,
            Facts(
                str(torch.__version__),
                settings.backend,
                settings.device,
                devices.accelerator() or "none",
                devices.built(),
                "yes" if settings.callers else "no",
            ),
            none=settings.certified,
        )

    def this_machine(self) -> Machines:
        return Machines(self._settings, self._starter)

    # --- collection ---------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> Iterator[None]:
        self._collected = [item.nodeid for item in items]
        return (yield)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._items = {item.nodeid: item for item in session.items}
        if self._config.option.collectonly:
            return
        if self._settings.certified:
            certified.refuse_other_suites(self._config.args)
        ids = [item.nodeid for item in session.items]
        narrowed = any("::" in str(a) for a in self._config.args) or self._config.getoption(
            "lf", False
        )
        whole = not narrowed and not session.testsfailed
        self._expectations.validate(ids, self._collected if whole else None, self._config)
        processes.adopt_orphans()
        local_ranks.remove_abandoned()
        signal.signal(signal.SIGTERM, processes.terminate)
        if any(map(requirements.is_check, session.items)) and self._settings.start_method == "fork":
            if not self._config.option.no_warm_up:
                self._settings.known.warm_up()
            warm.warm_up(everything=not self._config.option.no_warm_up)
            recording.watch()
        if self._settings.torchrun is not None:
            self._machines = self._gather_nodes(session)
            self.judge = Judge(self._settings, self._machines, self._progress.tick)

    def _gather_nodes(self, session: pytest.Session) -> Machines:
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        say = reporter.write_line if reporter is not None else print
        versions = follower.versions(session, self._settings)
        found = Cluster(self._settings, self._starter, versions)
        try:
            found.gather(say)
        except NodesError as error:
            found.close(3)
            pytest.exit(str(error), returncode=3)
        return found

    # --- running ------------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> bool | None:
        if self.must_stop(item.session):
            return True
        if self.needs_no_world(item):
            return True
        began = time.time()
        self._progress.running({item.nodeid: began})
        if not requirements.is_check(item):
            return None
        spec = requirements.spec_of(item, self._settings)
        self.report(item, self.judge.judge(item, nextitem, spec), began)
        if self._machines.lost:
            self.stop(item.session, self._machines.lost)
        return True

    def must_stop(self, session: pytest.Session) -> bool:
        processes.heed_signals()
        if time.monotonic() > self._deadline:
            limit = self._settings.session_limit
            self.stop(session, f"the session's limit of {limit:g} s is over")
        return bool(session.shouldstop or session.shouldfail)

    def needs_no_world(self, item: pytest.Item) -> bool:
        """Whether the item's verdict is known without running it; it is reported then."""
        spec = requirements.spec_of(item, self._settings) if requirements.is_check(item) else None
        if reason := self.judge.worlds.unmet(item, spec):
            judgement = Judgement(Verdict.PRECONDITION, reason)
        elif item.get_closest_marker("warns_of_nothing") is not None:
            judgement = self._warned.judge(item)
        else:
            return False
        self.report(item, judgement, time.time())
        return True

    def stop(self, session: pytest.Session, why: str) -> None:
        self._stopped = session.shouldstop = why

    # --- reporting ----------------------------------------------------------------------------

    def report(self, item: pytest.Item, judgement: Judgement, began: float) -> None:
        self._decided.add(item.nodeid)
        if requirements.is_check(item):
            self._warned.add(item, judgement)
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        entry = self._settle(item, judgement)
        self._note(item, judgement, entry)
        for phase in (
            phase_report(item, "setup", began),
            check_report(item, judgement, entry, began),
            phase_report(item, "teardown", time.time()),
        ):
            item.ihook.pytest_runtest_logreport(report=phase)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)

    def _settle(self, item: pytest.Item, judgement: Judgement) -> Entry | None:
        """Hold the verdict against the subject's expectation, where there is one."""
        entry = self._expected(item)
        if entry is None or judgement.verdict is Verdict.PRECONDITION:
            return None
        if judgement.verdict in entry.verdicts:
            judgement.verdict = Verdict.XFAIL
        elif judgement.verdict is Verdict.PASS:
            judgement.verdict = Verdict.XPASS
            judgement.message = f"passes, though expected to fail: {entry.why}"
            judgement.text = (
                f"{judgement.message}\nIf the defect is mended, take the entry {entry.check!r} "
                f"out of {entry.source}"
            )
        else:
            expected = ", ".join(sorted(entry.verdicts))
            judgement.text += f"\nexpected to {expected}: {entry.why}"
        return entry

    def _expected(self, item: pytest.Item) -> Entry | None:
        params = getattr(getattr(item, "callspec", None), "params", {})
        size = params.get(requirements.SIZE_PARAMETER, self._settings.flexible_size)
        return self._expectations.match(item.nodeid, size)

    def is_expected(self, item: pytest.Item, judgement: Judgement) -> bool:
        entry = self._expected(item)
        return entry is not None and judgement.verdict in entry.verdicts

    def _note(self, item: pytest.Item, judgement: Judgement, entry: Entry | None) -> None:
        self._checks.append(
            results.check(item, judgement, self._settings, entry.as_json() if entry else None)
        )
        self._progress.add(self._checks[-1])
        if time.monotonic() > self._write_at:
            with contextlib.suppress(OSError):  # the disk is full: the end tells it, if it is still
                self._write_results(ending.INCOMPLETE)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Gather the phases of plain items into one verdict each."""
        if report.nodeid in self._decided:
            return
        item = self._items[report.nodeid]
        judgement = self._plain.setdefault(report.nodeid, Judgement(Verdict.PASS))
        judgement.seconds += report.duration
        if report.failed and judgement.verdict is Verdict.PASS:
            judgement.verdict = Verdict.FAIL if report.when == "call" else Verdict.ERROR
            crash = getattr(report.longrepr, "reprcrash", None)
            judgement.message = crash.message if crash else report.longreprtext[:2000]
        elif report.skipped and judgement.verdict is Verdict.PASS:
            judgement.verdict = Verdict.PRECONDITION
            told = report.longrepr  # (file, line, text) of a skip
            judgement.message = told[2] if isinstance(told, tuple) else str(told)
        if report.when == "teardown":
            self._note(item, self._plain.pop(report.nodeid), None)

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        return STATUS.get(getattr(report, "verdict", Verdict.PASS))

    # --- the end ------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(
        self, session: pytest.Session, exitstatus: int | pytest.ExitCode
    ) -> Iterator[None]:
        # A node that goes takes others' supervisors with it, who end this run before the check is.
        self._stopped = self._stopped or self._machines.lost
        self.judge.close()
        verdicts = [check["verdict"] for check in self._checks]
        code, why = ending.exit_code(session, int(exitstatus), verdicts, self._stopped)
        self._notes += [why] if why else []
        if self._settings.certified and code != pytest.ExitCode.USAGE_ERROR:
            code = self._certify(code)
        session.exitstatus = code
        self._nodes = self._machines.as_json()
        self._machines.close(int(session.exitstatus))
        if session.items and session.exitstatus != pytest.ExitCode.USAGE_ERROR:
            self._leave_results(session)
        yield

    def _certify(self, code: int) -> int:
        """Say what the run certifies; the exit code: 0 where it does, though a SHOULD fails."""
        root = self._config.rootpath
        changed = certified.changes(root, str(self._environment["commit"]))
        found = certified.certificate(self._checks, self._collected, code, changed)
        self._environment["certificate"] = found
        self._notes.append(certified.in_words(found))
        return 0 if found["granted"] else max(code, 1)

    def _write_results(self, exit_code: int) -> Path:
        began = time.monotonic()
        places = {name: place for place, name in enumerate(self._items)}
        run = self._environment | {
            "inventory": results.inventory(self._collected)[1],
            "nodes": self._nodes,
            "selected": len(self._items),
            "left_out": self._config.stash[_LEFT_OUT],
            "exit": exit_code,
        }
        if self._settings.jobs > 1:  # as they were selected, not as they ended
            self._checks.sort(key=lambda check: places[check["id"]])
        try:
            return results.write(self._settings, run, self._checks, self._started, time.time())
        finally:
            now = time.monotonic()
            self._write_at = now + max(1.0, (now - began) / _WRITING_SHARE)

    def _leave_results(self, session: pytest.Session) -> None:
        if told := self._warned.told():
            self._notes.append(told)
        if left := self._config.stash[_LEFT_OUT]:
            self._notes.append(f"left out, marked thorough: {left} (--thorough runs them)")
        try:
            path = self._write_results(int(session.exitstatus))
            path.with_name("inventory.txt").write_text(results.inventory(self._collected)[0])
            results.point_latest_at(self._settings.run_dir)
            shown = os.path.relpath(path, self._config.invocation_params.dir)
            self._notes.append(f"results: {shown}")
        except OSError as error:
            session.exitstatus = ending.INCOMPLETE
            self._notes.append(f"results.json cannot be written: {error}")
        if why := write_junit(self._config):
            session.exitstatus = ending.INCOMPLETE
            self._notes.append(why)
        if self._settings.update_expectations:
            failed = [
                (c["id"], Verdict(c["verdict"]), c["message"])
                for c in self._checks
                if Verdict(c["verdict"]) in UNEXPECTED - {Verdict.XPASS} and c["expected"] is None
            ]
            count = append(self._expectations.path, failed, self._collected)
            self._notes.append(
                f"{count} entries for {len(failed)} checks written to "
                f"{self._expectations.path.name}: give each a defect"
            )

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for line in ending.unjudged(self._checks):
            terminalreporter.write_line(line, yellow=True)
        for note in self._notes:
            terminalreporter.write_line(note)


_WRITING_SHARE = 0.02
"""Of a run's time. A run that is killed leaves what it had judged, as one that is incomplete."""
