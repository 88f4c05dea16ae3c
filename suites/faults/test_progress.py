"""What a terminal shows while checks run; a pipe, CI and plain terminals are left alone."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from faults.launcher import SUITES
from faults.sessions import Session
from harness.session.progress import _watched
from harness.session.time_left import TimeLeft, in_words

Suite = Callable[..., Path]

CHECKS = """
import os, time, pathlib, pytest
pytestmark = pytest.mark.world(1)
@pytest.mark.parametrize("n", range(4))
def test_good(n): pass
def test_bad(): assert 1 == 2
def test_slow(tmp_path_factory):
    pathlib.Path(os.environ["STARTED"]).touch()
    time.sleep(float(os.environ["SLOW"]))
def test_plain(): pass
"""
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def _hear_ctrl_c() -> None:
    """What a shell starts in the background is deaf to it, and hands that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A session of the harness on a terminal of 80 columns."""

    def __init__(self, folder: Path, *arguments: str, slow: float = 1.5, **env: str) -> None:
        self.started = folder / "started"
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        words = [sys.executable, "-m", "harness", "-p", "harness.session.plugin", "-q"]
        words += [f"--rootdir={folder}", "--run-dir", str(folder / "out"), "--no-warm-up"]
        words += ["--tb=no", "-rN", "-p", "no:hypothesispytest", *arguments]
        given = {"PYTHONPATH": str(SUITES), "TERM": "xterm-256color", "SLOW": str(slow)}
        given |= {"STARTED": str(self.started)}
        kept = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR", "COLUMNS")}
        self.process = subprocess.Popen(
            words,
            cwd=folder,
            env=kept | given | env,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_hear_ctrl_c,
        )
        os.close(theirs)

    def finish(self) -> tuple[int, str]:
        """(exit code, all that was written)."""
        found = b""
        try:
            while block := os.read(self._ours, 65536):
                found += block
        except OSError:  # Linux's end of a terminal that nobody has open
            pass
        os.close(self._ours)
        text = found.decode()
        print(text)
        return self.process.wait(60), text


def drawn(text: str) -> list[str]:
    """The lines that were written, without colours and movements."""
    return [line for line in re.split(r"[\r\n]+", _ESCAPE.sub("", text)) if line.strip()]


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.thorough
def test_a_terminal_shows_counts_the_time_left_and_what_runs(suite: Suite, jobs: str) -> None:
    code, text = Terminal(suite(CHECKS), "--jobs", jobs).finish()
    assert code == 1
    lines = drawn(text)
    assert any(line.startswith("FAIL  test_it.py::test_bad") for line in lines), lines
    assert any(re.match(r"\d of 7 checks, \d+%  .*left", line) for line in lines), lines
    slow = [line for line in lines if re.match(r"running [1-9] s: .*::test_slow", line)]
    assert slow, lines
    assert any("1 fail" in line for line in lines)
    assert max(map(len, lines)) <= 80
    # The two lines are gone when the summary stands.
    end = text[text.rindex("checks, ") :]
    assert "\x1b[2K" in end
    assert "1 failed, 6 passed" in _ESCAPE.sub("", end)
    assert "\x1b[?25h" in end, "the cursor is shown again"


@pytest.mark.thorough
def test_a_subject_that_fails_in_many_checks_leaves_room_for_the_counts(suite: Suite) -> None:
    source = "import pytest\n@pytest.mark.parametrize('n', range(30))\ndef test_it(n): assert 0\n"
    code, text = Terminal(suite(source)).finish()
    assert code == 1
    lines = drawn(text)
    assert len({line for line in lines if line.startswith("FAIL  ")}) == 20
    assert lines.count("Further failures are told at the end.") == 1


@pytest.mark.thorough
def test_ctrl_c_leaves_a_terminal_as_it_was(suite: Suite) -> None:
    terminal = Terminal(suite(CHECKS), "--jobs", "1", slow=60)
    deadline = time.monotonic() + 60
    while not terminal.started.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    terminal.process.send_signal(signal.SIGINT)
    code, text = terminal.finish()
    assert code == 3
    end = text[text.rindex("checks, ") :]
    assert "\x1b[2K" in end
    assert "\x1b[?25h" in end
    assert "selected checks did not run" in _ESCAPE.sub("", end)


@pytest.mark.thorough
def test_without_colour_the_lines_are_there_and_plain(suite: Suite) -> None:
    code, text = Terminal(suite(CHECKS), "-k", "good", NO_COLOR="1").finish()
    assert code == 0
    assert any("of 4 checks" in line for line in drawn(text))
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", text)


@pytest.mark.thorough
def test_in_ci_a_terminal_gets_dots(suite: Suite) -> None:
    code, text = Terminal(suite(CHECKS), "-k", "good", CI="true").finish()
    assert code == 0
    assert re.search(r"^\.\.\.\. +\[100%\]", _ESCAPE.sub("", text), re.MULTILINE)
    assert "of 4 checks" not in text


def test_a_pipe_gets_dots(suite: Suite) -> None:
    outcome = Session(suite(CHECKS), "-k", "good").finish()
    assert re.search(r"^\.\.\.\. +\[100%\]$", outcome.output, re.MULTILINE)
    assert "\x1b" not in outcome.output


WATCHED = [
    ({}, {}, True),
    ({"isatty": lambda: False}, {}, False),
    ({"verbosity": 1}, {}, False),
    ({"capture": "no"}, {}, False),
    ({"usepdb": True}, {}, False),
    ({}, {"TERM": "dumb"}, False),
    ({}, {"TERM": ""}, False),
    ({}, {"CI": "true"}, False),
    ({}, {"CI": ""}, True),
]


@pytest.mark.parametrize(("changes", "env", "watched"), WATCHED)
def test_where_somebody_watches(
    changes: dict[str, object], env: dict[str, str], watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    known = {"isatty": lambda: True, "verbosity": -1, "capture": "fd", "usepdb": False} | changes
    one = SimpleNamespace(**known)
    assert _watched(SimpleNamespace(option=one), one) is watched  # type: ignore[arg-type]


def test_the_time_left_follows_an_earlier_run() -> None:
    known = {f"{n}": 1.0 for n in range(90)} | {"slow": 90.0}
    left = TimeLeft(dict.fromkeys(known, False), known, jobs=2)
    assert left.seconds(0) == pytest.approx(90)
    for n in range(90):
        left.done(f"{n}")
    # Half of the work is done, in the time that it should take: the other half is one check.
    assert left.seconds(45) == pytest.approx(45)
    # This machine is slower by far.
    assert left.seconds(90) == pytest.approx(45 * 99 / 54)


def test_without_an_earlier_run_the_rate_counts_once_there_is_one() -> None:
    left = TimeLeft(dict.fromkeys(map(str, range(100)), False), {"0": 5.0}, jobs=1)
    for n in range(4):
        left.done(f"{n}")
    assert left.seconds(8) is None
    left.done("4")
    assert left.seconds(10) == pytest.approx(190)


def test_a_check_that_runs_alone_counts_whole() -> None:
    known = {"a": 4.0, "b": 4.0}
    assert TimeLeft({"a": False, "b": True}, known, jobs=4).seconds(0) == pytest.approx(5)


def test_the_time_left_is_told_no_more_exact_than_it_is_known() -> None:
    told = {None: "time left not known yet", 3: "seconds left", 42: "about 40 s left"}
    told |= {250: "about 4 min left", 7000: "about 1.9 h left"}
    assert {s: in_words(s) for s in told} == told
