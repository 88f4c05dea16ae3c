"""Small messages between the ranks of a job, through its store, without collectives.

A rank that does not answer is named by all others within the limit: a collective could only hang
with it. Where the process of a rank is gone, the others on its machine see it at once.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from shardproof._prove.findings import ranks_text

_PIECE = 1 << 20
_LEFT = "left "
_calls = 0


class RankLostError(RuntimeError):
    """A rank died, or did not answer within the limit."""


class Exchange:
    """The ranks of one call of prove; every message has a number, the same on all ranks."""

    def __init__(self, limit: float) -> None:
        global _calls
        self.limit = limit
        self.alone = not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if self.alone else dist.get_rank()
        self.size = 1 if self.alone else dist.get_world_size()
        self.count = 0
        self.host = socket.gethostname()
        self.peers: list[tuple[str, int]] = []
        self.last = "the start"
        if not self.alone:
            base = dist.distributed_c10d._get_default_store()
            self.store = dist.distributed_c10d.PrefixStore(f"shardproof/prove/{_calls}", base)
        _calls += 1
        self.peers = [
            (str(host), int(pid)) for host, pid in self.all("hello", (self.host, os.getpid()))
        ]

    def all(self, what: str, mine: Any) -> list[Any]:
        """What each rank says, in the order of ranks; JSON. `what` names the moment in errors."""
        self.last = what
        if self.alone:
            return [json.loads(json.dumps(mine))]
        number = self.count
        self.count += 1
        text = json.dumps([what, mine])
        pieces = [text[i : i + _PIECE] for i in range(0, len(text), _PIECE)]
        for at, piece in enumerate(pieces[1:], 1):
            self.store.set(f"{number}/{self.rank}/{at}", piece)
        self.store.set(f"{number}/{self.rank}", f"{len(pieces)}\n{pieces[0]}")
        self._wait([f"{number}/{rank}" for rank in range(self.size)], what)
        found = []
        for rank in range(self.size):
            said = self.store.get(f"{number}/{rank}")
            if said.startswith(_LEFT.encode()):
                why = said.removeprefix(_LEFT.encode()).decode()
                raise RankLostError(f"rank {rank} left prove at {what!r}: {why}")
            count, _, first = said.partition(b"\n")
            rest = [self.store.get(f"{number}/{rank}/{at}") for at in range(1, int(count))]
            moment, value = json.loads(b"".join([first, *rest]))
            if moment != what:
                raise RankLostError(
                    f"rank {rank} is at {moment!r} while rank {self.rank} is at {what!r}: every "
                    "rank must call prove with the same arguments"
                )
            found.append(value)
        self._forget(number)
        return found

    def agree(self, what: str, error: BaseException | None = None) -> list[str]:
        """What each rank failed with; an empty text for each that did not."""
        said = "" if error is None else f"{type(error).__name__}: {error}"
        return [str(one) for one in self.all(what, said)]

    def leave(self, error: BaseException) -> None:
        """Tell the others, wherever they wait, that this rank gives up."""
        if self.alone or isinstance(error, RankLostError):
            return
        said = f"{type(error).__name__}: {error}"[:2000]
        try:
            self.store.set(f"{self.count}/{self.rank}", _LEFT + said)
        except RuntimeError:  # the store is gone: so is the job
            return

    def _forget(self, number: int) -> None:
        # All ranks have read the messages of the exchange before the last one: they came here.
        if number < 2 or self.rank:
            return
        for rank in range(self.size):
            self.store.delete_key(f"{number - 2}/{rank}")

    def _wait(self, keys: Sequence[str], what: str) -> None:
        end = time.monotonic() + self.limit
        pause = 0.001
        while True:
            try:
                missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            except (dist.DistNetworkError, dist.DistStoreError) as error:
                raise RankLostError(
                    f"rank {self.rank} lost the job's store at {what!r}: the rank that hosts it, "
                    f"usually rank 0, has died ({error})"
                ) from error
            if not missing:
                return
            if dead := [rank for rank in missing if self._is_gone(rank)]:
                raise RankLostError(f"{ranks_text(dead)} died: the process is gone, at {what!r}")
            if time.monotonic() > end:
                raise RankLostError(
                    f"{ranks_text(missing)} did not answer within {self.limit:g} s at {what!r}: "
                    "it hangs, or does something else"
                )
            # A wait of the store itself takes no interrupt, and logs each time that it ends.
            time.sleep(pause)
            pause = min(pause * 1.5, 0.1)

    def _is_gone(self, rank: int) -> bool:
        if not self.peers or self.peers[rank][0] != self.host:
            return False
        pid = self.peers[rank][1]
        try:
            with open(f"/proc/{pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] in "ZX"
        except FileNotFoundError:
            return True
        except OSError:
            return False
