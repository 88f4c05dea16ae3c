"""Several worlds side by side: forks of this process that each judge, and this one, which reports.

The process that collected the checks deals them out and is told each verdict, so that all of
pytest's reporting, expectations and results stay in one place. A judge has its own children, its
own record of what its worlds left behind and its own fixtures; what it can be blamed for is its
own. A judge that dies takes its ranks with it, and the check that it judged is an error.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest

from harness.parent import local_ranks
from harness.parent.judge import Judge
from harness.rank import rank_process
from harness.records.verdicts import Judgement, Verdict
from harness.settings import requirements
from harness.settings.options import Settings
from harness.system import processes

_END_LIMIT = 10.0
"""Seconds that a judge has to end its worlds, and its tests, when the run ends early."""
_LOOK = 1.0
"""Seconds between two looks at whether each judge lives."""


@dataclass
class Outcome:
    """What came of one item."""

    item: int
    began: float
    judgement: Judgement | None = None
    """Of a check, or of whatever its judge died in."""
    reports: list[dict[str, Any]] = field(default_factory=list)
    """Pytest's own, of any other test."""


@dataclass
class _Ended:
    """A judge cannot go on: an interrupt in a test, or a defect of the harness."""

    error: str
    interrupt: bool


class _JudgeProcess:
    """One judge, as the reporting process sees it."""

    def __init__(self, process: Any, connection: Connection) -> None:
        self.process = process
        self.connection = connection
        self.unit: deque[int] = deque()
        """What it judges next; nobody else takes it."""
        self.item: int | None = None
        self.began = 0.0


def units_of(items: Sequence[pytest.Item], settings: Settings) -> list[list[int]]:
    """Indices of items in units that one judge takes whole.

    Checks that may share a world follow each other; tests that share a fixture of their file, too.
    """
    units: dict[object, list[int]] = {}
    for index, item in enumerate(items):
        units.setdefault(_shared(item, settings) or index, []).append(index)
    return list(units.values())


def _shared(item: pytest.Item, settings: Settings) -> object:
    """What an item has in common with others: a world, or a fixture of their file or class."""
    if requirements.is_check(item):
        spec = requirements.spec_of(item, settings)
        return (spec, getattr(item, "cls", None)) if spec.reuse else None
    known = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    for name, definitions in known.items():
        definition = definitions[-1]
        if definition.scope != "function" and ".py" in definition.baseid:
            return definition.baseid, name
    return None


class JudgePool:
    """The judges of a run, and what is left to deal out."""

    def __init__(
        self, session: pytest.Session, settings: Settings, judge: Callable[[], Judge]
    ) -> None:
        self._session = session
        self._items = session.items
        self._judge = judge
        self._known = frozenset(processes.children(os.getpid()))
        self._units: deque[list[int]] = deque()
        self._alone: deque[list[int]] = deque()
        for unit in units_of(self._items, settings):
            alone = any(requirements.needs_the_machine(self._items[i]) for i in unit)
            (self._alone if alone else self._units).append(unit)
        self._temporary: Any = None
        if not all(map(requirements.is_check, self._items)):
            self._temporary = session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        self._count = 0
        self._judges: list[_JudgeProcess] = []
        for _ in range(min(settings.jobs, len(self._units)) or 1):
            self._judges.append(self._start())

    def again(self, item: int) -> None:
        """Judge a check once more, when nothing runs beside it."""
        self._alone.append([item])

    def at_work(self) -> Iterator[tuple[int, float]]:
        """The items that are judged now, each with when it began."""
        for judge in self._judges:
            if judge.item is not None:
                yield judge.item, judge.began

    def outcomes(self, skip: Callable[[int], bool], stop: Callable[[], bool]) -> Iterator[Outcome]:
        """What comes of each item, as it comes.

        Args:
            skip: whether an item needs no judge; asked once for each.
            stop: whether to let the rest be; asked at least each second.

        """
        try:
            while not stop():
                self._deal(skip)
                working = [judge for judge in self._judges if judge.item is not None]
                if not working:
                    return
                ready = wait([judge.connection for judge in working], timeout=_LOOK)
                for index, judge in enumerate(self._judges):
                    if judge.item is None:
                        continue
                    if judge.connection in ready or not judge.process.is_alive():
                        outcome = self._take(judge)
                        if not judge.process.is_alive() and judge.item is None:
                            self._judges[index] = self._replace(judge)
                        yield outcome
        finally:
            self.close()

    def close(self) -> None:
        """End the judges, and whatever they leave; one that is at work ends its worlds first."""
        for judge in self._judges:
            if judge.item is not None:
                processes.signal_quietly(judge.process.pid, signal.SIGTERM)
            else:
                with contextlib.suppress(OSError):  # it has died
                    judge.connection.send(None)
        deadline = time.monotonic() + _END_LIMIT
        for judge in self._judges:
            judge.process.join(max(deadline - time.monotonic(), 0))
            if judge.process.is_alive():
                judge.process.kill()
                judge.process.join()
            judge.connection.close()
        self._judges = []
        processes.reap(self._known)

    # --- dealing ------------------------------------------------------------------------------

    def _deal(self, skip: Callable[[int], bool]) -> None:
        free = [j for j in self._judges if j.item is None and self._fill(j, self._units, skip)]
        for judge in free:
            self._send(judge, skip)
        if not any(judge.item is not None for judge in self._judges):
            first = self._judges[0]
            if self._fill(first, self._alone, skip):
                self._send(first, skip, alone=True)

    def _fill(
        self, judge: _JudgeProcess, units: deque[list[int]], skip: Callable[[int], bool]
    ) -> bool:
        while not judge.unit and units:
            judge.unit.extend(i for i in units.popleft() if not skip(i))
        return bool(judge.unit)

    def _send(
        self, judge: _JudgeProcess, skip: Callable[[int], bool], *, alone: bool = False
    ) -> None:
        judge.item = judge.unit.popleft()
        judge.began = time.time()
        # A check's world starts while the one before is judged. Near the end others are free to
        # take it; and a test may take long, which what was dealt out behind it would wait for.
        if not alone and not judge.unit and requirements.is_check(self._items[judge.item]):
            while len(self._units) > len(self._judges) and not judge.unit:
                if not requirements.is_check(self._items[self._units[0][0]]):
                    break
                judge.unit.extend(i for i in self._units.popleft() if not skip(i))
        with contextlib.suppress(BrokenPipeError):  # it has died, which `_take` finds
            judge.connection.send((judge.item, judge.unit[0] if judge.unit else None))

    def _take(self, judge: _JudgeProcess) -> Outcome:
        item, judge.item = judge.item, None
        assert item is not None
        try:
            said = judge.connection.recv() if judge.connection.poll() else None
        except (EOFError, ConnectionResetError):
            said = None
        if isinstance(said, Outcome):
            return said
        if isinstance(said, _Ended):
            if said.interrupt:
                raise KeyboardInterrupt(said.error)
            raise RuntimeError(f"a process that judges checks broke:\n{said.error}")
        judge.process.join(_END_LIMIT)
        code = judge.process.exitcode
        why = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
        text = f"the process that judged it ended with {why}"
        return Outcome(item, judge.began, Judgement(Verdict.ERROR, text, text))

    # --- processes ----------------------------------------------------------------------------

    def _replace(self, judge: _JudgeProcess) -> _JudgeProcess:
        judge.connection.close()
        living = frozenset(j.process.pid for j in self._judges if j is not judge)
        processes.reap(self._known | living)
        fresh = self._start()
        fresh.unit = judge.unit
        return fresh

    def _start(self) -> _JudgeProcess:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        self._count += 1
        with processes.signals_held_back():
            process = context.Process(
                target=self._serve, args=(os.getpid(), self._count, ours, theirs)
            )
            process.start()
            theirs.close()
        return _JudgeProcess(process, ours)

    def _serve(self, parent: int, number: int, ours: Connection, theirs: Connection) -> None:
        """Be a judge; does not return."""
        try:
            processes.die_with_parent(parent)
            os.setpgid(0, 0)  # Ctrl-C is the reporting process's
            processes.adopt_orphans()
            for connection in (ours, *(judge.connection for judge in self._judges)):
                connection.close()
            local_ranks.connections.append(theirs)
            self._leave_the_reporting(number)
            processes.let_signals_in()
            self._answer(theirs)
        except BaseException as error:
            interrupt = isinstance(error, KeyboardInterrupt | pytest.exit.Exception)
            said = str(error) if interrupt else traceback.format_exc()
            with contextlib.suppress(OSError):  # the reporting process is gone
                theirs.send(_Ended(said, interrupt))
        finally:
            os._exit(0)

    def _leave_the_reporting(self, number: int) -> None:
        from _pytest.config import create_terminal_writer

        config = self._session.config
        rank_process.unregister(config, *rank_process.REPORTING)
        if (reporter := config.pluginmanager.get_plugin("terminalreporter")) is not None:
            # Kept, for pytest-timeout writes to it; what a test says is in its report.
            reporter._tw = create_terminal_writer(config, open(os.devnull, "w"))  # noqa: SIM115
        if (capture := config.pluginmanager.get_plugin("capturemanager")) is not None:
            # Into a file of its own: forks share the place in one that was open before.
            capture.stop_global_capturing()
            capture.start_global_capturing()
            capture.suspend_global_capture(in_=True)
        if self._temporary is not None:
            folder = self._temporary / f"judge-{number}"
            folder.mkdir(mode=0o700)
            config._tmp_path_factory._basetemp = folder  # type: ignore[attr-defined]

    def _answer(self, connection: Connection) -> None:
        judge = self._judge()
        state = self._session._setupstate
        told = _Reports(self._session.config)
        self._session.config.pluginmanager.register(told, "shardproof-judge")
        try:
            while (order := connection.recv()) is not None:
                index, following = order
                item = self._items[index]
                after = None if following is None else self._items[following]
                outcome = Outcome(index, time.time())
                if requirements.is_check(item):
                    spec = requirements.spec_of(item, judge.settings)
                    outcome.judgement = judge.judge(item, after, spec)
                else:
                    state.teardown_exact(item)
                    # Not None, which would end the fixtures of the whole session with each test.
                    after = after or self._items[index - 1]
                    item.ihook.pytest_runtest_protocol(item=item, nextitem=after)
                    outcome.reports, told.found = told.found, []
                    processes.heed_signals()
                connection.send(outcome)
        except EOFError:
            return
        finally:
            judge.close()
            state.teardown_exact(None)


class _Reports:
    """Gathers what pytest reports of the tests that a judge runs."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self.found: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        hook = self._config.hook
        self.found.append(hook.pytest_report_to_serializable(config=self._config, report=report))
