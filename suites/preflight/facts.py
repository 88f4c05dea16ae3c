"""The environment of a run, as text: what to compare when two machines disagree."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preflight import gpus
from preflight.findings import mebibytes

PREFIXES = ("NCCL_", "GLOO_", "TORCH_", "CUDA_", "NVIDIA_", "OMP_", "PYTORCH_", "UCX_")
LIMITS = {
    "memlock": resource.RLIMIT_MEMLOCK,
    "nofile": resource.RLIMIT_NOFILE,
    "nproc": resource.RLIMIT_NPROC,
    "stack": resource.RLIMIT_STACK,
    "core": resource.RLIMIT_CORE,
}
MEMORY_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def facts(torch: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and value, a line each; `torch` is what `preflight.probe` printed."""
    system = platform.uname()
    yield "host", f"{system.node}, {system.system} {system.release}, {system.machine}"
    yield "user", f"{os.getuid()}:{os.getgid()}"
    yield "cpus", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"
    yield "memory", _memory()
    shm = os.statvfs("/dev/shm")
    yield "/dev/shm", mebibytes(shm.f_blocks * shm.f_frsize)
    yield "ulimits", ", ".join(f"{name} {_limit(number)}" for name, number in LIMITS.items())
    yield "python", platform.python_version()
    for name in ("version", "cuda", "nccl"):
        yield f"torch {name}", str(torch.get(name, "unknown"))
    yield "backends", ", ".join(torch.get("backends", []))
    yield "driver", _driver()
    for number, name in enumerate(torch.get("gpus", [])):
        yield f"gpu {number}", name
    if torch.get("gpus"):
        try:
            yield "topology", "\n" + gpus.nvidia_smi("topo", "-m").rstrip()
        except OSError as error:
            yield "topology", str(error)
    for name, value in sorted(os.environ.items()):
        if name.startswith(PREFIXES):
            yield name, value


def _limit(number: int) -> str:
    soft, _ = resource.getrlimit(number)
    return "unlimited" if soft == resource.RLIM_INFINITY else str(soft)


def _memory() -> str:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in MEMORY_LIMITS:
        if path.exists() and (text := path.read_text().strip()).isdecimal() and int(text) < total:
            return f"{mebibytes(int(text))} of {mebibytes(total)}"
    return mebibytes(total)


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().partition("\n")[0] if path.exists() else "none"
