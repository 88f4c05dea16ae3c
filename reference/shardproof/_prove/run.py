"""prove(): inventory, claims, roads, coverage; and everything as it was."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from shardproof._prove import claims as claims_of
from shardproof._prove import room as rooms
from shardproof._prove.coverage import uncovered
from shardproof._prove.described import describe, listed
from shardproof._prove.exchange import Exchange
from shardproof._prove.findings import LOSS, NOTE, UNSAFE, Finding
from shardproof._prove.groups import SpareGroups
from shardproof._prove.inventory import Inventory, take
from shardproof._prove.known_losses import Traits, ends_the_process, name_defect, traits_of
from shardproof._prove.models import check_models, models_in
from shardproof._prove.modules import Modules
from shardproof._prove.optimizers import Optimizers
from shardproof._prove.peaks import Peaks
from shardproof._prove.proof import Proof
from shardproof._prove.reclaim import plain_and_different, reclaim
from shardproof._prove.roads import Job, Road, chosen
from shardproof._prove.saved import whole_digests
from shardproof._prove.snapshot import Snapshot
from shardproof._prove.step import digests_after
from shardproof._prove.travel import Cell, Travels


class WrongUseError(ValueError):
    """Some rank called prove with what it cannot take; raised alike on all ranks."""


def prove(
    model: nn.Module | Sequence[nn.Module],
    optimizer: Any = None,
    *,
    scheduler: Any = None,
    step: Callable[[], Any] | None = None,
    roads: str | Sequence[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    snapshot: str | os.PathLike[str] = "auto",
    limit: float = 600.0,
    progress: bool = True,
) -> Proof:
    """Say whether the checkpoints of this job are whole: every rank calls, after wrapping.

    Takes an inventory of all tensors, compares what ranks claim to hold alike, then saves, spoils,
    loads and compares over each road of torch's public API. Leaves the job as it was, bit for bit,
    also after an error or an interrupt.

    Args:
        model: as it trains, wrapped or not; a list where a rank of a pipeline has several stages.
        optimizer: an optimizer, or several; None: the model alone.
        scheduler: named where no road holds it.
        step: one step of training on the same data each time. Without it the optimizer steps on
            gradients that prove sets.
        roads: some of shardproof.prove_roads(); all that the job can use by default.
        folder: for checkpoint files, seen by all ranks; a temporary one on one machine.
        snapshot: "cpu", "disk", a folder, or "auto": memory where it has room.
        limit: seconds within which a rank that dies or hangs is named by the others.
        progress: whether rank 0 says on stderr what it does.

    Returns:
        The proof, the same on all ranks.

    Raises:
        WrongUseError: an argument is wrong on some rank.
        NoRoomError: there is no room for the snapshot or the files. Nothing was touched.
        RankLostError: a rank died or hangs. The others have their state back.

    """
    exchange = Exchange(limit * 2 / 3)
    say = _Progress(exchange.rank == 0 and progress)
    wrong: Exception | None = None
    taken: list[Road] = []
    optimizers = Optimizers()
    models: list[nn.Module] = []
    try:
        taken = chosen(roads, distributed=not exchange.alone)
        optimizers = Optimizers(optimizer)
        models = models_in(model)
        check_models(models, optimizers)
    except Exception as error:
        wrong = error
    _agree(exchange, wrong, [road.name for road in taken])
    try:
        return _prove(
            models,
            optimizers,
            scheduler,
            step,
            taken,
            roads is not None,
            folder,
            snapshot,
            limit,
            exchange,
            say,
        )
    except BaseException as error:
        exchange.leave(error)
        raise


def _prove(
    models: list[nn.Module],
    optimizers: Optimizers,
    scheduler: Any,
    step: Callable[[], Any] | None,
    roads: list[Road],
    asked: bool,
    folder: str | os.PathLike[str] | None,
    snapshot: str | os.PathLike[str],
    limit: float,
    exchange: Exchange,
    say: _Progress,
) -> Proof:
    started = time.monotonic()
    peaks = Peaks()
    modules = Modules(models)
    modules.reshard()
    kept = Snapshot(modules, optimizers, scheduler)
    files = kept.nbytes if any(road.files for road in roads) else 0
    items = take(modules, optimizers, exchange.rank).items.values()
    on_device = any(item.tensor.device.type != "cpu" for item in items)
    needs = rooms.needs_of(roads, items, exchange.rank, on_device=on_device)
    room = rooms.find(exchange, kept.nbytes, files, needs, snapshot, folder)
    if asked and room.lacking:
        rooms.give_up(room, exchange)
    say(room.announcement())
    touched = False
    try:
        with peaks.of("snapshot"):
            _together(exchange, "snapshot", lambda: kept.fill(room.snapshot))
        touched = True
        with peaks.of("inventory"):
            before = take(modules, optimizers, exchange.rank)
            before.measure()
        say(f"inventory of {len(before.items)} tensors")
        every = exchange.all("inventory", [item.told() for item in before.items.values()])
        claims = claims_of.collect(every)
        traits = traits_of(modules)
        if not traits.fsdp1 and plain_and_different(claims):
            claims = _reclaimed(models, before, exchange, claims)
        proof = Proof(describe(models, optimizers, exchange.size, room.announcement(), len(claims)))
        with peaks.of("comparison"):
            proof.general += claims_of.compare(claims, before, exchange)
        proof.general += claims_of.compare_values(
            exchange.all("numbers", before.values_told()), every
        )
        proof.general += uncovered(
            claims,
            exchange.all("strays", before.strays),
            exchange.all("untrained", before.untrained),
            exchange.all("stateful", before.stateful),
            scheduler,
        )
        travels = Travels(
            models,
            optimizers,
            before,
            kept,
            exchange,
            SpareGroups(limit / 3),
            whole_digests(claims),
            room.folder,
            traits,
            step,
            {
                key: {int(told["digest"], 16) for told in claim.holders.values()}
                for key, claim in claims.items()
                if claim.any["synced"] is not None
            },
        )
        if optimizers or step is not None:
            travels.continued = _baseline(travels, proof)
        _take_all(travels, roads, proof, peaks, say, room, traits)
        for finding in proof.findings:
            name_defect(finding, traits)
        for cell in proof.cells:
            nowhere = [f for f in proof.general if f.where == "coverage" and f.side == cell.side]
            if cell.verdict == "whole" and any(f.severity == LOSS for f in nowhere):
                cell.verdict = "lossy"  # what no road holds this one does not
        proof.inventory = listed(claims)
        proof.cost = _cost(exchange, peaks, room, time.monotonic() - started)
        say("")
        return proof
    finally:
        if touched:
            kept.restore(hooks=step is None)
        kept.close()
        if room.made and exchange.rank == 0:
            shutil.rmtree(room.folder, ignore_errors=True)


def _take_all(
    travels: Travels,
    roads: list[Road],
    proof: Proof,
    peaks: Peaks,
    say: _Progress,
    room: rooms.Room,
    traits: Traits,
) -> None:
    sides = ["model", *(["optimizer"] if travels.optimizers else [])]
    empty = not any(optimizer.state for optimizer in travels.optimizers)
    empty = all(travels.exchange.all("whether the optimizer has state", empty))
    elsewhere = _not_on_first(travels)
    for number, road in enumerate(roads):
        for side in sides:
            if road.only not in ("", side):
                continue
            say(f"{road.name}, {side} ({number + 1} of {len(roads)} roads)")
            cell = Cell(road.name, side)
            defect, why = ends_the_process(road, side, traits)
            if side == "optimizer" and empty:
                cell.verdict = "empty"
            elif road.from_first and elsewhere:
                cell.verdict = "not run"
                cell.why = (
                    f"rank 0 does not have all tensors of the others, such as {elsewhere} (a "
                    "pipeline), and this road loads from rank 0 alone"
                )
            elif road.name in room.lacking:
                cell.verdict, cell.why = "not run", room.lacking[road.name]
            elif road.files and not room.shared:
                cell.verdict = "not run"
                cell.why = "ranks on several machines: name a folder= that all of them see"
            elif why:
                cell.verdict = "unsafe"
                cell.findings.append(
                    Finding(UNSAFE, road.name, side, "crashes", "", why, defect=defect)
                )
            elif not travels.spares.left:
                cell.verdict = "not run"
                cell.why = "roads before it have hung, and no spare connections are left"
            else:
                with peaks.of(f"{road.name}, {side}"):
                    cell = travels.take(road, side)
            proof.cells.append(cell)


def _reclaimed(
    models: list[nn.Module],
    before: Inventory,
    exchange: Exchange,
    claims: dict[str, claims_of.Claim],
) -> dict[str, claims_of.Claim]:
    state, error = {}, None
    try:
        state = Job(models, [], exchange.rank, exchange.size, "model").get()["model"]
    except Exception as raised:  # the roads tell of it
        error = raised
    if any(exchange.agree("the claims of the state dict", error)):
        return claims
    reclaim(before, state, exchange.rank)
    before.measure()
    return claims_of.collect(
        exchange.all("inventory", [item.told() for item in before.items.values()])
    )


def _not_on_first(travels: Travels) -> str:
    """A parameter or buffer that rank 0 lacks; empty where it has all that any rank has."""
    mine = [i.name for i in travels.before.items.values() if i.kind in ("parameter", "buffer")]
    first, *others = travels.exchange.all("names", mine)
    return next((name for names in others for name in names if name not in set(first)), "")


def _cost(exchange: Exchange, peaks: Peaks, room: rooms.Room, seconds: float) -> dict[str, Any]:
    """Of the rank that needed most, in bytes above what the job held before."""
    told = exchange.all("cost", [peaks.cpu, peaks.device])
    own = ("inventory", "comparison")
    return {
        "seconds": round(seconds, 3),
        "snapshot_bytes": room.total,
        "own_peak_bytes": max(one[phase] for each in told for one in each for phase in own),
        "roads_peak_bytes": max(
            (most for each in told for one in each for phase, most in one.items() if "," in phase),
            default=0,
        ),
        "peak_cpu_bytes": {phase: max(one[0][phase] for one in told) for phase in peaks.cpu},
        "peak_device_bytes": {phase: max(one[1][phase] for one in told) for phase in peaks.cpu},
    }


def _baseline(travels: Travels, proof: Proof) -> dict[str, int] | None:
    """Digests after a step without a round trip; taken twice, since a step may differ by itself."""
    seen = []
    for _ in range(2):
        error = None
        try:
            travels.without_gradients()
            with travels.spares.in_place():
                seen.append(
                    digests_after(
                        travels.models, travels.optimizers, travels.step, travels.exchange.rank
                    )
                )
        except Exception as raised:
            error = raised
        finally:
            travels.snapshot.restore(hooks=travels.step is None)
        said = travels.exchange.agree("one step without a round trip", error)
        if any(said):
            rank = next(rank for rank, text in enumerate(said) if text)
            what = f"one more step could not be taken to compare with: {said[rank]}"
            proof.general.append(Finding(NOTE, "step", "optimizer", "step", "", what, [rank]))
            if len(set(said)) > 1:
                travels.spares.broken()
            return None
    same = travels.exchange.all("whether a step can be repeated", seen[0] == seen[1])
    if not all(same):
        what = "one more step has another result each time: it cannot be compared"
        ranks = [rank for rank, one in enumerate(same) if not one]
        proof.general.append(Finding(NOTE, "step", "optimizer", "step", "", what, ranks))
        return None
    return seen[0]


def _together(exchange: Exchange, what: str, action: Callable[[], Any]) -> Any:
    """Do it on all ranks; where it fails on one, all of them raise."""
    result, error = None, None
    try:
        result = action()
    except Exception as raised:
        error = raised
    said = exchange.agree(what, error)
    if any(said):
        rank = next(rank for rank, text in enumerate(said) if text)
        raise RuntimeError(f"prove failed at the {what} on rank {rank}: {said[rank]}") from error
    return result


def _agree(exchange: Exchange, wrong: Exception | None, roads: list[str]) -> None:
    said = exchange.agree("arguments", wrong)
    for rank, text in enumerate(said):
        if text:
            raise WrongUseError(f"rank {rank}: {text.partition(': ')[2]}")
    every = exchange.all("roads", roads)
    for rank, other in enumerate(every):
        if other != every[0]:
            raise WrongUseError(
                f"ranks ask for different roads: {every[0]} on rank 0, {other} on rank {rank}"
            )


class _Progress:
    """Lines on stderr, or nothing."""

    def __init__(self, speaks: bool) -> None:
        self.speaks = speaks

    def __call__(self, text: str) -> None:
        if self.speaks and text:
            print(f"prove: {text}", file=sys.stderr, flush=True)
