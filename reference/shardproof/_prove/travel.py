"""One road, there and back: save, spoil, load, compare; and then one step of training."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from shardproof._prove import alike, compare, other_mesh, saved
from shardproof._prove.compare import Difference
from shardproof._prove.digests import digest
from shardproof._prove.exchange import Exchange
from shardproof._prove.findings import LOSS, NOTE, UNSAFE, Finding, ranks_text
from shardproof._prove.groups import SpareGroups
from shardproof._prove.inventory import Inventory, Item, take
from shardproof._prove.known_losses import Traits
from shardproof._prove.modules import Modules
from shardproof._prove.optimizers import Optimizers
from shardproof._prove.roads import Job, Road
from shardproof._prove.snapshot import Snapshot
from shardproof._prove.spoil import spoil
from shardproof._prove.step import digests_after

TOLD = 200
"""Differences that a rank tells of one road."""
_VICTIM = ("Timed out waiting", "Connection closed", "Connection reset", "timed out", "Broken pipe")


@dataclass
class Cell:
    """A verdict of the table: whole, lossy, unsafe, empty or not run."""

    road: str
    side: str
    verdict: str = "whole"
    why: str = ""
    """Of what was not run."""
    findings: list[Finding] = field(default_factory=list)


_NOTES = ("alias", "container", "not saved", "not spoiled", "buffer of each rank")
"""Kinds of differences that make no verdict worse."""


class RoadFailedError(RuntimeError):
    """A phase of a road raised on some rank."""

    def __init__(self, phase: str, said: list[str]) -> None:
        super().__init__(phase)
        self.phase = phase
        self.said = said

    @property
    def broke_connections(self) -> bool:
        """Whether some rank may have waited for another in a collective."""
        return not all(self.said) or any(_is_victim(text) for text in self.said)

    def findings(self, cell: Cell) -> Iterator[Finding]:
        """What happened, each text once, with its ranks; first who caused it."""
        texts: dict[str, list[int]] = {}
        for rank, text in enumerate(self.said):
            if text:
                texts.setdefault(_short(text, rank), []).append(rank)
        causes = {text: ranks for text, ranks in texts.items() if not _is_victim(text)}
        victims = sorted({r for text, ranks in texts.items() if _is_victim(text) for r in ranks})
        fine = [rank for rank, text in enumerate(self.said) if not text]
        for text, ranks in causes.items():
            what = f"{self.phase} raises {text}"
            if victims:
                what += f", and {ranks_text(victims)} waited for it in a collective"
            yield Finding(UNSAFE, cell.road, cell.side, "raises", "", what, ranks)
        if not causes:
            what = f"{self.phase} hangs: a collective of {ranks_text(victims)} was never answered"
            if fine:
                what += f"; {ranks_text(fine)} had ended it"
            yield Finding(UNSAFE, cell.road, cell.side, "hangs", "", what, victims)


@dataclass
class Travels:
    """What all roads have in common."""

    models: list[torch.nn.Module]
    optimizers: Optimizers
    before: Inventory
    snapshot: Snapshot
    exchange: Exchange
    spares: SpareGroups
    known: dict[str, tuple[list[int], str, int]]
    """Of whole tensors: shape, dtype and digest."""
    folder: Path
    traits: Traits
    step: Callable[[], Any] | None
    synced: dict[str, set[int]]
    """Of buffers that DDP gives to all ranks before each forward: the digests on all ranks."""
    continued: dict[str, int] | None = None
    """Digests after one more step without a round trip; None: it cannot be compared."""

    def take(self, road: Road, side: str) -> Cell:
        """Take the road with the model, or with the optimizer."""
        cell = Cell(road.name, side)
        folder = self.folder / f"{road.name}-{side}"
        if road.files and self.exchange.rank == 0:
            folder.mkdir(exist_ok=True)
        job = Job(self.models, self.optimizers, self.exchange.rank, self.exchange.size, side)
        state: Any = None
        try:
            with self.spares.in_place():
                try:
                    self.without_gradients()
                    if not self._can_gather(road, job, cell):
                        return cell
                    state = self._together("save", lambda: road.save(job, folder))
                    if road.other_mesh:
                        self._merge(cell, self._on_another_mesh(job, folder))
                    else:
                        self._back(road, job, cell, state, folder)
                finally:
                    _ended(state)
        except RoadFailedError as failed:
            cell.findings += failed.findings(cell)
            if failed.broke_connections:
                self.spares.broken()
        finally:
            self._judge(cell)
            self.snapshot.restore(hooks=self.step is None)
            if road.files and self.exchange.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
        return cell

    def _back(self, road: Road, job: Job, cell: Cell, state: Any, folder: Path) -> None:
        side = cell.side
        differences: list[Difference] = []
        if not road.snapshot:
            state, aliased = saved.own_memory(state, set(self.snapshot.storages))
            if aliased and road.offloads:
                what = (
                    f"{len(aliased)} saved tensors lie in live memory in spite of cpu_offload, the "
                    f"first is {aliased[0]}: training on changes them, write them before"
                )
                differences.append(Difference(side, "alias", aliased[0], what))
            held = road.full == "all" or (road.full == "first" and job.rank == 0)
            if held or not (road.full or road.only == "optimizer"):
                expected = self._expected(side)
                differences += saved.check(state, side, self.known, expected, full=held)
        if road.incomplete:
            self._refused(road, job, cell, state, folder)
            return
        spared = spoil(self.before, self.snapshot, Modules(self.models), self.optimizers, side)
        for name, why in spared.items():
            what = f"could not be changed, and a load that keeps it would not be seen: {why}"
            differences.append(Difference(side, "not spoiled", name, what))
        self._together("load", lambda: road.load(job, state, folder))
        after = take(Modules(self.models), self.optimizers, self.exchange.rank)
        differences += compare.compare(self.before, after, self.snapshot)
        for one in differences:
            if one.kind == "values" and self._of_another_rank(after.items[one.key]):
                one.kind, one.what = "buffer of each rank", "takes the value of another rank"
        self._merge(cell, differences)
        whole = not any(finding.severity == LOSS for finding in cell.findings)
        if whole and self.continued is not None:
            self._continue(cell)

    def _refused(self, road: Road, job: Job, cell: Cell, state: Any, folder: Path) -> None:
        """Take a tensor out of the saved state, and see that every rank refuses to load it."""
        key = self.exchange.all("a key", next(iter(state["model"]), ""))[0]
        state["model"].pop(key, None)
        error = None
        try:
            road.load(job, state, folder)
        except Exception as raised:
            error = raised
        said = self.exchange.agree("load", error)
        passed = [rank for rank, text in enumerate(said) if not text]
        if any(map(_is_victim, said)):
            raise RoadFailedError("load", said)
        if passed:
            what = "a load of a state dict that lacks it is not refused, and keeps what was there"
            cell.findings.append(Finding(LOSS, cell.road, cell.side, "accepted", key, what, passed))

    def _together(self, phase: str, action: Callable[[], Any]) -> Any:
        result, error = None, None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own, about its API
                result = action()
        except (Exception, CheckpointException) as raised:
            error = raised
        said = self.exchange.agree(phase, error)
        if any(said):
            _ended(result)
            raise RoadFailedError(phase, said)
        return result

    def _can_gather(self, road: Road, job: Job, cell: Cell) -> bool:
        if not road.full or self.traits.fsdp1 or self.traits.installed:
            return True  # FSDP1 gathers by itself; the reference compares before it gathers
        lines = self._together("save", lambda: alike.lines_of(job, everybody=road.from_first))
        found = alike.disagreement(self.exchange.all("keys to gather", lines))
        key, what, ranks = found
        if key:
            what += (
                "; not tried: torch goes key by key, and hangs, swaps tensors, or ends the process"
            )
            cell.findings.append(
                Finding(UNSAFE, cell.road, cell.side, "keys differ", key, what, ranks)
            )
        return not key

    def _on_another_mesh(self, job: Job, folder: Path) -> list[Difference]:
        mine = self._together("save", lambda: other_mesh.keys_of(job, self.known))
        every = self.exchange.all("tensors for another mesh", mine)
        keys = set(every[0]).intersection(*every[1:])
        digests = self._together("load", lambda: other_mesh.load(job, folder, self.known, keys))
        told = {key: f"{value:x}" for key, value in digests.items()}
        return other_mesh.differences(
            job.side, self.known, self.exchange.all("digests on another mesh", told)
        )

    def without_gradients(self) -> None:
        """As in a job that resumes; torch takes gradients for a sign that training has begun."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = None
        for model in self.models:
            for param in model.parameters():
                param.grad = None

    def _of_another_rank(self, item: Item) -> bool:
        """Whether a buffer that DDP gives to all ranks has the value of one of them."""
        return item.key in self.synced and digest(item.tensor) in self.synced[item.key]

    def _expected(self, side: str) -> set[str]:
        kinds = ("parameter", "buffer") if side == "model" else ("optimizer",)
        return {
            item.name if side == "model" else f"{item.entry} of {item.name}"
            for item in self.before.items.values()
            if item.kind in kinds and not item.name.startswith("param_groups[")
        }

    def _merge(self, cell: Cell, mine: list[Difference]) -> None:
        """Findings of all ranks' differences, each with the ranks that have it."""
        every = self.exchange.all(
            f"what {cell.road} changed", [[one.told() for one in mine[:TOLD]], len(mine)]
        )
        groups: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
        for rank, (told, _) in enumerate(every):
            for one in told:
                groups.setdefault((one["side"], one["kind"], one["key"]), {})[rank] = one
        for (side, kind, key), ranks in groups.items():
            first = next(iter(ranks.values()))
            note = kind in _NOTES
            where = f"{first['first']} on {ranks_text([min(ranks)])}" if first["first"] else ""
            cell.findings.append(
                Finding(
                    NOTE if note else LOSS,
                    cell.road,
                    side,
                    kind,
                    key,
                    first["what"],
                    list(ranks),
                    where,
                )
            )
        more = sum(count - len(told) for told, count in every)
        if more:
            what = f"{more} further differences are not listed"
            cell.findings.append(Finding(LOSS, cell.road, cell.side, "more", "", what))

    def _continue(self, cell: Cell) -> None:
        now = self._together(
            "one step after the load",
            lambda: digests_after(self.models, self.optimizers, self.step, self.exchange.rank),
        )
        assert self.continued is not None
        differences = [
            Difference(
                cell.side,
                "goes on otherwise",
                key,
                "is not what it would be without the round trip, one step later",
            )
            for key in self.continued.keys() | now.keys()
            if self.continued.get(key) != now.get(key) and key not in self.synced
        ]
        self._merge(cell, sorted(differences, key=lambda one: one.key))

    def _judge(self, cell: Cell) -> None:
        severities = {finding.severity for finding in cell.findings}
        if UNSAFE in severities:
            cell.verdict = "unsafe"
        elif LOSS in severities:
            cell.verdict = "lossy"


def _ended(state: Any) -> None:
    """Wait for a save that still runs: nothing may be put back under it."""
    if hasattr(state, "result"):
        with suppress(Exception, CheckpointException):
            state.result()


def _is_victim(text: str) -> bool:
    return any(sign in text for sign in _VICTIM)


def _short(text: str, rank: int) -> str:
    """One line, without what only differs because each rank names itself."""
    if "Traceback (most recent call last)" in text:  # checkpoint's, of the ranks that raised
        text = f"{text.partition(':')[0]}: {text.strip().splitlines()[-1]}"
    line = re.sub(rf"(?i)(\brank\b[^\d]{{0,24}}){rank}\b", r"\1N", " ".join(text.split()))
    line = re.sub(r" at 0x[0-9a-f]+", "", line)
    return line if len(line) < 400 else line[:400] + " ..."
