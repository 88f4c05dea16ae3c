"""Judges changed copies of the reference with the checks of a scope, from one warm parent.

The parent imports torch and collects the checks once. For each copy it forks a session, which
imports the copy instead of the reference, runs the checks that it was given until one fails, and
says what each said. That takes a second and the checks' own time, where a new session takes eight.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from harness.rank import rank_process
from harness.settings import subject_warnings, subjects
from harness.system import processes
from mutants import scope

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "reference" / "shardproof"
SUBJECT = "shardproof"
BAD = frozenset({"fail", "timeout", "crash", "error"})
DOUBTFUL = frozenset({"timeout", "error"})
"""What a busy machine may say of a good subject: it counts only when it repeats."""
SILENCE = 120.0
"""Seconds without a word after which a session is ended; a check's own limits are shorter."""


def path_of(check: str) -> Path:
    """The file of a check; those of the scope's suite are named from there."""
    file = check.partition("::")[0]
    return ROOT / ("" if file.startswith("suites/") else scope.current().suite) / file


def name_of(node: str) -> str:
    """A check's name, by its id of pytest."""
    return node.removeprefix(scope.current().suite + "/")


class CannotPlantError(Exception):
    """A fault does not fit the reference of today."""


@dataclass
class Result:
    """What became of one changed copy."""

    state: str
    """caught, survived or broken."""
    said: str = ""
    """The check that caught it, or why it could not be judged."""
    message: str = ""
    ran: int = 0
    """How many checks ran."""
    seconds: float = 0.0
    unrun: list[str] = field(default_factory=list)
    """Why checks could not run here."""


Plant = Callable[[Path], None]
"""Changes the copy of the package `shardproof` that stands in the folder."""


def copy_reference(folder: Path, source: Path = REFERENCE) -> None:
    """Put a copy of the package, with what Python has compiled of it, into the folder."""
    shutil.copytree(source, folder / SUBJECT)


class Judge:
    """The warm session, as the pytest plugin that runs instead of pytest's own loop."""

    def __init__(self, work: Callable[[Judge], None]) -> None:
        self._work = work
        self._snapshot = REFERENCE
        self._say: Any = None
        self.items: dict[str, pytest.Item] = {}
        """The checks of the scope by name."""
        self.passing: set[str] = set()
        """Checks that pass on the reference itself; of the others it is asked."""
        self.after_check: Callable[[], dict[str, Any]] = dict
        """What a session adds to what it says of each check."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Do the work; nothing is left for pytest to do."""
        if session.testsfailed:
            return False
        self._config = session.config
        self.items = {
            name_of(item.nodeid): item
            for item in session.items
            if item.get_closest_marker("warns_of_nothing") is None
        }
        subject_warnings.of_this_repository(
            SUBJECT
        )  # remembered: a copy's warnings are errors as well
        # As it is now: somebody may write at it while hours of mutants are judged.
        with tempfile.TemporaryDirectory(prefix="shardproof-snapshot-") as name:
            copy_reference(Path(name))
            self._snapshot = Path(name) / SUBJECT
            self._work(self)
        rank_process.leave_the_parent(session.config)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """In a session: say what became of a check."""
        verdict = getattr(report, "verdict", None)
        if verdict is None or self._say is None:
            return
        self._say(
            check=name_of(report.nodeid),
            verdict=str(verdict),
            seconds=round(report.duration, 3),
            message=str(report.longreprtext).partition("\n")[0][:300],
            **self.after_check(),
        )

    def judge(self, plant: Plant, checks: Sequence[str]) -> Result:
        """Run the checks in their order on a copy with this change, until one fails for sure."""
        began = time.monotonic()
        result = self._judge(plant, list(checks))
        result.seconds = round(time.monotonic() - began, 2)
        return result

    def _judge(self, plant: Plant, checks: list[str]) -> Result:
        result = Result("survived")
        silent = False
        while checks:
            said = list(self.run(plant, checks))
            judged = sum("check" in word for word in said)
            result.ran += judged
            result.unrun += [w["message"] for w in said if w.get("verdict") == "precondition"]
            last = said[-1] if said else {"broken": "the session said nothing"}
            if "broken" in last:
                return Result("broken", last["broken"], ran=result.ran)
            if "silent" in last and not silent:  # an import that does not end, or a busy machine
                silent = True
                continue
            if reason := last.get("import") or last.get("silent"):
                # Judged by no check, but none could pass.
                result.state, result.said, result.message = "caught", "import", reason
                return result
            if last.get("verdict") not in BAD:
                if judged < len(checks):
                    told = f"the session ended after {judged} of {len(checks)} checks"
                    return Result("broken", told, ran=result.ran)
                return result
            if self._is_sure(plant, last["check"], last["verdict"]):
                result.state, result.said = "caught", last["check"]
                result.message = last["message"]
                return result
            checks = checks[checks.index(last["check"]) + 1 :]
        return result

    def _is_sure(self, plant: Plant, check: str, verdict: str) -> bool:
        """Whether it is the change that the check does not pass for."""
        if verdict in DOUBTFUL:
            again = list(self.run(plant, [check]))
            if not again or again[-1].get("verdict") not in BAD:
                return False
            self.passing.discard(check)  # what depends on the time is asked each time
        if check not in self.passing:
            control = list(self.run(lambda _: None, [check]))
            if not control or control[-1].get("verdict") != "pass":
                return False
            self.passing.add(check)
        return True

    def run(
        self, plant: Plant, checks: Sequence[str], *, to_the_end: bool = False
    ) -> Iterator[dict[str, Any]]:
        """What a session on a copy with this change says of each check, as it says it."""
        with tempfile.TemporaryDirectory(prefix="shardproof-mutant-") as name:
            folder = Path(name)
            copy_reference(folder, self._snapshot)
            plant(folder)
            reader, writer = os.pipe()
            parent = os.getpid()
            sys.stdout.flush()
            sys.stderr.flush()
            with processes.signals_held_back():
                pid = os.fork()
                if pid == 0:
                    os.close(reader)
                    self._be_a_session(parent, folder, writer, checks, to_the_end)
            os.close(writer)
            try:
                yield from _lines(reader, pid)
            finally:
                os.close(reader)
                processes.signal_quietly(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                processes.reap(frozenset())

    def _be_a_session(
        self, parent: int, folder: Path, writer: int, checks: Sequence[str], to_the_end: bool
    ) -> None:
        def say(**words: Any) -> None:
            os.write(writer, json.dumps(words).encode() + b"\n")

        try:
            processes.die_with_parent(parent)
            processes.adopt_orphans()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            processes.let_signals_in()
            self._say = say
            log = os.open(folder / "session.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            (folder / "tmp").mkdir()
            os.environ["TMPDIR"] = str(folder / "tmp")
            tempfile.tempdir = None
            run: Any = self._config.pluginmanager.get_plugin("shardproof-run")
            rank_process.leave_the_parent(self._config, but="shardproof-run")
            if reason := _import_copy(folder):
                say(**{"import": reason})
                return
            if added := self.after_check():  # what the import did is no check's
                say(on_import=added)
            found = [self.items[check] for check in checks]
            for item, following in zip(found, [*found[1:], None], strict=True):
                failed = item.session.testsfailed
                item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
                if item.session.testsfailed > failed and not to_the_end:
                    break
            run.judge.close()
        except BaseException as error:
            with contextlib.suppress(OSError):
                say(broken=f"{type(error).__name__}: {error}")
        finally:
            os._exit(0)


def _lines(reader: int, pid: int) -> Iterator[dict[str, Any]]:
    """What the session writes until it ends; what it left behind may hold its pipe open."""
    buffer = b""
    ended = os.pidfd_open(pid)
    try:
        while True:
            ready = select.select([reader, ended], [], [], SILENCE)[0]
            if not ready:
                yield {"silent": f"the session said nothing for {SILENCE:g} s"}
            if reader not in ready or not (piece := os.read(reader, 1 << 16)):
                return
            *lines, buffer = (buffer + piece).split(b"\n")
            for line in lines:
                yield json.loads(line)
    finally:
        os.close(ended)


def _import_copy(folder: Path) -> str:
    """Import the copy in place of the reference; why that raises, or an empty text."""
    for name in [n for n in sys.modules if n.partition(".")[0] == SUBJECT]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = f"{folder}:{ROOT / 'suites'}"
    importlib.invalidate_caches()
    try:
        for name in ("", *subjects.MODULES):
            importlib.import_module(f"{SUBJECT}.{name}".rstrip("."))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    file = str(sys.modules[SUBJECT].__file__)
    if not file.startswith(str(folder)):
        raise RuntimeError(f"{file} was imported, expected the copy in {folder}")
    return ""


def from_a_warm_parent(work: Callable[[Judge], None], *arguments: str) -> int:
    """Collect the checks, give `work` a judge, and return pytest's exit status."""
    os.environ["PYTHONPATH"] = str(ROOT / "suites")
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="shardproof-judging-") as folder:
        return int(
            pytest.main(
                [
                    *("-q", "-q", "--no-header", "--no-summary", "-s", "--tb=short"),
                    *("-p", "no:cacheprovider"),
                    *("--subject", SUBJECT, "--run-dir", f"{folder}/run"),
                    *("--thorough", "--collective-limit", "4", "--check-limit", "15"),
                    *("--session-limit", "1e9"),  # a night; each session has its own clocks
                    *scope.current().options,
                    *arguments,
                    scope.current().suite,
                    *scope.current().besides,
                ],
                plugins=[Judge(work)],
            )
        )
