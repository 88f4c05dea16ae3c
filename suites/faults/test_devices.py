"""The driver is asked by a child: the parent stays fit to fork, whatever asking does to a process.

NVIDIA's driver 580 starts a thread in the process that asks how many GPUs there are.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from faults.sessions import Session
from harness.settings.options import Settings
from harness.system import devices, processes

Suite = Callable[..., Path]

DRIVER = """
import threading, time
import torch

def asked(*_):
    threading.Thread(target=time.sleep, args=(20,), name="driver", daemon=True).start()
    return True

torch.cuda.is_available = torch.accelerator.is_available = asked
torch.cuda.device_count = lambda: asked() and 1
kind = torch.device("cuda")
torch.accelerator.current_accelerator = lambda check_available=False: (
    kind if not check_available or asked() else None
)
torch.version.cuda = "13.0"
torch.cuda.nccl.version = lambda: (2, 27, 0)
"""
"""An accelerator whose every answer leaves a thread behind, where a session loads it with -p."""

SUITE = """
import pytest

@pytest.mark.world(2)
def test_on_the_cpu(rank): pass

@pytest.mark.world(2)
@pytest.mark.needs("accelerator")
def test_where_there_is_one(rank): pass
"""


@pytest.mark.thorough
def test_a_driver_that_starts_threads_keeps_no_rank_from_starting(suite: Suite) -> None:
    folder = suite(SUITE)
    (folder / "driver.py").write_text(DRIVER)
    outcome = Session(folder, "-p", "driver").finish()
    assert set(outcome.verdicts().values()) == {"pass"}, outcome.output
    assert outcome.results["run"]["nccl"] == "2.27.0"
    assert outcome.exit == 0


@pytest.mark.thorough
def test_what_asked_the_driver_in_the_parent_is_told_where_to_ask(suite: Suite) -> None:
    folder = suite(f"import torch\ntorch.cuda.is_available()\n{SUITE}")
    (folder / "driver.py").write_text(DRIVER)
    outcome = Session(folder, "-p", "driver").finish()
    check = outcome.check("test_on_the_cpu")
    assert check["verdict"] == "error"
    assert re.search("the parent has 2 threads .*driver.* ask on a rank", check["message"])
    assert outcome.exit == 3


def test_the_answer_is_the_childs_and_so_are_its_threads() -> None:
    def ask() -> int:
        threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
        return os.getpid()

    assert processes.thread_count() == 1
    assert devices.in_a_child(ask) != os.getpid()
    assert processes.thread_count() == 1


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: 1 // 0, "the device's driver raised ZeroDivisionError: "),
        (lambda: os._exit(7), "the device's driver ended the process with exit code 7"),
        (lambda: time.sleep(60), "the device's driver did not end within 0.2 s"),
    ],
    ids=["raises", "dies", "hangs"],
)
def test_a_driver_that_gives_no_answer_is_an_error(
    ask: Callable[[], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "LIMIT", 0.2)
    before = set(processes.children(os.getpid()))
    with pytest.raises(RuntimeError, match=re.escape(message)):
        devices.in_a_child(ask)
    assert set(processes.children(os.getpid())) == before


@pytest.mark.parametrize(
    ("backend", "share_gpus", "room"), [("nccl", False, 2), ("nccl", True, None), ("gloo", 0, None)]
)
def test_nccl_takes_a_gpu_a_rank_unless_they_are_shared(
    backend: str, share_gpus: bool, room: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "count", lambda _: 2)
    settings = Mock(spec=Settings, backend=backend, device="cuda", share_gpus=share_gpus)
    assert Settings.room.fget(settings) == room  # type: ignore[attr-defined]


def test_the_cpu_is_one_device_and_what_is_not_there_none() -> None:
    assert devices.count("cpu") == 1
    assert devices.count("nosuch") == 0
    assert devices.built() in {"cpu", "cuda", "xpu"}
