"""Python stacks of ranks that do not answer, and the collective that a stack waits in."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from harness.system import processes

_COLLECTIVE_FILES = (
    "distributed_c10d.py",
    "_functional_collectives.py",
    "distributed/nn/functional.py",
)
_NOT_COLLECTIVES = frozenset({"wrapper", "_maybe_wrap_tensor", "__call__", "_object_to_tensor"})
_INNERMOST = re.compile(r'^  File "([^"]+)", line (\d+) in (\S+)', re.MULTILINE)
_FAULTHANDLER_FRAME = re.compile(r'^  File "([^"]+)", line \d+ in (\S+)', re.MULTILINE)


def collective_of(frames: Iterable[tuple[str, str]]) -> str:
    """The first collective in (file, function) frames, outermost frame first; empty if none."""
    for file, function in frames:
        if file.endswith(_COLLECTIVE_FILES) and function not in _NOT_COLLECTIVES:
            return function
    return ""


def collective_of_traceback(trace: TracebackType | None) -> str:
    """The collective that an exception came out of."""
    frames = []
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append((code.co_filename, code.co_name))
        trace = trace.tb_next
    return collective_of(frames)


# Frames from here on down are pytest's and the harness's own.
_BELOW_A_CHECK = (
    "in pytest_pyfunc_call",
    "/harness/rank/reporter.py",
    "/harness/rank/rank_process.py",
)


def collective_of_dump(dump: str) -> str:
    """The collective that the main thread of a faulthandler dump is in."""
    main = dump.rpartition("Current thread")[2] if "Current thread" in dump else dump
    return collective_of(reversed(_FAULTHANDLER_FRAME.findall(main)))


def frame_of_dump(dump: str) -> str:
    """Where the main thread of a faulthandler dump is: `run (check.py, line 3)`."""
    found = _INNERMOST.search(dump.rpartition("Current thread")[2])
    return f"{found[3]} ({found[1].rpartition('/')[2]}, line {found[2]})" if found else ""


def without_harness(dump: str) -> str:
    """The dump without the frames of pytest and the harness below a check's own."""
    kept: list[str] = []
    skipping = False
    for line in dump.splitlines():
        if not line.startswith("  File "):
            skipping = False
        elif any(mark in line for mark in _BELOW_A_CHECK):
            skipping = True
        if not skipping:
            kept.append(line)
    return "\n".join(kept).strip()


_NOISE = re.compile(r"^\s*frame #\d+|^<omitting python frames>|^Exception raised from ")
_CAUSE = re.compile(r"what\(\):|terminate called|\b(?:FATAL|Fatal|fatal|CHECK failed|Assertion)\b")


def crash_of(dump: str) -> str:
    """What faulthandler wrote of a fatal signal, without the harness and threads of no Python."""
    kept = []
    for block in without_harness(dump).split("\n\n"):
        shown = block.strip()
        if shown and "<no Python frame>" not in shown and not shown.startswith("Extension modules"):
            kept.append(shown)
    return "\n".join(kept)


def last_words(log: str, most: int = 10) -> list[str]:
    """The last lines that a process wrote, without blank ones and frames of C++."""
    lines = [line.rstrip()[:300] for line in log.splitlines() if line.strip()]
    return [line for line in lines if not _NOISE.match(line)][-most:]


def cause_in(words: list[str]) -> str:
    """The line in which the C++ runtime, or a library, says why it ends the process."""
    found = [line.strip() for line in words if _CAUSE.search(line)]
    return next((line for line in reversed(found) if "what():" in line), found[-1] if found else "")


def ask(targets: dict[int, Path], patience: float = 2.0) -> dict[int, tuple[str, str]]:
    """Have processes write their stacks: pid and file in, pid to (state letter, dump) out.

    The dump is made by a C signal handler, so it comes also from a rank that sleeps in a
    collective or holds the interpreter lock in C. A stopped rank is let run for it.
    """
    states = {pid: processes.state(pid) for pid in targets}
    for pid in targets:
        processes.signal_main_thread(pid, signal.SIGUSR1)
        if states[pid] == "T":
            processes.signal_quietly(pid, signal.SIGCONT)
    deadline = time.monotonic() + patience
    dumps = dict.fromkeys(targets, "")
    missing = set(targets)
    while missing and time.monotonic() < deadline:
        time.sleep(0.01)
        for pid in tuple(missing):
            text = read(targets[pid])
            if text == dumps[pid] and _is_whole(text):
                missing.remove(pid)
            dumps[pid] = text
    return {pid: (states[pid], without_harness(dumps[pid])) for pid in targets}


# A main thread's outermost frame, also under `python -m`; what stands for frames beyond the
# hundredth, and for none.
_OUTERMOST = (" in <module>", " in _run_module_as_main", "  ...", "<no Python frame>")


def _is_whole(dump: str) -> bool:
    """Whether the dump of the thread that the signal met, which is the last, has its last frame.

    On a busy machine the parent reads it while the rank is still writing, line by line.
    """
    _, found, main = dump.rpartition("Current thread")
    # Python 3.14 goes on with the frames of C.
    last = main.rstrip("\n").endswith(_OUTERMOST) or "C stack trace" in main
    return bool(found) and main.endswith("\n") and last


def read(file: Path) -> str:
    """What a process has written into a file by now."""
    return file.read_text(errors="replace") if file.exists() else ""
