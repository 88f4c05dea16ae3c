"""What a terminal shows while checks run: how many, their verdicts, the time left, what runs now.

Two lines that are drawn anew, by rich, in place of pytest's dots. In a pipe, in CI, on a terminal
that cannot move its cursor, and with -v or -s, pytest reports as it always does.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

import pytest

from harness.records.verdicts import UNEXPECTED, Verdict
from harness.session.time_left import TimeLeft, in_words
from harness.settings import requirements
from harness.settings.options import Settings

if TYPE_CHECKING:
    from rich.text import Text

_EACH = 0.2
"""Seconds between two drawings."""
_TOLD = 20
"""Failures that are told at once; the report at the end has them all."""
_COLOURS = {Verdict.PASS: "green", Verdict.XFAIL: "yellow", Verdict.PRECONDITION: "cyan"}
_BAD = "bold red"


class Progress:
    """A plugin: follows the run, and shows it where somebody watches."""

    def __init__(self, config: pytest.Config, settings: Settings) -> None:
        self._config = config
        self._jobs = settings.jobs
        self._key = f"shardproof/seconds/{settings.subject}-{settings.backend}-{settings.device}"
        self._seconds: dict[str, float] = {}
        self._screen: _Screen | None = None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is None or not _watched(self._config, reporter) or session.testsfailed:
            return (yield)
        alone = {i.nodeid: requirements.needs_the_machine(i) for i in session.items}
        # Nothing public puts another display in the place of the dots.
        reporter.showfspath = reporter._show_progress_info = False
        self._screen = _Screen(reporter._tw._file, TimeLeft(alone, self._known(), self._jobs))
        try:
            return (yield)
        finally:
            self._screen.close()
            self._screen = None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_report_teststatus(self) -> Generator[None, Any, Any]:
        category, letter, word = yield
        return (category, letter, word) if self._screen is None else (category, "", "")

    def add(self, check: Mapping[str, Any]) -> None:
        """A check has its verdict, as it stands in the results."""
        self._seconds[check["id"]] = round(check["seconds"], 2)
        if self._screen is not None:
            self._screen.add(check["id"], Verdict(check["verdict"]), check["message"])

    def pytest_sessionfinish(self) -> None:
        cache = getattr(self._config, "cache", None)
        if cache is not None and self._seconds:
            cache.set(self._key, self._known() | self._seconds)

    def running(self, began: Mapping[str, float]) -> None:
        """These checks run now, each since a time of time.time()."""
        if self._screen is not None:
            self._screen.running = dict(began)
            self._screen.draw()

    def tick(self) -> None:
        """Time has passed."""
        if self._screen is not None:
            self._screen.draw()

    def _known(self) -> dict[str, float]:
        cache = getattr(self._config, "cache", None)
        found = cache.get(self._key, {}) if cache is not None else {}
        kept = found.items() if isinstance(found, dict) else ()
        return {str(i): float(s) for i, s in kept if isinstance(s, int | float)}


def _watched(config: pytest.Config, reporter: Any) -> bool:
    """Whether a person looks at a terminal that a program may draw on."""
    terminal = reporter.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    ours = config.option.capture != "no" and not config.option.usepdb and reporter.verbosity <= 0
    return bool(terminal and ours and not os.environ.get("CI"))


class _Screen:
    """The two lines; without a thread, since ranks are forked from this process."""

    def __init__(self, stream: TextIO, left: TimeLeft) -> None:
        from rich.console import Console
        from rich.live import Live

        self._stream = stream
        self._left = left
        self._total = left.checks
        self._counts: Counter[Verdict] = Counter()
        self._began = time.monotonic()
        self._next = 0.0
        self.running: dict[str, float] = {}
        self._console = Console(file=stream, highlight=False)
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def add(self, identity: str, verdict: Verdict, said: str) -> None:
        from rich.text import Text

        self._counts[verdict] += 1
        self._left.done(identity)
        self.running.pop(identity, None)
        bad = sum(self._counts[v] for v in UNEXPECTED)
        if verdict in UNEXPECTED and bad <= _TOLD:
            text = Text.assemble((f"{verdict.upper()}  ", _BAD), _short(identity))
            self._begin()
            self._console.print(text, no_wrap=True, overflow="ellipsis")
            if cause := said.partition("\n")[0]:
                self._console.print(Text(f"  {cause}"), no_wrap=True, overflow="ellipsis")
            if bad == _TOLD:
                self._console.print("Further failures are told at the end.", no_wrap=True)

    def draw(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _EACH
        self._begin()
        self._live.update(self._lines(), refresh=True)

    def close(self) -> None:
        self._live.stop()

    def _begin(self) -> None:
        # Not before there is something to show: until then others write to the terminal.
        if not self._live.is_started:
            self._live.start()
        # pytest's capture hides the terminal from where rich would look for its size.
        self._console.width = max(os.get_terminal_size(self._stream.fileno()).columns, 20)

    def _lines(self) -> Text:
        from rich.text import Text

        done = self._counts.total()
        share = 100 * done // max(self._total, 1)
        text = Text(f"{done} of {self._total} checks, {share}%", no_wrap=True, overflow="ellipsis")
        for verdict in Verdict:
            if count := self._counts[verdict]:
                text.append("  ")
                text.append(f"{count} {verdict}", _COLOURS.get(verdict, _BAD))
        left = in_words(self._left.seconds(time.monotonic() - self._began))
        text.append(f"  {left}", "bold")
        if self.running:
            identity, began = min(self.running.items(), key=lambda one: one[1])
            text.append(f"\nrunning {max(time.time() - began, 0):.0f} s: {_short(identity)}", "dim")
        return text


def _short(identity: str) -> str:
    """A check without the folders of its file."""
    path, separator, name = identity.partition("::")
    return path.rpartition("/")[2] + separator + name
