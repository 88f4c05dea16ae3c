"""What no state dict holds: named, so that the job can save it by itself."""

from __future__ import annotations

from typing import Any

from shardproof._prove.claims import Claim
from shardproof._prove.findings import LOSS, NOTE, Finding


def uncovered(
    claims: dict[str, Claim],
    strays: list[list[str]],
    untrained: list[list[str]],
    stateful: list[list[str]],
    scheduler: Any,
) -> list[Finding]:
    """Findings about what lies outside of parameters, persistent buffers and optimizer state."""
    found = []

    def say(
        severity: str, side: str, kind: str, name: str, what: str, ranks: Any, advice: str
    ) -> None:
        found.append(
            Finding(severity, "coverage", side, kind, name, what, list(ranks), advice=advice)
        )

    stray = _ranks_by_name(strays)
    for name, ranks in stray.items():
        say(
            LOSS, "optimizer", "parameter outside of the model", name,
            "the optimizer trains a tensor that the model does not have: no road saves it",
            ranks,
            "make the optimizer from model.parameters() after the model is wrapped",
        )  # fmt: skip
    for name, ranks in _ranks_by_name(untrained).items():
        say(NOTE, "optimizer", "parameter without an optimizer", name,
            "needs gradients, and no optimizer that prove was given has it", ranks,
            "")  # fmt: skip
    for key, claim in claims.items():
        told = claim.any
        if told["kind"] == "non-persistent buffer":
            say(NOTE, "model", "non-persistent buffer", key,
                "is in no state dict (persistent=False)", claim.holders,
                "make it persistent where its values cannot be computed again")  # fmt: skip
        elif told["kind"] == "attribute" and told["name"] not in stray:
            trains = any(one.get("trains") for one in claim.holders.values())
            say(LOSS if trains else NOTE, "model",
                "parameter that parameters() lacks" if trains else "tensor outside of state dicts",
                key,
                "is a plain attribute that trains: parameters() and state dicts lack it"
                if trains else "is a plain attribute, neither parameter nor buffer: no state dict "
                "has it",
                claim.holders,
                "register it as a parameter" if trains else
                "register it as a buffer where its values cannot be computed again")  # fmt: skip
        elif told["kind"] == "optimizer attribute":
            inner = any(one.get("trains") for one in claim.holders.values())
            say(LOSS if inner else NOTE, "optimizer",
                "state of an inner optimizer" if inner else "tensor outside of state dicts", key,
                "is the state of an optimizer within the optimizer: no state dict has it"
                if inner else "lies beside the state of parameters: no state dict has it",
                claim.holders,
                "give prove, and torch's functions, the inner optimizer" if inner else
                "save it beside the optimizer's state where training depends on it")  # fmt: skip
    for name, ranks in _ranks_by_name(stateful).items():
        say(NOTE, "model", "object with a state dict", name,
            "is a plain attribute with a state dict of its own, which no road saves", ranks,
            "save its state_dict() beside the model's")  # fmt: skip
    schedulers = scheduler if isinstance(scheduler, (list, tuple)) else [scheduler]
    for one in schedulers if scheduler is not None else ():
        say(NOTE, "optimizer", "scheduler", type(one).__name__,
            "is in no state dict of model or optimizer", [],
            "save scheduler.state_dict() beside them")  # fmt: skip
    say(
        NOTE, "model", "random state", "",
        "the state of random number generators is in no state dict", [],
        "save torch.get_rng_state(), and the device's, of each rank beside it where dropout or "
        "sampling must go on alike",
    )  # fmt: skip
    return found


def _ranks_by_name(each: list[list[str]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank, names in enumerate(each):
        for name in names:
            found.setdefault(name, []).append(rank)
    return found
