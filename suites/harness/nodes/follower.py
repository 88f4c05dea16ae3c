"""The side of every node but the first: fork the ranks that the first node asks for.

Runs in place of pytest's loop, so that the checks are collected here as they are there. It judges
nothing: what its ranks say goes to the first node as it comes.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import signal
import socket
import time
from dataclasses import asdict
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest

from harness.nodes.cluster import HEARTBEAT, JOIN_LIMIT, LEAD_KEY, room_for
from harness.parent import local_ranks
from harness.parent.local_ranks import LocalRanks, RankUpdate, WorldOrder
from harness.parent.machines import starter
from harness.rank import recording
from harness.settings.options import Settings
from harness.system import processes, torchrun_env, warm
from harness.system.channel import Frame, ParentEnd, RankEnd

_LEAD_LIMIT_MS = 15_000
"""Milliseconds after which an unanswered connection to the first node counts as broken."""


class Follower:
    """One node's parent, which takes orders."""

    def __init__(self, config: pytest.Config, settings: Settings) -> None:
        assert settings.torchrun is not None
        self._config, self._settings = config, settings
        self._torchrun = settings.torchrun
        self._crews: dict[int, LocalRanks] = {}
        self._shown: dict[tuple[int, int], RankUpdate] = {}
        self._items: dict[str, pytest.Item] = {}
        self._said = 0.0
        self._status = 3

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Serve until the first node says bye, or is gone."""
        self._items = {item.nodeid: item for item in session.items}
        processes.adopt_orphans()
        local_ranks.remove_abandoned()
        signal.signal(signal.SIGTERM, processes.terminate)
        warm.warm_up(everything=not self._config.option.no_warm_up)
        recording.watch()
        sock = self._connect(versions(session, self._settings))
        orders, self._out = ParentEnd(sock), RankEnd(sock)
        local_ranks.connections.append(orders)
        try:
            self._serve(orders)
        finally:
            for world in list(self._crews):
                self._end(world)
        return True

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Any:
        """The exit code is the run's, which the first node has told."""
        result = yield
        session.exitstatus = self._status
        return result

    def _connect(self, own: dict[str, str]) -> socket.socket:
        import torch.distributed as dist

        here = self._torchrun
        store = dist.TCPStore(here.master, here.port, is_master=False)  # type: ignore[attr-defined]
        key = f"{LEAD_KEY}/{here.run_id}"
        deadline = time.monotonic() + JOIN_LIMIT
        while not store.check([key]):
            if time.monotonic() > deadline:
                pytest.exit(f"node 0 was not ready within {JOIN_LIMIT:g} s", returncode=3)
            time.sleep(0.1)
        host, port, token, leader = store.get(key).decode().split()
        sock = socket.create_connection((host, int(port)), timeout=30)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _LEAD_LIMIT_MS)
        RankEnd(sock).send(
            "hello",
            token=token,
            index=here.index(int(leader)),
            host=torchrun_env.host(),
            ranks=room_for(self._settings, here),
            versions=own,
        )
        return sock

    def _serve(self, orders: ParentEnd) -> None:
        while True:
            for frame in orders.frames():
                if frame["kind"] == "bye":
                    self._status = frame["status"]
                    self._say("bye", world=frame["world"])
                    return
                self._obey(frame)
            if orders.closed:
                pytest.exit("node 0 is gone: it ended, died, or is cut off", returncode=3)
            for world in self._crews:
                self._report(world)
            if time.monotonic() - self._said > HEARTBEAT:
                self._say("alive")
            sources = [s for c in self._crews.values() for s in c.sources()]
            wait([orders.fileno(), *sources], timeout=HEARTBEAT / 2)

    def _obey(self, frame: Frame) -> None:
        kind, world = frame["kind"], frame.get("world", 0)
        if kind == "clock":
            self._say("clock")
        elif kind == "launch":
            self._launch(WorldOrder.from_json(frame["order"]))
        elif kind == "say":
            self._crews[world].send(frame["rank"], frame["what"], **frame["payload"])
        elif kind == "evidence":
            found = self._crews[world].evidence(frame["silent"], frame["calls"])
            texts = {r: asdict(e) for r, e in found.items()}
            for text in texts.values():
                text["log"] = text["log"][-1_000_000:]
            self._report(world)
            self._say("evidence", world=world, ranks=texts)
        elif kind == "end":
            self._say("end", world=world, strays=self._end(world))

    def _launch(self, order: WorldOrder) -> None:
        if self._settings.start_method == "fork" and (reason := warm.unfit()):
            self._say("trouble", text=reason)
            return
        if order.shared and not Path(order.shared).is_dir():
            text = f"--shared-dir: {order.shared}, made on node 0, is not there"
            self._say("trouble", text=text)
            return
        found = LocalRanks(order, starter(self._config, self._settings, self._items.__getitem__))
        self._crews[order.world] = found
        found.launch()

    def _report(self, world: int) -> None:
        """Pass on what is new."""
        news = []
        for update in self._crews[world].updates():
            bare = RankUpdate(update.rank, [], update.exitcode, update.closed, update.garbage)
            if update.frames or self._shown.get((world, update.rank)) != bare:
                news.append(asdict(update))
                self._shown[world, update.rank] = bare
        if news:
            self._say("updates", world=world, updates=news)

    def _end(self, world: int) -> list[str]:
        ended = self._crews.pop(world, None)
        for key in [k for k in self._shown if k[0] == world]:
            del self._shown[key]
        return [] if ended is None else ended.end()

    def _say(self, kind: str, **payload: Any) -> None:
        """Send one frame whole; the socket's own limit ends a wait for a node that is cut off."""
        self._said = time.monotonic()
        with contextlib.suppress(OSError):  # it is gone, or cut off: the next update finds out
            self._out.send(kind, **payload)


def versions(session: pytest.Session, settings: Settings) -> dict[str, str]:
    """What has to be the same on all nodes, for verdicts of one run."""
    import torch

    suites = Path(__file__).parents[2]
    ids = "\n".join(sorted(item.nodeid for item in session.items))
    subject = Path(settings.known.file)
    own = settings.subject.partition(".")[0] != "torch" and subject.exists()
    return {
        "torch": str(torch.__version__),
        "Python": platform.python_version(),
        "subject": f"{settings.subject} {settings.known.version}"
        + (f" ({torchrun_env.digest([subject.parent])})" if own else ""),
        "suites": torchrun_env.digest([suites]),
        "checks": hashlib.sha256(ids.encode()).hexdigest()[:12],
    }
