"""Stacks of silent ranks: read when they are whole, however slowly they are written."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.system import stacks

SLOW = """
import signal, sys, time
def dump(number, frame):
    with open(sys.argv[1], "a") as file:
        for line in LINES:
            file.write(line + chr(10))
            file.flush()
            time.sleep(0.1)
signal.signal(signal.SIGUSR1, dump)
print("up", flush=True)
while True:
    time.sleep(0.05)
"""
HEAD = "Current thread 0x1 (most recent call first):"
FRAME = '  File "check.py", line 1 in hangs'


@pytest.mark.parametrize(
    ("last", "patience"),
    [
        ('  File "run.py", line 2 in <module>', 20),
        ('  File "<frozen runpy>", line 198 in _run_module_as_main', 20),
        ("  ...", 20),
        ('  File "run.py", line 2 in another', 2),
    ],
    ids=["outermost", "module", "deep", "unusual"],
)
def test_a_dump_is_read_to_its_last_frame(tmp_path: Path, last: str, patience: float) -> None:
    """On a busy machine its lines come one by one; one that ends unusually is waited for."""
    file = tmp_path / "stack.txt"
    code = SLOW.replace("LINES", repr([HEAD, FRAME, last]))
    with subprocess.Popen(
        [sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        begin = time.monotonic()
        try:
            found = stacks.ask({process.pid: file}, patience)
        finally:
            process.kill()
        assert time.monotonic() - begin < 15
    assert found[process.pid][1].splitlines() == [HEAD, FRAME, last]
