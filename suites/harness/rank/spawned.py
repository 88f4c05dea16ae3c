"""Ranks as new interpreters (`--start-method spawn`): collect as the parent did, then be a rank."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

import pytest

from harness.rank import rank_process
from harness.settings import subject_import
from harness.system import warm
from harness.system.channel import RankEnd


class _RunAsRank:
    """Takes the place of pytest's run loop: the items are collected, now wait for orders."""

    def __init__(self, here: rank_process.RankSpec, sock: socket.socket) -> None:
        self._rank_spec, self._sock = here, sock

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        rank_process.leave_the_parent(session.config)
        rank_process.run_as_rank(self._rank_spec, self._sock, items.__getitem__)
        return True


def main(here: rank_process.RankSpec, sock: socket.socket, arguments: Sequence[str]) -> None:
    """Entry point of a spawned rank."""
    subject_import.in_spawned_rank = True
    warm.limit_threads()
    # What forked ranks find imported; before TMPDIR is the rank's own.
    warm.warm_up(everything="--no-warm-up" not in arguments)
    try:
        rank_process.become_rank(here)
    except BaseException as error:
        rank_process.give_up(RankEnd(sock), error)
    sys.exit(pytest.main([*map(str, arguments), "-s", "-q"], plugins=[_RunAsRank(here, sock)]))
