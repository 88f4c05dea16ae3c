"""Which defect of torch a loss is, by the road, the kind of loss and how the model is wrapped.

The ids are those of suites/defects/catalogue; `ci/defects SP-070` tells one in full. A loss that
fits none has no id: prove names what it sees, and guesses at nothing.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from shardproof._install import is_installed
from shardproof._prove.findings import Finding
from shardproof._prove.modules import Modules
from shardproof._prove.placements import part_of
from shardproof._prove.roads import Road

_INSTALL = "shardproof.install() before the model is wrapped mends it"
_CALLERS = "shardproof.install(callers=True) before the model is wrapped mends it"
_FULL = ("full", "broadcast", "file")


@dataclass(frozen=True)
class Traits:
    """How the job is made, as far as defects depend on it; the same on all ranks."""

    fsdp1: bool
    ddp: bool
    """DistributedDataParallel or replicate()."""
    tp: bool
    """DTensors, or plain tensors that a tensor-parallel transform made of them."""
    cpu: bool
    hybrid: bool
    frozen: bool
    pieces: bool
    """Some rank holds a DTensor in several pieces."""
    unsorted: bool
    """The mesh of some DTensor lists its ranks out of order."""
    torch: tuple[int, int]
    installed: bool

    def told(self) -> dict[str, Any]:
        """For the page."""
        return dict(vars(self))


def traits_of(modules: Modules) -> Traits:
    """Traits of the job."""
    params = [param for _, _, _, param in modules.parameters()]
    tensors = [*params, *(tensor for _, tensor in modules.attributes())]
    fsdp1 = [m for _, m in modules.modules if isinstance(m, FullyShardedDataParallel)]
    localized = any(hasattr(tensor, "_st_info") or _was_dtensor(tensor) for tensor in tensors)
    extended = any(
        extension is not None
        for m in fsdp1
        if (handle := getattr(m, "_handle", None)) is not None
        for extension in handle.flat_param._param_extensions
    )
    return Traits(
        fsdp1=bool(fsdp1),
        ddp=any(type(m).__name__ == "DistributedDataParallel" for _, m in modules.modules)
        or any(_replicated(model) for model in modules.models),
        tp=localized or extended or any(isinstance(tensor, DTensor) for tensor in tensors),
        cpu=all(param.device.type == "cpu" for param in params),
        hybrid=any("HYBRID" in str(m.sharding_strategy) for m in fsdp1),
        frozen=any(not param.requires_grad for param in params),
        pieces=any(map(_in_pieces, tensors)),
        unsorted=any(map(_out_of_order, tensors)),
        torch=_version(),
        installed=is_installed(),
    )


def ends_the_process(road: Road, side: str, traits: Traits) -> tuple[str, str]:
    """(defect, why) of a road that is known to end the process, and must not be tried."""
    if (
        traits.fsdp1
        and traits.cpu
        and traits.torch < (2, 14)
        and side == "model"
        and road.name in ("broadcast", "file")
    ):
        return "SP-070", (
            "was not tried: a full state dict of FSDP1 with cpu_offload reads freed memory on a "
            "CPU, and the process ends by a signal"
        )
    if traits.fsdp1 and traits.cpu and not traits.installed and road.name == "flat":
        return "SP-089", (
            "was not tried: FSDP1 gathers a flat optimizer state in another order on each rank, "
            "and Gloo ends the process when sizes do not fit"
        )
    return "", ""


def name_defect(finding: Finding, traits: Traits) -> None:
    """Give a finding the id of its defect and what to do, where it is a known one."""
    for rule in _RULES:
        if rule.fits(finding, traits):
            finding.defect = rule.defect
            finding.advice = finding.advice or rule.advice
            return
    if finding.where in ("dcp", "dcp-async") and " of param_groups[" in finding.name:
        finding.defect = "SP-091" if finding.what.endswith("is gone") else ""
        finding.advice = (
            "where ranks have param_groups of their own under shared names (SP-091), the flat road "
            "saves them by parameter (flatten_optimizer_state_dict=True)"
        )


@dataclass(frozen=True)
class _Rule:
    defect: str
    roads: tuple[str, ...] = ()
    """Empty: any."""
    side: str = ""
    kinds: tuple[str, ...] = ()
    says: str = ""
    """A pattern that the sentence matches."""
    needs: tuple[str, ...] = ()
    """Traits that the job has."""
    lacks: tuple[str, ...] = ()
    mended: bool = True
    """Whether install() mends it."""
    advice: str = _INSTALL

    def fits(self, finding: Finding, traits: Traits) -> bool:
        """Whether the finding is one of this defect."""
        return (
            (not self.roads or finding.where in self.roads)
            and self.side in ("", finding.side)
            and (not self.kinds or finding.kind in self.kinds)
            and bool(re.search(self.says, finding.what, re.DOTALL))
            and all(getattr(traits, name) for name in self.needs)
            and not any(getattr(traits, name) for name in self.lacks)
            and not (self.mended and traits.installed)
        )


_WRONG = ("values", "shape", "placement", "saved otherwise", "lost", "goes on otherwise")
_RULES = (
    _Rule("SP-037", kinds=("alias",)),
    _Rule(
        "SP-049",
        kinds=("container",),
        advice="make a tuple of it again where your code compares types",
    ),
    _Rule("SP-001", ("coverage",), kinds=("tensor outside of state dicts",
          "parameter that parameters() lacks"), needs=("ddp", "tp")),
    _Rule("SP-001", kinds=("raises",), says="state_dict is empty|KeyError: 0", needs=("ddp", "tp")),
    _Rule("SP-069", side="optimizer", kinds=("rank-own data", *_WRONG), needs=("ddp", "tp"),
          mended=False, advice="save the optimizer of each rank in a file of its own"),
    _Rule("SP-002", side="model", kinds=("rank-own data", *_WRONG), needs=("ddp", "tp")),
    _Rule("SP-083", ("broadcast",), "optimizer", ("values", "saved otherwise"),
          needs=("fsdp1", "cpu"), mended=False, advice="call it without cpu_offload"),
    _Rule("SP-072", side="optimizer", kinds=_WRONG, needs=("fsdp1", "tp"), mended=False,
          advice="use fully_shard instead of FSDP1 where tensor parallelism is below"),
    _Rule("SP-073", ("broadcast",), "optimizer", ("hangs", "raises"), "hangs|waited",
          needs=("fsdp1", "tp"), mended=False, advice="call it without cpu_offload"),
    _Rule("SP-086", side="optimizer", kinds=("raises",), says="is not part of group",
          needs=("fsdp1",), mended=False, advice=_CALLERS),
    _Rule("SP-087", ("dcp", "dcp-async", "dcp-mesh", "flat"), kinds=("raises",),
          says="validate global plan", needs=("pieces",), mended=False,
          advice="redistribute it to Shard placements before the save"),
    _Rule("SP-031", ("broadcast", "file"), kinds=_WRONG, needs=("unsorted",)),
    _Rule("SP-094", ("dcp-mesh",), needs=("unsorted",), mended=False,
          advice="list the ranks of a mesh in rising order"),
    _Rule("SP-088", ("dcp-async",), kinds=("raises",),
          says="'data_ptr', with args: .*ShardedTensor|on an invalid python storage", mended=False,
          advice="pass async_stager=BlockingAsyncStager() for FSDP1, and clones of other tensors"),
    _Rule("SP-089", ("flat",), "optimizer", ("raises", *_WRONG), needs=("fsdp1",), mended=False,
          advice=_CALLERS),
    _Rule("SP-090", side="optimizer", kinds=("raises",),
          says="Expected device to be set|Missing optimizer state for parameter", mended=False,
          advice=_CALLERS),
    _Rule("SP-059", kinds=("raises",), says="is not part of group"),
    _Rule("SP-026", _FULL, "model", ("raises",), needs=("fsdp1", "tp")),
    _Rule("SP-027", kinds=("raises",), says="(?i)invalid scalar type|unsupported dtype"),
    _Rule("SP-032", _FULL, kinds=("keys differ",), says="another order"),
    _Rule("SP-034", _FULL, kinds=("keys differ",), says=r"^is \["),
    _Rule("SP-033", _FULL, kinds=("keys differ",), says="lacks it"),
    _Rule("SP-051", _FULL, kinds=("values",), says="not contiguous"),
    _Rule("SP-076", ("full-flat",), kinds=("raises",), says="KeyError: 'param_groups", mended=False,
          advice="load it unflattened"),
    _Rule("SP-077", ("incomplete",), kinds=("accepted",), mended=False,
          advice="compare the keys before you load"),
    _Rule("SP-078", ("broadcast", "file", "incomplete-broadcast"), kinds=("raises",),
          says="(Missing|Unexpected) .*waited", mended=False,
          advice="compare the keys on rank 0, and tell all ranks"),
)  # fmt: skip


def _was_dtensor(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "_spec", None) is not None and not isinstance(tensor, DTensor)


def _in_pieces(tensor: torch.Tensor) -> bool:
    if not isinstance(tensor, DTensor):
        return False
    sizes = tensor.device_mesh.shape
    return any(
        len(runs) > 1
        for at in itertools.product(*map(range, sizes))
        for runs in part_of(tensor.shape, tensor.placements, sizes, at).runs
    )


def _out_of_order(tensor: torch.Tensor) -> bool:
    if not isinstance(tensor, DTensor):
        return False
    ranks = tensor.device_mesh.mesh
    return any(not ranks.equal(ranks.sort(dim).values) for dim in range(ranks.ndim))


def _replicated(model: nn.Module) -> bool:
    from torch.distributed._composable.contract import _get_registry

    return any("replicate" in (_get_registry(module) or {}) for module in model.modules())


def _version() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", str(torch.__version__))
    return (int(found[1]), int(found[2])) if found else (0, 0)
