"""The rank's side of a world: make the process group, run checks as told, say what happened.

A rank says each phase as it enters it, answers once per check, then waits for the parent's word.
Only when every rank has passed does the parent let them close the process group; after a failure
nobody enters a collective again, and the parent ends the world.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from _pytest.capture import CaptureManager

from harness.rank import recording
from harness.rank.leaks import Snapshot, watch_segments
from harness.rank.reporter import RankReporter, answer, of_an_exception, one_line, raised
from harness.settings import subject_import
from harness.settings.options import SETTINGS
from harness.settings.requirements import WorldSpec
from harness.system import processes, torchrun_env
from harness.system.channel import RankEnd

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StoreAddress:
    """A TCP store that all machines of a run reach, and the world's own corner of it."""

    host: str
    port: int
    prefix: str


@dataclass(frozen=True)
class RankSpec:
    """Where a rank sits: all that differs between the ranks of a world, and what they share."""

    spec: WorldSpec
    rank: int
    local_rank: int
    local_size: int
    node: int
    group: int
    """Process group to join, 0 to lead it."""
    parent: int
    folder: str
    """Folder of the world on this machine: the store, and a folder for each rank."""
    seed: int
    store: StoreAddress | None
    shared: str
    """A folder that all machines see; empty: the world's own."""
    calls: str
    """Where the parent looks for its collectives."""

    @property
    def home(self) -> Path:
        return Path(self.folder) / f"rank{self.rank}"

    @property
    def log(self) -> Path:
        return self.home / "output.log"

    @property
    def stack(self) -> Path:
        return self.home / "stack.txt"

    @property
    def tmp(self) -> Path:
        return self.home / "tmp"


current: Rank | None = None
"""The rank that this process is; None in the parent."""


def run_as_rank(
    rank_spec: RankSpec, sock: socket.socket, find: Callable[[str], pytest.Item]
) -> None:
    """Be a rank until the parent says end; never returns into the parent's code."""
    channel = RankEnd(sock)
    try:
        _leave(Rank(rank_spec, channel, find).serve())
    except BaseException as error:
        give_up(channel, error)


def give_up(channel: RankEnd, error: BaseException) -> None:
    """End a rank that cannot go on, outside of a check: its parent hears why."""
    try:
        channel.send("broken", **of_an_exception(error))
        traceback.print_exception(error)
    finally:
        _leave(1)


def _leave(code: int) -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


_stack_file: Any = None


def become_rank(rank_spec: RankSpec) -> None:
    """Make this process a rank: group, signals, output, variables."""
    global _stack_file
    processes.die_with_parent(rank_spec.parent)
    # Ctrl-C reaches the parent, which ends the world in order; TERM ends a rank at once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    processes.let_signals_in()
    rank_spec.tmp.mkdir(parents=True, exist_ok=True)
    log = os.open(rank_spec.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.stdout = open(1, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
    # Kept open for the life of the process: the handlers write into its descriptor.
    _stack_file = open(rank_spec.stack, "w")  # noqa: SIM115
    faulthandler.enable(_stack_file, all_threads=True)
    faulthandler.register(signal.SIGUSR1, _stack_file, all_threads=True, chain=False)
    _join_group(rank_spec.group)
    os.environ.update(
        RANK=str(rank_spec.rank),
        LOCAL_RANK=str(rank_spec.local_rank),
        WORLD_SIZE=str(rank_spec.spec.size),
        LOCAL_WORLD_SIZE=str(rank_spec.local_size),
        TMPDIR=str(rank_spec.tmp),
    )
    if rank_spec.store is None:  # all ranks are here: no other machine needs to reach them
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    tempfile.tempdir = None
    watch_segments()


def _join_group(group: int) -> None:
    """Join the world's process group; a spawned leader may not have made it yet."""
    deadline = time.monotonic() + 30
    while True:
        try:
            os.setpgid(0, group)
            return
        except PermissionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


REPORTING = (
    *("junitxml", "lfplugin", "nfplugin", "stepwiseplugin"),
    *("shardproof-run", "shardproof-loop", "shardproof-progress"),
)
"""Plugins that tell of the run, which its other processes have no business with."""


def unregister(config: pytest.Config, *names: str) -> None:
    """Take these plugins out, where they are in."""
    for name in names:
        if (plugin := config.pluginmanager.get_plugin(name)) is not None:
            config.pluginmanager.unregister(plugin)


def leave_the_parent(config: pytest.Config, but: str = "") -> None:
    """Take the parent's reporting out of a forked rank: it would write into the parent's files.

    A process that runs checks of its own keeps the plugin that is named.
    """
    names = (*REPORTING, "terminalreporter", "pdbinvoke", "pdbtrace", "timeout")
    unregister(config, *(name for name in names if name != but))
    # capsys and its kin need a capture manager; this one captures nothing by itself.
    manager = config.pluginmanager.get_plugin("capturemanager")
    if manager is not None:
        config.pluginmanager.unregister(manager)
        quiet = CaptureManager("no")
        config.pluginmanager.register(quiet, "capturemanager")
        quiet.start_global_capturing()


class Rank:
    """One rank of a world, in its own process."""

    def __init__(
        self, rank_spec: RankSpec, channel: RankEnd, find: Callable[[str], pytest.Item]
    ) -> None:
        global current
        self.rank_spec = rank_spec
        self.spec = rank_spec.spec
        self.rank = rank_spec.rank
        self._channel = channel
        self._find = find
        self.meshes: dict[Any, Any] = {}
        self.board: Any = None
        """A store in which ranks put up texts for each other."""
        current = self

    @property
    def device(self) -> torch.device:
        import torch

        if self.spec.device == "cpu":
            return torch.device("cpu")
        return torch.device(self.spec.device, self.rank_spec.local_rank % self._devices())

    def _devices(self) -> int:
        import torch

        return int(getattr(torch, self.spec.device).device_count())

    def _store(self) -> Any:
        """One store per world: in a file, so that no port is needed, or in a corner of a server."""
        import torch.distributed as dist

        address = self.rank_spec.store
        if address is None:
            return dist.FileStore(  # type: ignore[attr-defined]
                str(Path(self.rank_spec.folder) / "store"), self.spec.size
            )
        server = dist.TCPStore(address.host, address.port, is_master=False)  # type: ignore[attr-defined]
        return dist.PrefixStore(address.prefix, server)  # type: ignore[attr-defined]

    def _seed(self) -> None:
        import numpy as np
        import torch

        random.seed(self.rank_spec.seed)
        np.random.seed(self.rank_spec.seed % 2**32)
        if self.spec.device == "cpu":
            # Alone: for a device that is not in use, `torch.manual_seed` formats the whole stack.
            torch.default_generator.manual_seed(self.rank_spec.seed)
        else:
            torch.manual_seed(self.rank_spec.seed)

    def _join(self) -> None:
        """Enter the process group."""
        import torch
        import torch.distributed as dist
        from torch.distributed import distributed_c10d

        timeout = datetime.timedelta(seconds=self.spec.collective)
        # The clock of collectives holds for groups that a check or its subject makes, too.
        for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
            if hasattr(distributed_c10d, name):
                setattr(distributed_c10d, name, timeout)
        if self.spec.device != "cpu":
            torch.accelerator.set_device_index(self.device.index)
            # A driver opens pipes when it is first used: used here, they are no check's leak.
            torch.ones(1, device=self.device).cpu()
        if self.spec.share_gpus and self.spec.size > self._devices():
            # NCCL refuses two ranks on one GPU of a machine, and takes this for the machine's name:
            # https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html#nccl-hostid
            os.environ["NCCL_HOSTID"] = f"{torchrun_env.host()}-{self.rank_spec.local_rank}"
        store = self._store()
        store.set_timeout(timeout)
        self.board = dist.PrefixStore("board", store)  # type: ignore[attr-defined]
        dist.init_process_group(
            self.spec.backend,
            store=store,
            rank=self.rank,
            world_size=self.spec.size,
            timeout=timeout,
        )
        if self.spec.backend != "gloo":
            # NCCL opens a pipe for the process with its first communicator: opened here, it is no
            # check's leak.
            first = torch.ones(1, device=self.device)
            dist.all_reduce(first)
            first.item()

    def serve(self) -> int:
        """Run what the parent names until it says end; the process's exit code."""
        import torch.distributed as dist

        self._join()
        recording.start(Path(self.rank_spec.calls))
        self._channel.send("ready", pid=os.getpid())
        while (order := self._channel.receive()) is not None and order["kind"] == "run":
            item = self._find(order["id"])
            subject_import.arrive(item.config.stash[SETTINGS].subject)
            recording.restart()
            snapshot = Snapshot(self.rank_spec.tmp)
            self._seed()
            self._channel.send("answer", **self._run(item))
            if (word := self._channel.receive()) is None:
                return 1
            if word["kind"] == "leave":
                return 0
            try:
                if not word["keep"]:
                    self.meshes.clear()
                    dist.destroy_process_group()
                    if any(snapshot.new_descriptors()):
                        gc.collect()  # groups that only a cycle keeps hold pipes of their transport
                leaks = snapshot.leaks()
            except Exception as error:  # the check destroyed the group, or left no descriptor
                leaks = [f"a rank that cannot be closed ({one_line(error)})"]
            self._channel.send("leaks", leaks=leaks)
            if not word["keep"]:
                break
        return 0

    def _run(self, item: pytest.Item) -> dict[str, Any]:
        """Set up, call and tear down the item as pytest does, on this rank."""
        watcher = RankReporter(self._channel, item.config.stash[SETTINGS].subject)
        item.config.pluginmanager.register(watcher, "shardproof-rank")
        started = time.monotonic()
        # What the parent had set up for other tests is the parent's to tear down.
        item.session._setupstate.stack.clear()
        try:
            _use_own_pytest_folder(item.config, self.rank_spec.home)
            # The whole hook, for what wraps it: a rank may have been forked, or have run
            # its last check, under the warning filters of another item.
            item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
        except BaseException as error:  # Exit and KeyboardInterrupt pass through pytest
            said = f"{type(error).__name__} ended the check: "
            return raised(error, time.monotonic() - started, said)
        finally:
            item.config.pluginmanager.unregister(watcher)
        self._channel.send("phase", phase="report")
        used = " ".join(_mesh_name(*key) for key in self.meshes)
        return answer(watcher, time.monotonic() - started) | {"mesh": used}


def _mesh_name(shape: tuple[int, ...], members: tuple[int, ...], names: tuple[str, ...]) -> str:
    ranks = "" if members == tuple(range(len(members))) else f"[{','.join(map(str, members))}]"
    return "x".join(map(str, shape)) + ranks + "(" + ",".join(names) + ")"


def _use_own_pytest_folder(config: pytest.Config, home: Path) -> None:
    """Have tmp_path of each rank in the rank's own folder, which goes with the world."""
    factory = getattr(config, "_tmp_path_factory", None)
    if factory is not None:
        base = home / "pytest"
        base.mkdir(exist_ok=True)
        factory._basetemp = base
