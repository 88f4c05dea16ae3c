"""Ranks as new interpreters (`--start-method spawn`): collect as the parent did, then be a rank."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

import pytest

from harness import rank, warm
from harness.channel import RankEnd

seat: rank.Seat | None = None
"""Set in a spawned rank, before its pytest starts; None in a parent."""


class _Occupy:
    """Takes the place of pytest's run loop: the items are collected, now wait for orders."""

    def __init__(self, here: rank.Seat, sock: socket.socket) -> None:
        self._seat, self._sock = here, sock

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        rank.leave_the_parent(session.config)
        rank.occupy(self._seat, self._sock, items.__getitem__)
        return True


def main(here: rank.Seat, sock: socket.socket, arguments: Sequence[str]) -> None:
    """Entry point of a spawned rank."""
    global seat
    seat = here
    warm.limit_threads()
    # What forked ranks find imported; before TMPDIR is the rank's own.
    warm.warm_up(everything="--no-warm-up" not in arguments)
    try:
        rank.settle(here)
    except BaseException as error:
        rank.give_up(RankEnd(sock), error)
    sys.exit(pytest.main([*map(str, arguments), "-s", "-q"], plugins=[_Occupy(here, sock)]))
