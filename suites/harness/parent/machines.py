"""The machines of a run, and which ranks of a world each of them takes."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from harness.parent.local_ranks import LocalRanks, Node, NodeRanks, Starter, WorldOrder, forking
from harness.rank import rank_process, spawned
from harness.settings.options import Settings
from harness.settings.requirements import WorldSpec
from harness.system import torchrun_env


def starter(
    config: pytest.Config, settings: Settings, find: Callable[[str], pytest.Item]
) -> Starter:
    """How ranks that run checks come to be, by the run's start method."""

    def checks(rank_spec: rank_process.RankSpec, sock: socket.socket) -> None:
        rank_process.leave_the_parent(config)
        rank_process.run_as_rank(rank_spec, sock, find)

    def spawn(rank_spec: rank_process.RankSpec, sock: socket.socket) -> Any:
        import torch.multiprocessing

        context: Any = torch.multiprocessing.get_context("spawn")
        arguments = config.invocation_params.args
        process = context.Process(target=spawned.main, args=(rank_spec, sock, arguments))
        process.start()
        return process

    return spawn if settings.start_method == "spawn" else forking(checks)


class Machines:
    """Where the parts of a world come from: this machine alone, whose ranks meet in a file."""

    def __init__(self, settings: Settings, start: Starter) -> None:
        self._settings, self._start = settings, start
        self._node = Node(0, torchrun_env.host())
        self._worlds = 0

    @property
    def lost(self) -> str:
        """Why no more worlds can start, in words; empty while they can."""
        return ""

    def unmet(self, spec: WorldSpec) -> str:
        """What these machines cannot give a world, in words; empty when they can."""
        if spec.nodes > 1:
            return f"needs a world over {spec.nodes} nodes; this run has one"
        return ""

    def parts(self, spec: WorldSpec) -> Sequence[NodeRanks]:
        """The ranks of a new world on each machine, in their order; none has started."""
        self._worlds += 1
        ranks = tuple(range(spec.size))
        order = WorldOrder(self._worlds, spec, ranks, self._node, self._settings.seed, None)
        return [LocalRanks(order, self._start)]

    def as_json(self) -> list[dict[str, Any]]:
        """The machines for results.json."""
        return [{"node": 0, "host": self._node.host, "ranks": None, "versions": {}}]

    def close(self, status: int) -> None:
        """Let the other machines go, with the run's exit code."""


def spread(size: int, nodes: int) -> list[tuple[int, ...]]:
    """Ranks by node: neighbours together, and no node with more than one above another.

    A world of at least as many ranks as there are nodes spans all of them.
    """
    found: list[tuple[int, ...]] = []
    for index in range(min(size, nodes)):
        share = size // nodes + (index < size % nodes)
        first = sum(map(len, found))
        found.append(tuple(range(first, first + share)))
    return found
