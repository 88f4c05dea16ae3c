"""Two nodes' networks on this machine: a namespace each, a cable between them that can be cut.

A namespace lives as long as the process that holds it: nothing is left where the tests are killed.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from harness.system import processes

NAMES = ("node-a", "node-b")
ADDRESSES = ("10.213.0.1", "10.213.0.2")


class Network:
    """A cable with a node at each end."""

    def __init__(self, folder: Path) -> None:
        self._hosts = folder / "hosts"
        self._hosts.write_text(
            "127.0.0.1 localhost\n"
            + "".join(f"{a} {n}\n" for a, n in zip(ADDRESSES, NAMES, strict=True))
        )
        parent = os.getpid()
        self._holders = [
            subprocess.Popen(
                ["unshare", "--net", "sleep", "infinity"],
                preexec_fn=functools.partial(processes.die_with_parent, parent),
            )
            for _ in NAMES
        ]
        try:
            self._lay()
        except BaseException:
            self.close()
            raise

    def _lay(self) -> None:
        for holder in self._holders:
            own = os.readlink("/proc/self/ns/net")
            while os.readlink(f"/proc/{holder.pid}/ns/net") == own and holder.poll() is None:
                os.sched_yield()
        one, two = (str(holder.pid) for holder in self._holders)
        link = ["ip", "link", "add", "cable", "netns", one, "type", "veth"]
        _call([*link, "peer", "name", "cable", "netns", two])
        for node, address in enumerate(ADDRESSES):
            self._on(node, "ip", "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                self._on(node, "ip", "link", "set", device, "up")

    def _on(self, node: int, *words: str) -> None:
        _call(["nsenter", "--target", str(self._holders[node].pid), "--net", *words])

    def prefix(self, node: int) -> list[str]:
        """What runs a command on a node, whose name leads to its address."""
        script = f'hostname {NAMES[node]} && mount --bind {self._hosts} /etc/hosts && exec "$@"'
        target = str(self._holders[node].pid)
        enter = ["nsenter", "--target", target, "--net", "unshare", "--uts", "--mount"]
        return [*enter, "sh", "-c", script, "sh"]

    def drop(self, *which: str) -> None:
        """Lose packets on their way in, at both ends: all, or those that iptables matches."""
        for node in range(len(NAMES)):
            self._on(node, "iptables", "-A", "INPUT", "-i", "cable", *which, "-j", "DROP")

    def close(self) -> None:
        """Take it away."""
        for holder in self._holders:
            holder.send_signal(signal.SIGKILL)
            holder.wait()


EIGHTH = ("-m", "statistic", "--mode", "random", "--probability", "0.125")


def why_not(folder: Path) -> str:
    """What keeps this machine from it, in words."""
    try:
        network = Network(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"needs namespaces for networks: {error} {getattr(error, 'stderr', '')}"
    try:
        network.drop(*EIGHTH)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"needs iptables with its match 'statistic': {error} {getattr(error, 'stderr', '')}"
    finally:
        network.close()
    return ""


def _call(words: Sequence[str]) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)
