"""A small suite in which ranks misbehave; run by test_rank_faults.py, never collected with others.

Each check states its fault in its name. `beside()` is what the other ranks do: nothing, or wait in
a collective for the rank that went wrong.
"""

from __future__ import annotations

import ctypes
import multiprocessing.shared_memory
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.world(2)
FOREVER = 10_000


# --- ends, and says nothing -------------------------------------------------------------------


def test_exits_0_without_an_answer(rank: int) -> None:
    if rank == 1:
        os._exit(0)


def test_segfaults(rank: int) -> None:
    if rank == 1:
        ctypes.string_at(0)


def call_of_a_backend() -> None:
    os.write(2, b"terminate called after throwing an instance of 'gloo::EnforceNotMet'\n")
    os.write(2, b"  what():  [enforce fail at pair.cc:7] this tensor is on no CPU\n")
    os.write(2, b"frame #0: gloo::transport::Pair::recv() (0x7f in libtorch_cpu.so)\n" * 40)
    os.abort()


def test_is_ended_by_its_backend(rank: int) -> None:
    if rank == 1:
        call_of_a_backend()


def test_closes_every_descriptor(rank: int) -> None:
    if rank == 1:
        os.closerange(3, 4096)


def test_writes_into_every_descriptor(rank: int) -> None:
    if rank == 1:
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2 and os.path.exists(f"/proc/self/fd/{name}"):
                target = os.readlink(f"/proc/self/fd/{name}")
                if target.startswith("socket:"):
                    try:
                        os.write(int(name), b"\xff" * 64)
                    except OSError as error:
                        print(error)


# --- raises -----------------------------------------------------------------------------------


def test_raises_while_its_peer_waits(rank: int) -> None:
    if rank == 1:
        raise ValueError("the cause")
    dist.barrier()


def test_raises_5_megabytes(rank: int) -> None:
    if rank == 1:
        raise ValueError("begin" + "x" * 5_000_000)
    dist.barrier()


def test_leaves_by_sys_exit_0(rank: int) -> None:
    if rank == 1:
        sys.exit(0)


def test_raises_what_cannot_be_shown(rank: int) -> None:
    class SlyError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text for you")

    if rank == 1:
        raise SlyError


def test_ends_pytest(rank: int) -> None:
    if rank == 1:
        pytest.exit("enough")


def test_assert_explains_itself(rank: int) -> None:
    shape = {"rows": 3 + rank}
    assert shape["rows"] == 3


def test_skips_on_rank_0_and_fails_on_rank_1(rank: int) -> None:
    if rank == 0:
        pytest.skip("not my day")
    raise ValueError("the cause")


def test_skips_on_every_rank() -> None:
    pytest.skip("not our day")


@pytest.fixture
def broken_on_rank_1(rank: int) -> None:
    if rank == 1:
        raise ValueError("the fixture")


def test_fixture_raises(broken_on_rank_1: None) -> None:
    dist.barrier()


def test_thread_raises(rank: int) -> None:
    if rank == 1:
        thread = threading.Thread(target=lambda: [][0])
        thread.start()
        thread.join()


# --- hangs ------------------------------------------------------------------------------------


def test_hangs_in_python(rank: int) -> None:
    if rank == 1:
        time.sleep(FOREVER)


def test_hangs_in_a_collective(rank: int) -> None:
    if rank == 1:
        dist.all_reduce(torch.ones(1))


def test_hangs_in_c_with_the_lock_held(rank: int) -> None:
    if rank == 1:
        ctypes.PyDLL(None).sleep(FOREVER)


def test_ignores_terminate(rank: int) -> None:
    if rank == 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(FOREVER)


def test_raises_and_takes_forever_to_report(rank: int) -> None:
    if rank == 1:
        __tracebackhide__ = lambda _: time.sleep(1000)  # noqa: E731 -- pytest asks it for its report
        raise ValueError("the cause")
    dist.barrier()


def test_disagree_on_the_next_collective(rank: int) -> None:
    if rank == 1:
        dist.broadcast(torch.ones(1), src=1)
        dist.barrier()
    else:
        dist.all_reduce(torch.ones(1))


# --- leaves something behind ------------------------------------------------------------------

kept: list[Any] = []


def test_leaks_a_child(rank: int) -> None:
    if rank == 1:
        kept.append(subprocess.Popen(["sleep", str(FOREVER)]))


def test_leaks_a_detached_grandchild(rank: int) -> None:
    if rank == 1:
        code = f"import os, time; os.fork() and os._exit(0); os.setsid(); time.sleep({FOREVER})"
        subprocess.run([sys.executable, "-c", code], check=True)


def test_forks_and_both_go_on(rank: int) -> None:
    if rank == 1:
        os.fork()


def test_leaks_a_thread(rank: int) -> None:
    if rank == 1:
        threading.Thread(target=time.sleep, args=(FOREVER,), name="forgotten", daemon=True).start()


def test_leaks_a_variable(rank: int) -> None:
    if rank == 1:
        os.environ["FORGOTTEN"] = "1"


def test_leaks_a_descriptor(rank: int) -> None:
    if rank == 1:
        kept.append(os.open("/dev/null", os.O_RDONLY))


def test_leaks_a_pipe(rank: int) -> None:
    if rank == 1:
        kept.append(os.pipe())


def test_leaks_shared_memory(rank: int) -> None:
    if rank == 1:
        block = multiprocessing.shared_memory.SharedMemory(create=True, size=64)
        # The tracker would take the segment away with the process, which is not the check's merit.
        multiprocessing.resource_tracker.unregister(f"/{block.name}", "shared_memory")
        Path(os.environ["SHARDPROOF_FAULTS_SHM"]).write_text(block.name)
        block.close()


def test_leaks_a_temporary_file(rank: int) -> None:
    if rank == 1:
        import tempfile

        kept.append(tempfile.mkdtemp(prefix="forgotten"))


# --- and some that are in order ---------------------------------------------------------------


def test_in_order(rank: int) -> None:
    total = torch.tensor([rank])
    dist.all_reduce(total)
    assert total.item() == 1
    assert "FORGOTTEN" not in os.environ


def test_prints_and_fails(rank: int) -> None:
    print(f"said by rank {rank}")
    os.write(2, f"written by rank {rank}\n".encode())
    assert rank != 1


@pytest.mark.judges("_state_dict_utils._no_such_function")
def test_of_a_function_that_is_not_there(rank: int) -> None:
    raise AssertionError("must not run")
