"""The preflight sees each fault that it is there for, and says what to change."""

from __future__ import annotations

import errno
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from preflight import __main__ as command
from preflight import gpus, machine, trial
from preflight.findings import Finding, Grade, Need

TORCH: dict[str, Any] = {
    "version": "2.13.0",
    "cuda": "13.0",
    "nccl": "2.29.7",
    "backends": ["gloo", "nccl"],
    "default_backend": {"cpu": "gloo", "cuda": "nccl"},
    "gpus": ["NVIDIA H100", "NVIDIA H100"],
    "peers": [[1], [0]],
}
CPU_TORCH = {**TORCH, "cuda": None, "nccl": None, "backends": ["gloo"], "gpus": [], "peers": []}


@pytest.fixture
def need(tmp_path: Path) -> Callable[..., Need]:
    def make(device: str = "cuda", torch: dict[str, Any] = TORCH, **more: Any) -> Need:
        backend = more.get("backend", TORCH["default_backend"][device])
        shared = more.get("share_gpus", False)
        return Need(device, backend, more.get("ranks", 2), tmp_path, torch, shared)

    return make


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put an nvidia-smi first on the path that prints these lines, and ends with `status`."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(*lines: str, status: int = 0) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        said = "\n".join(lines)
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<END\n{said}\nEND\nexit {status}\n")
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return make


def grade(finding: Finding, wanted: Grade, *words: str) -> None:
    text = f"{finding.seen} -> {finding.change}"
    assert finding.grade is wanted, text
    for word in words:
        assert word in text


FREE = ("0, GPU-aa, NVIDIA H100, 81559, 4, Default", "1, GPU-bb, NVIDIA H100, 81559, 4, Default")


def test_free_gpus_are_well(need: Any, smi: Any) -> None:
    smi(*FREE)
    grade(gpus.torch_sees(need()), Grade.OK, "2.13.0", "CUDA 13.0", "NCCL 2.29.7", "2 GPUs")
    grade(gpus.driver(need()), Grade.OK, "2 free: NVIDIA H100")
    grade(gpus.peers(need()), Grade.OK)


def test_a_gpu_in_use_is_named(need: Any, smi: Any) -> None:
    smi(FREE[0], "1, GPU-bb, NVIDIA H100, 81559, 40000, Default")
    grade(gpus.driver(need()), Grade.FAILED, "in use: 1 (40,000 MiB", "CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize("chosen", ["0", "GPU-aa"])
def test_a_gpu_that_is_not_chosen_may_be_in_use(
    need: Any, smi: Any, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    smi(FREE[0], "1, GPU-bb, NVIDIA H100, 81559, 40000, Default")
    grade(gpus.driver(need()), Grade.OK, "1 free")


def test_a_gpu_that_takes_no_work_is_named(need: Any, smi: Any) -> None:
    smi(FREE[0], "1, GPU-bb, NVIDIA H100, 81559, 4, Prohibited")
    grade(gpus.driver(need()), Grade.FAILED, "Prohibited on 1", "--compute-mode=DEFAULT")


def test_a_driver_that_fails_is_told(need: Any, smi: Any) -> None:
    smi("Failed to initialize NVML: Driver/library version mismatch", status=18)
    grade(gpus.driver(need()), Grade.FAILED, "ended with 18", "version mismatch")


def test_no_driver_at_all(need: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    none = {**TORCH, "gpus": [], "peers": []}
    grade(gpus.driver(need()), Grade.FAILED, "nvidia-smi", "--gpus all")
    grade(gpus.torch_sees(need(torch=none)), Grade.FAILED, "sees no GPU", "container toolkit")


def test_gpus_that_torch_cannot_use(need: Any, smi: Any) -> None:
    smi(*FREE)
    none = {**TORCH, "gpus": [], "peers": []}
    grade(gpus.torch_sees(need(torch=none)), Grade.FAILED, "older than CUDA 13.0 needs")


@pytest.mark.parametrize(
    ("torch", "ranks", "wanted", "word"),
    [
        ({"error": "no module named torch"}, 2, Grade.FAILED, "no module named torch"),
        (CPU_TORCH, 2, Grade.FAILED, "built without the backend nccl"),
        ({**TORCH, "cuda": None}, 2, Grade.FAILED, "built without CUDA"),
        (TORCH, 4, Grade.FAILED, "sees 2 GPUs, 4 needed"),
        ({**TORCH, "gpus": ["one"]}, 1, Grade.WARNING, "will be preconditions, not run"),
    ],
)
def test_torch_that_cannot_serve_the_run(
    need: Any, torch: dict[str, Any], ranks: int, wanted: Grade, word: str
) -> None:
    grade(gpus.torch_sees(need(torch=torch, ranks=ranks)), wanted, word)


def test_one_gpu_that_ranks_share_is_enough(need: Any) -> None:
    one = {**TORCH, "gpus": ["one"]}
    grade(gpus.torch_sees(need(torch=one, ranks=4, share_gpus=True)), Grade.OK, "1 GPUs")


def test_gpus_apart_are_a_warning(need: Any) -> None:
    apart = {**TORCH, "peers": [[], []]}
    grade(gpus.peers(need(torch=apart)), Grade.WARNING, "none between 1-0")


@pytest.mark.parametrize(("device", "blocks"), [("cpu", 16), ("cuda", 64)])
def test_small_shared_memory_fails(
    need: Any, monkeypatch: pytest.MonkeyPatch, device: str, blocks: int
) -> None:
    small = SimpleNamespace(f_blocks=blocks, f_bavail=blocks, f_frsize=1 << 20)
    monkeypatch.setattr(os, "statvfs", lambda _: small)
    grade(machine.shared_memory(need(device)), Grade.FAILED, f"{blocks} MiB", "shm_size: 8gb")


def test_full_shared_memory_fails(need: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    full = SimpleNamespace(f_blocks=8192, f_bavail=3, f_frsize=1 << 20)
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    grade(machine.shared_memory(need("cpu")), Grade.FAILED, "3 MiB of 8,192 MiB free")


def test_locked_memory(need: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 << 20, 8 << 20))
    monkeypatch.setattr(machine, "INFINIBAND", tmp_path / "none")
    grade(machine.locked_memory(need()), Grade.WARNING, "8 MiB", "memlock: -1")
    grade(machine.locked_memory(need("cpu")), Grade.OK)
    (tmp_path / "none" / "mlx5_0").mkdir(parents=True)
    grade(machine.locked_memory(need()), Grade.FAILED, "mlx5_0", "memlock: -1")


def test_a_host_without_a_name(need: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    grade(machine.hostname(need()), Grade.FAILED, "does not resolve", "/etc/hosts")


def test_a_name_of_another_host(need: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # 192.0.2.0/24 is reserved for documentation: no machine has it.
    elsewhere = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: elsewhere)
    grade(machine.hostname(need()), Grade.FAILED, "192.0.2.1", "GLOO_SOCKET_IFNAME")


def test_a_clock_never_set(need: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    later = machine.CLOCK_FLOOR.replace(year=machine.CLOCK_FLOOR.year + 1000)
    monkeypatch.setattr(machine, "CLOCK_FLOOR", later)
    grade(machine.clock(need()), Grade.FAILED, "shows", "chrony")


def test_a_clock_that_jumps(need: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = iter([1000.0, 1007.0])
    monkeypatch.setattr(time, "time", lambda: next(shown))
    grade(machine.clock(need()), Grade.FAILED, "the wall clock went 7.000 s")


def test_a_folder_that_cannot_be_written(need: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    asked = need("cpu")
    there = Need(asked.device, asked.backend, asked.ranks, tmp_path / "file" / "out", asked.torch)
    grade(machine.results_folder(there), Grade.FAILED, "cannot write it", "make it")


@pytest.mark.parametrize(
    ("mapped", "own", "change"),
    [
        (machine.EVERY_USER, False, f"docker run with --user {os.getuid()}:{os.getgid()}"),
        (machine.EVERY_USER, True, "chmod u+rwx it"),
        ("65536", False, "its owner is no user in here"),
    ],
)
def test_how_a_folder_can_be_written(
    need: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: str, own: bool, change: str
) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    owner = os.getuid()
    (tmp_path / "uid_map").write_text(f"0 0 {mapped}\n")
    monkeypatch.setattr(machine, "USER_MAP", tmp_path / "uid_map")
    monkeypatch.setattr(machine, "UNMAPPED", owner)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    monkeypatch.setattr(os, "getuid", lambda: owner if own else owner + 1)
    grade(machine.results_folder(need("cpu")), Grade.FAILED, "cannot write it", change)


@pytest.mark.parametrize(
    ("status", "verdicts"), [(1, ["pass", "fail"]), (0, ["pass", "precondition"]), (0, ["pass"])]
)
def test_only_two_passes_are_a_world(need: Any, status: int, verdicts: list[str]) -> None:
    blamed = [{"rank": 1, "fate": "raised", "message": "bytes differ"}]
    checks = [
        {"verdict": v, "seconds": 0.1, "message": "rank 1: bytes differ", "ranks": blamed}
        for v in verdicts
    ]
    wanted = f"{len(verdicts)} of 2 checks ran"
    grade(trial.judge(need(), status, {"checks": checks}), Grade.FAILED, wanted)


def test_the_command_reads_what_it_is_for(tmp_path: Path) -> None:
    read = command._options(
        ["--out", str(tmp_path), "--for", "ci/conformance", "-k", "x", "--device=cuda", "-q"]
    )
    asked = command._need(read, TORCH)
    assert (asked.device, asked.backend, asked.ranks, asked.folder) == ("cuda", "nccl", 2, tmp_path)
    read = command._options(["--for", "ci/conformance", "--share-gpus", "--device=cuda"])
    asked = command._need(read, TORCH)
    assert (asked.share_gpus, asked.ranks) == (True, command.DEFAULT_RANKS)


def preflight(*arguments: str, limit: tuple[int, int] | None = None, **env: str) -> Any:
    return subprocess.run(
        [sys.executable, "-m", "preflight", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, **env},
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit)) if limit else None,
        check=False,
    )


def test_this_machine_is_fit(tmp_path: Path) -> None:
    done = preflight("--out", str(tmp_path), "--world-size", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks, gloo on cpu moved exact data" in done.stdout


@pytest.mark.thorough
def test_a_world_that_cannot_start_is_not_fit(tmp_path: Path) -> None:
    done = preflight(
        "--out", str(tmp_path), "--world-size", "2", GLOO_SOCKET_IFNAME="no-such-interface"
    )
    assert done.returncode == 3
    assert "no-such-interface" in done.stdout
    assert done.stderr == "preflight: not fit for a run: world\n"


@pytest.mark.thorough
def test_few_open_files_are_not_fit(tmp_path: Path) -> None:
    done = preflight("--out", str(tmp_path), limit=(128, 128))
    assert done.returncode == 3
    assert "open files" in done.stderr
    assert "ulimit -n 256" in done.stdout
    assert "not started" in done.stdout


def test_wrong_usage(tmp_path: Path) -> None:
    done = preflight("--world-size", "0")
    assert done.returncode == 2
    assert "--world-size 0: expected a number from 1 up" in done.stderr
