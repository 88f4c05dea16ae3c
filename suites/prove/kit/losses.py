"""Losses that are planted into right jobs, and how a proof has to name each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prove.kit import jobs, plants
from prove.kit.jobs import Job

Plant = Callable[[int], Job]
"""Makes the faulty job of this rank."""


@dataclass(frozen=True)
class Loss:
    """One planted loss."""

    what: str
    plant: Plant
    names: str
    """The tensor that a finding has to name."""
    ranks: tuple[int, ...] | None
    """The ranks that it has to name; None: any."""
    roads: tuple[str, ...]
    where: tuple[str, ...]
    """Where it has to be found: roads, inventory or coverage."""
    severity: str = "loss"
    first: str = ""
    """The first differing element."""
    defect: str = ""
    world: int = 2


LOSSES: dict[str, Loss] = {
    loss.what: loss
    for loss in (
        Loss(
            "one bit of a replica differs on one rank",
            plants.replica_bit,
            "up.weight",
            (1,),
            ("sharded",),
            ("inventory",),
            first="[15, 7]",
        ),
        Loss(
            "one bit of a replicated DTensor differs on one rank",
            plants.dtensor_replica_bit,
            "router",
            (1,),
            ("sharded",),
            ("inventory",),
            first="[2]",
        ),
        Loss(
            "an optimizer moment of a replica differs on one rank",
            plants.moment_of_one_rank,
            "exp_avg of down.weight",
            (1,),
            ("sharded",),
            ("inventory",),
            first="[0, 0]",
        ),
        Loss(
            "a step counter differs on one rank",
            plants.step_of_one_rank,
            "step of up.bias",
            (1,),
            ("sharded",),
            ("inventory",),
        ),
        Loss(
            "a learning rate differs on one rank",
            plants.rate_of_one_rank,
            "lr of param_groups[0]",
            (1,),
            ("sharded",),
            ("inventory",),
        ),
        Loss(
            "experts are renumbered on each rank",
            plants.experts_renumbered,
            "experts.0.weight",
            (1,),
            ("dcp",),
            ("inventory", "dcp"),
            first="[0, 0]",
        ),
        Loss(
            "a padded flat buffer is cut without a placement",
            plants.padded_flat_buffer,
            "experts.0.weight",
            (1,),
            ("dcp",),
            ("inventory", "dcp"),
            first="[0]",
        ),
        Loss(
            "a buffer has other data on each rank",
            plants.buffer_of_its_own,
            "seen",
            (1,),
            ("broadcast",),
            ("inventory", "broadcast"),
        ),
        Loss(
            "a hook drops a key on one rank",
            plants.key_dropped_on_one_rank,
            "up.weight",
            (1,),
            ("full", "broadcast"),
            ("full", "broadcast"),
            "unsafe",
            defect="SP-033",
        ),
        Loss(
            "a hook drops a key on all ranks",
            plants.key_dropped_on_all,
            "up.bias",
            (0, 1),
            ("sharded", "dcp"),
            ("sharded", "dcp"),
            "unsafe",
        ),
        Loss(
            "a load keeps one old tensor on one rank",
            plants.old_tensor_kept,
            "down.weight",
            (1,),
            ("sharded", "full"),
            ("sharded", "full"),
        ),
        Loss(
            "a load keeps an old buffer",
            plants.buffer_not_loaded,
            "seen",
            (0, 1),
            ("sharded", "full"),
            ("sharded", "full"),
        ),
        Loss(
            "a road saves in a narrower dtype",
            plants.narrower_dtype,
            "up.weight",
            (0, 1),
            ("dcp", "full"),
            ("dcp", "full"),
        ),
        Loss(
            "a load changes the dtype",
            plants.dtype_changed_by_the_load,
            "up.weight",
            (0, 1),
            ("sharded",),
            ("sharded",),
        ),
        Loss(
            "two ranks swap an optimizer moment",
            plants.moment_swapped_between_ranks,
            "exp_avg of up.weight",
            (0, 1),
            ("dcp", "sharded"),
            ("dcp", "sharded"),
        ),
        Loss(
            "two ranks exchange their shards of a weight",
            plants.shards_exchanged,
            "up.weight",
            (0, 1),
            ("dcp", "sharded"),
            ("dcp", "sharded"),
        ),
        Loss(
            "a load gives each moment the values of the other",
            plants.moments_exchanged,
            "exp_avg of up.weight",
            (0, 1),
            ("sharded",),
            ("sharded",),
        ),
        Loss(
            "a load forgets the step on one rank",
            plants.step_forgotten,
            "step of up.weight",
            (1,),
            ("sharded", "dcp"),
            ("sharded", "dcp"),
        ),
        Loss(
            "a load forgets the learning rate",
            plants.rate_forgotten,
            "lr of param_groups[0]",
            (0, 1),
            ("sharded", "dcp"),
            ("sharded", "dcp"),
        ),
        Loss(
            "tied weights come apart in a load",
            plants.tie_lost,
            "twin.weight",
            (0, 1),
            ("sharded",),
            ("sharded",),
        ),
        Loss(
            "frozen weights train after a load",
            plants.frozen_trains,
            "frozen.weight",
            (0, 1),
            ("sharded",),
            ("sharded",),
        ),
        Loss(
            "a parameter is detached from its module",
            plants.parameter_detached,
            "down.bias",
            (0, 1),
            ("sharded",),
            ("coverage",),
        ),
        Loss(
            "the optimizer trains a layer that the model no longer has",
            plants.optimizer_of_another_layer,
            "(parameter 4 of param_groups[0])",
            (0, 1),
            ("sharded",),
            ("coverage",),
        ),
        Loss(
            "a buffer is not persistent",
            lambda _: jobs.ddp(),
            "scale",
            (0, 1),
            ("sharded",),
            ("coverage",),
            "note",
        ),
        Loss(
            "a plain attribute holds a tensor",
            plants.attribute,
            "running['ema']",
            (0, 1),
            ("sharded",),
            ("coverage",),
            "note",
        ),
        Loss(
            "a transposed weight is broadcast",
            plants.transposed,
            "weight",
            (1,),
            ("broadcast",),
            ("broadcast",),
            defect="SP-051",
        ),
        Loss(
            "a tensor subclass is broadcast",
            plants.subclass_broadcast,
            "weight",
            (0, 1),
            ("broadcast",),
            ("broadcast",),
            "unsafe",
        ),
        Loss(
            "padded shards claim an unpadded shape",
            plants.shards_too_large,
            "flat",
            (1,),
            ("sharded",),
            ("inventory",),
        ),
        Loss(
            "ranks have other shapes under one name",
            plants.other_shapes,
            "table",
            (0, 1),
            ("sharded",),
            ("inventory",),
        ),
        Loss(
            "ranks disagree about a placement",
            plants.other_placements,
            "odd",
            (0, 1),
            ("sharded",),
            ("inventory",),
        ),
        Loss(
            "tensor parallelism under DDP: parameters vanish after a forward",
            lambda _: jobs.ddp_tp(),
            "up.weight",
            (0, 1, 2, 3),
            ("dcp",),
            ("coverage",),
            defect="SP-001",
            world=4,
        ),
        Loss(
            "FSDP1 over tensor parallelism: the moments of other rows are loaded",
            lambda _: jobs.fsdp1_tp(),
            "exp_avg of up.weight",
            (1,),
            ("dcp",),
            ("dcp",),
            defect="SP-072",
            world=4,
        ),
        Loss(
            "FSDP1 on a CPU: a full optimizer state with one moment twice",
            lambda _: jobs.fsdp1(),
            "exp_avg of up.weight",
            (0,),
            ("broadcast",),
            ("broadcast",),
            defect="SP-083",
        ),
        Loss(
            "FSDP1 on a CPU: a full state dict that ends the process",
            lambda _: jobs.fsdp1(),
            "",
            None,
            ("broadcast",),
            ("broadcast",),
            "unsafe",
            defect="SP-070",
        ),
    )
}
"""By what is planted."""


def missing(loss: Loss, proof: Any) -> str:
    """What the proof does not say of the loss; empty where it says all."""
    for where in loss.where:
        found = [
            finding
            for finding in proof.findings
            if finding.where == where and finding.severity == loss.severity
        ]
        named = [
            finding
            for finding in found
            if finding.name == loss.names
            or (loss.names and loss.names in finding.what)
            or (not loss.names and finding.defect == loss.defect)
        ]
        if not named:
            return f"{where} does not name {loss.names}: {[str(f) for f in proof.findings]}"
        if loss.ranks is not None and not any(
            set(loss.ranks) <= set(finding.ranks) for finding in named
        ):
            return f"{where} names ranks {[f.ranks for f in named]}, expected {loss.ranks}"
        place = f"element {loss.first}" if where == "inventory" and loss.first else ""
        if not any(place in finding.first for finding in named):
            return f"{where} names {[f.first for f in named]}, expected {loss.first}"
        if loss.defect and not any(finding.defect == loss.defect for finding in named):
            return f"{where}: {[(f.defect, str(f)) for f in named]}, expected {loss.defect}"
    return ""
