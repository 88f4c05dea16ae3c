"""Another thread of this process that makes calls while a call of this thread is under way.

Whether two threads disturb each other depends on where one stands when the other goes on. Here this
thread stands still wherever it has written to a tensor, until the other has made a whole call.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
import torch.distributed as dist


class Meanwhile(threading.Thread):
    """Makes calls, one after another, until every rank of a group has asked it to end."""

    def __init__(self, call: Callable[[], None], group: dist.ProcessGroup) -> None:
        super().__init__()
        self._call, self._group = call, group
        self._over = False
        self._made: float = 0
        self._news = threading.Condition()
        self._errors: list[BaseException] = []

    def run(self) -> None:
        """Make calls. The ranks end after equally many: those that talk need each other."""
        try:
            while not self._every_rank_has_ended_it():
                self._call()
                self._note(self._made + 1)
        except BaseException as error:
            self._errors.append(error)
        finally:
            self._note(math.inf)

    def make_one(self) -> None:
        """Wait for a whole call that begins after this, 0.3 s at most.

        The other thread may wait for a lock that this one holds, as `cached_property` has one up to
        Python 3.11.
        """
        with self._news:
            wanted = self._made + 2
            self._news.wait_for(lambda: self._made >= wanted, timeout=0.3)

    def end(self) -> None:
        """Let it end, and raise what it raised."""
        self._over = True
        self.join()
        for error in self._errors:
            raise error

    def _every_rank_has_ended_it(self) -> bool:
        ended = torch.tensor([int(self._over)])
        dist.all_reduce(ended, group=self._group)
        return int(ended) == dist.get_world_size(self._group)

    def _note(self, made: float) -> None:
        with self._news:
            self._made = made
            self._news.notify_all()


@contextmanager
def after_each_write(then: Callable[[], None]) -> Iterator[None]:
    """Call `then` whenever this thread has written to tensors, once for each line that does."""
    seen: set[tuple[CodeType, int]] = set()

    def profile(frame: FrameType, event: str, called: Any) -> None:
        if event != "c_return" or not _writes(called.__name__):
            return
        line = frame.f_code, frame.f_lineno
        if line not in seen:
            seen.add(line)
            then()

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)


def _writes(name: str) -> bool:
    return name in ("cat", "stack") or (name.endswith("_") and not name.endswith("__"))
