"""The unsharded run that a trainee has to equal, step for step, and how the two are compared.

A trainee keeps less than the whole of each parameter, gradient and optimizer state. What it must
keep is cut from the whole model's, which is trained on the full batch in the same process; no
function of the set takes part in the comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from conformance.kit.compare import assert_same
from conformance.kit.layouts import part
from integration.kit.models import Model
from integration.kit.recipes import Trainee

Kinds = dict[str, torch.Tensor]
"""Of one parameter: `value`, `grad` where it has one, and each entry of the optimizer's state."""

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=2**-3, momentum=0.5, foreach=False),
    "adamw": lambda model: torch.optim.AdamW(
        model.parameters(), lr=2**-6, weight_decay=2**-4, foreach=False
    ),
}
"""SGD's rates are dyadic: it stays exact. foreach wants all DTensors of a model on one mesh."""


@dataclass(frozen=True)
class Regime:
    """How a model is trained."""

    steps: int = 5
    accumulate: int = 1
    """Backwards per step."""
    no_sync: bool = False
    """Whether all backwards of a step but the last are made without synchronisation."""
    clip: float | None = None
    """Gradients are cut to this absolute value, which acts on each element by itself."""
    evaluate: bool = False
    """Evaluate under no_grad before the first step and after each."""


PLAIN = Regime()


class Pair:
    """A trainee and the oracle, trained in lockstep."""

    def __init__(
        self,
        trainee: Trainee,
        optimizer: str = "sgd",
        *,
        change: Callable[[nn.Module], Any] = lambda _: None,
    ) -> None:
        self.trainee = trainee
        self.model: Model = trainee.model
        self.oracle = self.model.build().to(trainee.device)
        change(self.oracle)
        self.ours = OPTIMIZERS[optimizer](trainee.wrapped)
        self.theirs = OPTIMIZERS[optimizer](self.oracle)
        self.exact = self.model.exact and optimizer == "sgd"
        self.steps = 0

    def train(self, regime: Regime, what: str) -> None:
        """Train both, and compare all that there is to compare after each part of a step."""
        if regime.evaluate:
            self.evaluate(f"{what}: evaluation before the first step")
        for _ in range(regime.steps):
            self.step(f"{what}: step {self.steps}", regime)
            if regime.evaluate:
                self.evaluate(f"{what}: evaluation after step {self.steps - 1}")

    def step(self, what: str, regime: Regime = PLAIN) -> None:
        self.zero_grad()
        for micro in range(regime.accumulate):
            salt, last = self.steps * regime.accumulate + micro, micro == regime.accumulate - 1
            sync = last or not regime.no_sync
            self.backward(f"{what}: backward {micro}", salt, regime.accumulate, sync=sync)
        if regime.clip is not None:
            for module in (self.trainee.wrapped, self.oracle):
                nn.utils.clip_grad_value_(module.parameters(), regime.clip, foreach=False)
        self.update(what)

    def zero_grad(self) -> None:
        # Through both ways of clearing: zeros must take part in no sum twice.
        to_none = self.steps % 2 == 0
        self.ours.zero_grad(set_to_none=to_none)
        self.theirs.zero_grad(set_to_none=to_none)

    def backward(self, what: str, salt: int = 0, share: int = 1, *, sync: bool = True) -> None:
        """A forward and backward of both, each over its rows of the batch of that salt."""
        rows = 2 * self.trainee.replicas
        without: AbstractContextManager[Any] = nullcontext() if sync else self.trainee.no_sync()
        with without:
            loss = self.trainee.loss(salt, rows)
            (loss / share).backward()
        inputs, targets = self.model.batch(salt, rows)
        with torch.no_grad():
            mine = self.model.loss(
                self.oracle(self.trainee.mine(inputs)), self.trainee.mine(targets)
            )
        self.agree(loss.detach(), mine, f"{what}: loss")
        device = self.trainee.device
        (self.model.loss(self.oracle(inputs.to(device)), targets.to(device)) / share).backward()

    def update(self, what: str) -> None:
        """A step of both optimizers, gradients compared before, values and state after it."""
        self.compare(f"{what}: before the optimizer")
        self.ours.step()
        self.theirs.step()
        self.steps += 1
        self.compare(f"{what}: after the optimizer")

    def evaluate(self, what: str) -> None:
        inputs, _ = self.model.batch(500 + self.steps, 2 * self.trainee.replicas)
        mine = self.trainee.mine(inputs)
        for module in (self.trainee.wrapped, self.oracle):
            module.eval()
        with torch.no_grad():
            output = self.trainee.wrapped(mine)
            assert not output.requires_grad, f"{what}: the output has a graph"
            self.agree(output, self.oracle(mine), what)
        for module in (self.trainee.wrapped, self.oracle):
            module.train()

    def compare(self, what: str) -> None:
        """Every value, gradient and optimizer state of the trainee is its part of the oracle's."""
        expected = kinds(self.oracle, self.theirs)
        for name, kind, got, wanted in held(self.trainee, self.ours, expected, what):
            self.agree(got, wanted, f"{what}: {name}, {kind}")

    def agree(self, got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        if self.exact:
            assert_same(got, expected, what)
        else:
            assert type(got) is torch.Tensor, f"{what}: a {type(got).__name__}"
            # Float64 that is summed in another order: 1e-15 a sum, and a few dozen of them on top
            # of each other; AdamW divides by roots of squares that are as small as its eps.
            torch.testing.assert_close(
                got.cpu(), expected.cpu(), rtol=1e-9, atol=1e-11, msg=lambda said: f"{what}: {said}"
            )


def kinds(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Kinds]:
    """By the parameter's name: what there is to compare."""
    found = {}
    for name, param in module.named_parameters():
        of_this: Kinds = {"value": param.detach()}
        if param.grad is not None:
            of_this["grad"] = param.grad
        of_this.update(optimizer.state.get(param, {}))
        found[plain_name(name)] = of_this
    return found


def plain_name(name: str) -> str:
    """A parameter's name without what FSDP1 puts into it."""
    return name.replace("_fsdp_wrapped_module.", "")


def held(
    trainee: Trainee, optimizer: torch.optim.Optimizer, expected: dict[str, Kinds], what: str
) -> Iterator[tuple[str, str, torch.Tensor, torch.Tensor]]:
    """(name, kind, what the trainee has, what it must have), for all of both."""
    got = kinds(trainee.plain, optimizer)
    if isinstance(trainee.wrapped, FullyShardedDataParallel):
        wanted = tp_local(trainee, expected)
        if any(name.endswith("_flat_param") for name in got):
            wanted = flattened(wanted, got)
        got = gathered(trainee, got, what)
        for name, of_this in got.items():
            for kind, value in of_this.items():
                full = wanted.get(name, {}).get(kind)
                if full is not None and kind != "step":
                    flat = full.flatten()
                    of_this[kind] = value[: len(flat)]
                    wanted[name][kind] = flat
    else:
        wanted = {
            name: {
                kind: value if kind == "step" else mine(trainee, name, value, got)
                for kind, value in of_this.items()
            }
            for name, of_this in expected.items()
        }
    assert set(got) == set(wanted), f"{what}: parameters {list(got)}, expected {list(wanted)}"
    for name, of_this in wanted.items():
        assert set(got[name]) == set(of_this), (
            f"{what}: {name} has {sorted(got[name])}, expected {sorted(of_this)}"
        )
        for kind, value in of_this.items():
            has = got[name][kind]
            yield name, kind, has.to_local() if isinstance(has, DTensor) else has, value


def mine(trainee: Trainee, name: str, full: torch.Tensor, got: dict[str, Kinds]) -> torch.Tensor:
    """This rank's part of a tensor of the parameter's shape."""
    value = got.get(name, {}).get("value")
    if isinstance(value, DTensor):
        return part(full, value.device_mesh, value.placements)
    return part(full, trainee.tp, trainee.layout[name])


def tp_local(trainee: Trainee, expected: dict[str, Kinds]) -> dict[str, Kinds]:
    """What tensor parallelism leaves to this rank of each tensor."""
    return {
        name: {
            kind: value if kind == "step" else part(value, trainee.tp, trainee.layout[name])
            for kind, value in of_this.items()
        }
        for name, of_this in expected.items()
    }


def gathered(trainee: Trainee, got: dict[str, Kinds], what: str) -> dict[str, Kinds]:
    """FSDP1's flat chunks put together over the ranks that it shards over."""
    group = trainee.grid["dp"].get_group()
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(
        everyone, {n: {k: v.cpu() for k, v in o.items()} for n, o in got.items()}, group=group
    )
    whole: dict[str, Kinds] = {}
    for name in got:
        # A rank that holds no element of a parameter has no gradient and no state for it.
        holders = [one[name] for one in everyone if one[name]["value"].numel()]
        for of_this in holders[1:]:
            assert set(of_this) == set(holders[0]), (
                f"{what}: {name}: ranks hold {[sorted(holder) for holder in holders]}"
            )
        whole[name] = {
            kind: value if kind == "step" else torch.cat([one[kind] for one in holders])
            for kind, value in holders[0].items()
        }
    return whole


def flattened(wanted: dict[str, Kinds], got: dict[str, Kinds]) -> dict[str, Kinds]:
    """The tensors of each of FSDP1's units one after the other, under the flat parameter's name."""
    units: dict[str, list[Kinds]] = {name: [] for name in got}
    for name, of_this in wanted.items():
        inside = [u for u in units if name.startswith(u.removesuffix("_flat_param"))]
        units[max(inside, key=len)].append(of_this)
    return {
        unit: {
            kind: value if kind == "step" else torch.cat([o[kind].flatten() for o in members])
            for kind, value in members[0].items()
        }
        for unit, members in units.items()
    }
