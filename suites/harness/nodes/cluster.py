"""The first node's side of a run over several machines.

Each node's parent connects to the first node's and forks the ranks that it is told to; what they
say comes back over that connection. A node that dies closes it; one that is stopped or cut off
says nothing any more, which shows in its heartbeats.
"""

from __future__ import annotations

import secrets
import shutil
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from harness.parent import local_ranks
from harness.parent.local_ranks import (
    Evidence,
    LocalRanks,
    Node,
    NodeRanks,
    RankUpdate,
    Starter,
    WorldOrder,
)
from harness.parent.machines import Machines, spread
from harness.rank import rank_process
from harness.settings.options import Settings
from harness.settings.requirements import WorldSpec
from harness.system.channel import Frame, ParentEnd, RankEnd
from harness.system.torchrun_env import TorchrunEnv

JOIN_LIMIT = 120.0
"""Seconds for all nodes to have collected their checks and connected."""
SILENCE_LIMIT = 10.0
"""Seconds without a heartbeat after which a node counts as lost."""
HEARTBEAT = 1.0
LEAD_KEY = "shardproof/lead"
_REPLY_LIMIT = 15.0
_CLOCK_ROUNDS = 5
_STAMPS = ("at", "failed_at")


class NodesError(Exception):
    """The nodes cannot make one run; the text names them and says why."""


class Link:
    """The connection to one node's parent."""

    def __init__(self, sock: socket.socket, hello: Frame, offset: float) -> None:
        """`hello`: what the node said of itself when it connected, see `Follower`."""
        self.node = Node(hello["index"], hello["host"])
        self.ranks: int = hello["ranks"]
        self.versions: dict[str, str] = hello["versions"]
        self.lost = ""
        self._end = ParentEnd(sock)
        self.offset = offset
        """What its monotonic clock is ahead of this one's."""
        self._heard = time.monotonic()
        self._updates: dict[int, list[RankUpdate]] = defaultdict(list)
        self._replies: dict[tuple[str, int], Frame] = {}
        local_ranks.connections.append(self._end)

    def fileno(self) -> int:
        return self._end.fileno()

    def send(self, kind: str, **payload: Any) -> None:
        """Say something to the node; one that cannot hear is found lost at the next update."""
        if not self.lost:
            self._end.send(kind, **payload)

    def pump(self) -> None:
        """Take in what has come, and notice when nothing comes any more."""
        if self.lost:
            return
        for frame in self._end.frames():
            self._heard = time.monotonic()
            if frame["kind"] == "updates":
                self._updates[frame["world"]] += [
                    self._update(update) for update in frame["updates"]
                ]
            elif frame["kind"] == "trouble":
                self.lose(f"its parent failed: {frame['text']}")
            elif frame["kind"] != "alive":
                self._replies[frame["kind"], frame["world"]] = frame
        silent = time.monotonic() - self._heard
        if self._end.closed:
            self.lose("its connection closed: it died, or was ended")
        elif silent > SILENCE_LIMIT:
            self.lose(f"no sign of life for {silent:.0f} s: it is stopped, or cut off the network")

    def lose(self, why: str) -> None:
        """Give the node up."""
        self.lost = self.lost or f"{self.node} is lost: {why}"

    def updates(self, world: int) -> list[RankUpdate]:
        """What is new of a world's ranks on the node."""
        self.pump()
        return self._updates.pop(world, [])

    def ask(self, kind: str, world: int, **payload: Any) -> Frame | None:
        """A request that the node answers under the same name; None when it is lost."""
        self.send(kind, world=world, **payload)
        deadline = time.monotonic() + _REPLY_LIMIT
        while (reply := self._replies.pop((kind, world), None)) is None:
            self.pump()
            if not self.lost and time.monotonic() > deadline:
                self.lose(f"no answer to {kind!r} within {_REPLY_LIMIT:g} s")
            if self.lost:
                return None
            wait([self.fileno()], timeout=0.1)
        return reply

    def close(self) -> None:
        self._end.close()
        local_ranks.connections.remove(self._end)

    def _update(self, data: dict[str, Any]) -> RankUpdate:
        update = RankUpdate(**data)
        for frame in update.frames:
            for stamp in _STAMPS:
                if stamp in frame:
                    frame[stamp] -= self.offset
        return update


class RemoteRanks:
    """The ranks of one world on another node."""

    def __init__(self, link: Link, order: WorldOrder) -> None:
        self._link = link
        self._order = order
        self.node = link.node
        self.ranks = order.ranks

    @property
    def lost(self) -> str:
        """Why the node is lost; empty while it answers."""
        return self._link.lost

    def launch(self) -> None:
        """Have the node start the ranks."""
        self._link.send("launch", order=self._order.as_json())

    def send(self, rank: int, kind: str, **payload: Any) -> None:
        """Say something to one rank."""
        self._link.send("say", world=self._order.world, rank=rank, what=kind, payload=payload)

    def updates(self) -> list[RankUpdate]:
        """What has come from the ranks."""
        return self._link.updates(self._order.world)

    def sources(self) -> list[Any]:
        """The connection, while it stands."""
        return [] if self._link.lost else [self._link]

    def evidence(self, silent: Iterable[int], calls: bool) -> dict[int, Evidence]:
        """Outputs, stacks and `calls`, as far as the node still answers."""
        reply = self._link.ask("evidence", self._order.world, silent=sorted(silent), calls=calls)
        if reply is None:
            return {}
        found = {int(r): Evidence(**data) for r, data in reply["ranks"].items()}
        for evidence in found.values():
            evidence.clock = self._link.offset
        return found

    def end(self) -> list[str]:
        """Have the node end the ranks; a lost node's are out of reach."""
        reply = self._link.ask("end", self._order.world)
        return [] if reply is None else [f"{s} on {self.node}" for s in reply["strays"]]


class Cluster(Machines):
    """All nodes of a run, this one first."""

    def __init__(self, settings: Settings, start: Starter, versions: dict[str, str]) -> None:
        assert settings.torchrun is not None
        super().__init__(settings, start)
        self._torchrun = settings.torchrun
        self._versions = versions
        self._links: list[Link] = []
        self._folders: list[Path] = []

    @property
    def lost(self) -> str:
        """The nodes that are lost, in words."""
        for link in self._links:
            link.pump()
        return "; ".join(link.lost for link in self._links if link.lost)

    def gather(self, say: Callable[[str], None]) -> None:
        """Wait for all nodes; raises NodesError when they cannot make one run."""
        token = secrets.token_hex(16)
        with socket.create_server(("", 0), backlog=self._torchrun.count) as server:
            _publish(self._torchrun, server.getsockname()[1], token)
            deadline = time.monotonic() + JOIN_LIMIT
            began = time.monotonic()
            while len(self._links) < self._torchrun.count - 1:
                here = {0} | {link.node.index for link in self._links}
                missing = sorted(set(range(self._torchrun.count)) - here)
                say(f"waiting for node {', '.join(map(str, missing))} of {self._torchrun.count}")
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    sock, _ = server.accept()
                except TimeoutError:
                    raise NodesError(
                        f"node {', '.join(map(str, missing))} did not connect within "
                        f"{JOIN_LIMIT:g} s: see its own output"
                    ) from None
                if (link := _greet(sock, token)) is not None:
                    self._links.append(link)
                    late = time.monotonic() - began
                    say(f"{link.node} is here" + (f", {late:.0f} s late" if late > 5 else ""))
        self._links.sort(key=lambda link: link.node.index)
        self._compare()

    def _compare(self) -> None:
        differences = [
            f"{link.node} has {name} {link.versions.get(name)}, {self._node} has {value}"
            for link in self._links
            for name, value in self._versions.items()
            if link.versions.get(name) != value
        ]
        if differences:
            raise NodesError("the nodes differ: " + "; ".join(differences))

    def unmet(self, spec: WorldSpec) -> str:
        """Not more ranks than the nodes have room for, not fewer than the nodes asked for."""
        shares = spread(spec.size, self._torchrun.count)
        if len(shares) < spec.nodes:
            return f"needs a world over {spec.nodes} nodes; this run has {self._torchrun.count}"
        room = [self._torchrun.ranks, *(link.ranks for link in self._links)]
        for index, share in enumerate(shares):
            if len(share) > room[index]:
                return (
                    f"needs {len(share)} ranks on each node; --nproc-per-node is {room[index]} "
                    f"on node {index}"
                )
        return ""

    def parts(self, spec: WorldSpec) -> Sequence[NodeRanks]:
        """The ranks of each node."""
        self._worlds += 1
        token = f"shardproof/{self._torchrun.run_id}/world{self._worlds}"
        store = rank_process.StoreAddress(self._torchrun.master, self._torchrun.port, token)
        shared = ""
        if self._settings.shared_dir is not None:
            folder = self._settings.shared_dir / f"world-{self._worlds}"
            folder.mkdir()
            self._folders.append(folder)
            shared = str(folder)
        found: list[NodeRanks] = []
        for index, ranks in enumerate(spread(spec.size, self._torchrun.count)):
            link = self._links[index - 1] if index else None
            node = link.node if link else self._node
            order = WorldOrder(self._worlds, spec, ranks, node, self._settings.seed, store, shared)
            found.append(RemoteRanks(link, order) if link else LocalRanks(order, self._start))
        return found

    def as_json(self) -> list[dict[str, Any]]:
        """The nodes for results.json."""
        own = (self._node, self._torchrun.ranks, self._versions)
        nodes = [own, *((link.node, link.ranks, link.versions) for link in self._links)]
        return [
            {"node": node.index, "host": node.host, "ranks": ranks, "versions": versions}
            for node, ranks, versions in nodes
        ]

    def close(self, status: int) -> None:
        """Let the other nodes go; they end with the same exit code."""
        for link in self._links:
            link.ask("bye", 0, status=status)
            link.close()
        self._links = []
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)


def room_for(settings: Settings, here: TorchrunEnv) -> int:
    """The most ranks that this node takes of one world."""
    return here.ranks if settings.room is None else min(here.ranks, settings.room)


def _publish(here: TorchrunEnv, port: int, token: str) -> None:
    """Put this parent's address where the other nodes update for it."""
    import torch.distributed as dist

    with socket.create_connection((here.master, here.port), timeout=30) as probe:
        own, peer = probe.getsockname()[0], probe.getpeername()[0]
    # The store is on this machine: the others reach it by the name that they were given.
    address = here.master if own == peer else own
    store = dist.TCPStore(here.master, here.port, is_master=False)  # type: ignore[attr-defined]
    store.set(f"{LEAD_KEY}/{here.run_id}", f"{address} {port} {token} {here.group_rank}")


def _greet(sock: socket.socket, token: str) -> Link | None:
    """Hear who connects, and set the clocks; None for a stranger."""
    end = RankEnd(sock)
    sock.settimeout(10)
    hello = end.receive()
    if hello is None or hello.get("token") != token:
        sock.close()
        return None
    best = (float("inf"), 0.0)
    for _ in range(_CLOCK_ROUNDS):
        before = time.monotonic()
        end.send("clock")
        while (reply := end.receive()) is not None and reply["kind"] != "clock":
            continue  # a heartbeat came between
        if reply is None:
            sock.close()
            return None
        after = time.monotonic()
        best = min(best, (after - before, reply["at"] - (before + after) / 2))
    return Link(sock, hello, best[1])
