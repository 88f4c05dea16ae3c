"""What a run needs of any machine: limits, shared memory, network, clock, disk."""

from __future__ import annotations

import os
import resource
import socket
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from preflight.findings import Finding, Need, failed, mebibytes, ok, warning

SHARED_MEMORY = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")

USER_MAP = Path("/proc/self/uid_map")
EVERY_USER = "4294967295"
UNMAPPED = 65534
"""How a user namespace that does not map every user shows the others, user_namespaces(7)."""

SHARED_MEMORY_BYTES = {False: 64 << 20, True: 1 << 30}
"""By whether GPUs are used. Without: what Docker gives by default, in which conformance and
integration pass. With: what NCCL's manual asks of a container,
https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html#shared-memory"""

OPEN_FILES = 256
"""Conformance and integration, worlds of 8 ranks among them, pass with this limit."""

FREE_DISK_BYTES = 256 << 20
"""Results and logs of a run are some ten MiB; core dumps of a run that crashes are not."""

CLOCK_FLOOR = datetime(2026, 1, 1, tzinfo=UTC)
"""Earlier than any release of this project: a clock that shows less was never set."""


def shared_memory(need: Need) -> Finding:
    """NCCL's transport between GPUs of one machine, and tensors shared between processes."""
    part = str(SHARED_MEMORY)
    least = SHARED_MEMORY_BYTES[need.gpus]
    change = (
        "give the container shm_size: 8gb (compose) or --shm-size 8g (docker run); without a "
        f"container, mount -o remount,size=8g {part}"
    )
    try:
        state = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        return failed(part, str(error), change)
    size, free = state.f_blocks * state.f_frsize, state.f_bavail * state.f_frsize
    if size < least:
        return failed(part, f"{mebibytes(size)}, at least {mebibytes(least)} needed", change)
    if free < least:
        return failed(
            part,
            f"{mebibytes(free)} of {mebibytes(size)} free, at least {mebibytes(least)} needed",
            f"remove what earlier runs left in {part}, or {change}",
        )
    return ok(part, f"{mebibytes(size)}, {mebibytes(free)} free")


def locked_memory(need: Need) -> Finding:
    """InfiniBand registers the memory that it moves; the kernel counts it as locked."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return ok("memlock", "unlimited")
    seen = f"{mebibytes(soft)}"
    change = "give the container ulimits: {memlock: -1} or --ulimit memlock=-1, a shell ulimit -l"
    fabric = sorted(p.name for p in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else []
    if need.backend == "nccl" and fabric:
        return failed("memlock", f"{seen}, and {fabric[0]} registers memory", change)
    if need.gpus:
        return warning("memlock", f"{seen}: enough as long as no InfiniBand is used", change)
    return ok("memlock", f"{seen}; only GPUs over InfiniBand need more")


def open_files(need: Need) -> Finding:
    """Ranks hold sockets to each other, the parent pipes to each of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        return failed(
            "open files",
            f"{soft}, at least {OPEN_FILES} needed",
            f"ulimit -n {OPEN_FILES}, or ulimits: {{nofile: 65536}} (compose); the hard limit is "
            f"{hard}",
        )
    return ok("open files", "unlimited" if soft == resource.RLIM_INFINITY else str(soft))


def loopback(need: Need) -> Finding:
    """The ranks of one machine meet at a port of the loopback interface."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(5)
            with socket.create_connection(server.getsockname(), timeout=5) as client:
                accepted, _ = server.accept()
                with accepted:
                    client.sendall(b"shardproof")
                    accepted.settimeout(5)
                    got = accepted.recv(16)
    except OSError as error:
        return failed(
            "loopback", f"127.0.0.1: {error}", "bring the interface up: ip link set lo up"
        )
    if got != b"shardproof":
        return failed(
            "loopback", f"sent b'shardproof', got {got!r}", "look at the firewall's rules"
        )
    return ok("loopback", "127.0.0.1 answers")


def hostname(need: Need) -> Finding:
    """Gloo listens at the address that the host's own name stands for."""
    name = socket.gethostname()
    change = (
        f"put a line '127.0.0.1 {name}' into /etc/hosts (docker run --add-host, compose "
        "extra_hosts), or name the interface with GLOO_SOCKET_IFNAME"
    )
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except OSError as error:
        return failed("hostname", f"{name!r} does not resolve: {error}", change)
    refused = []
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError as error:
                refused.append(f"{address[0]} ({error.strerror})")
            else:
                return ok("hostname", f"{name} is {address[0]}")
    return failed(
        "hostname", f"{name!r} stands for no address of this machine: {', '.join(refused)}", change
    )


def clock(need: Need) -> Finding:
    """Every limit of a run is a clock; the monotonic one must go as fast as the other."""
    began, wall = time.monotonic(), time.time()
    time.sleep(0.2)
    steady, shown = time.monotonic() - began, time.time() - wall
    now = datetime.now(UTC)
    change = "set the machine's clock, and let chrony or ntpd keep it"
    if now < CLOCK_FLOOR:
        return failed("clock", f"shows {now:%Y-%m-%d}", change)
    if steady < 0.2 or abs(steady - shown) > 0.1:
        return failed(
            "clock",
            f"while the monotonic clock went {steady:.3f} s the wall clock went {shown:.3f} s",
            change,
        )
    return ok("clock", f"{now:%Y-%m-%d %H:%M:%S} UTC")


def results_folder(need: Need) -> Finding:
    """A run that cannot write its results has judged nothing."""
    part, who = str(need.folder), f"{os.getuid()}:{os.getgid()}"
    try:
        need.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=need.folder, prefix=".preflight-") as probe:
            probe.write(b"shardproof")
            probe.flush()
    except OSError as error:
        owner = need.folder.stat() if need.folder.exists() else None
        whose = f"; it belongs to {owner.st_uid}:{owner.st_gid}" if owner else ""
        return failed(
            part,
            f"user {who} cannot write it ({error.strerror}){whose}",
            _let_write(owner) if owner else "make it, as the user who runs this",
        )
    state = os.statvfs(need.folder)
    free = state.f_bavail * state.f_frsize
    if free < FREE_DISK_BYTES:
        return failed(
            part,
            f"{mebibytes(free)} free, at least {mebibytes(FREE_DISK_BYTES)} needed",
            "remove old runs from it",
        )
    return ok(part, f"user {who} writes it, {mebibytes(free)} free")


def _let_write(owner: os.stat_result) -> str:
    """What to change so that a folder of this owner can be written."""
    if owner.st_uid == UNMAPPED and EVERY_USER not in USER_MAP.read_text().split():
        return (
            "its owner is no user in here: chown it to the user who runs the engine (rootless), or "
            "give the service userns_mode: host (userns-remap)"
        )
    if owner.st_uid == os.getuid():
        return "chmod u+rwx it; where SELinux refuses, chcon -Rt container_file_t it"
    return (
        f"run as its owner: docker compose run without RUN_AS, docker run with --user "
        f"{owner.st_uid}:{owner.st_gid}"
    )
