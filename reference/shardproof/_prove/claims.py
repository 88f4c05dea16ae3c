"""What the ranks say that they hold, compared: replicas that differ, shards that contradict."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from shardproof._prove.digests import BUCKET, bits_of, buckets, digest
from shardproof._prove.exchange import Exchange
from shardproof._prove.findings import LOSS, NOTE, Finding, ranks_text
from shardproof._prove.inventory import Inventory
from shardproof._prove.placements import Part, product

DETAILED = 16
"""How many differing tensors are looked into for the first differing element."""
_FINE = 1024
UNSAVED = ("attribute", "non-persistent buffer", "optimizer attribute")
"""Kinds of tensors that no state dict has."""

Told = dict[str, Any]


@dataclass
class Claim:
    """One tensor, as each rank that has it tells of it."""

    key: str
    holders: dict[int, Told]

    @property
    def side(self) -> str:
        return "optimizer" if self.any["kind"].startswith("optimizer") else "model"

    @property
    def any(self) -> Told:
        return next(iter(self.holders.values()))

    def alike(self) -> list[dict[int, Told]]:
        """Holders of the same part, by part."""
        groups: dict[str, dict[int, Told]] = {}
        for rank, told in self.holders.items():
            part = told["part"]
            if not part["own"]:
                groups.setdefault(str((part, told["dtype"])), {})[rank] = told
        return list(groups.values())


def collect(every: list[list[Told]]) -> dict[str, Claim]:
    """Claims by key, from what each rank told."""
    found: dict[str, Claim] = {}
    for rank, told in enumerate(every):
        for one in told:
            found.setdefault(one["key"], Claim(one["key"], {})).holders[rank] = one
    return found


def compare(claims: dict[str, Claim], mine: Inventory, exchange: Exchange) -> list[Finding]:
    """Findings about claims."""
    found: list[Finding] = _of_some_ranks(claims, exchange.size)
    differing: list[tuple[Claim, list[int], list[int]]] = []
    for claim in claims.values():
        found += _contradictions(claim)
        for group in claim.alike():
            digests = {rank: told["digest"] for rank, told in group.items()}
            if len(set(digests.values())) < 2:
                continue
            usual = _usual(digests)
            others = [rank for rank in digests if rank not in usual]
            differing.append((claim, usual, others))
    for number, (claim, usual, others) in enumerate(differing):
        first = ""
        if number < DETAILED:
            first = _first_difference(claim, usual[0], others[0], mine, exchange)
        found.append(_difference(claim, usual, others, first))
    return found


def compare_values(told: list[dict[str, dict[str, str]]], every: list[list[Told]]) -> list[Finding]:
    """Findings about what is no tensor: hyperparameters and counters, requires_grad, extra states.

    Of ranks that have the same parameters; a pipeline's stages have groups of their own.
    """
    alike: dict[str, list[int]] = {}
    for rank, items in enumerate(every):
        names = sorted(one["name"] for one in items if one["kind"] == "parameter")
        alike.setdefault(str(names), []).append(rank)
    found = []
    for ranks in alike.values():
        for sort, (side, what) in _VALUES.items():
            for key in dict.fromkeys(key for rank in ranks for key in told[rank][sort]):
                values = {rank: told[rank][sort].get(key, "absent") for rank in ranks}
                if len(set(values.values())) > 1:
                    usual = _usual(values)
                    others = [rank for rank in ranks if rank not in usual]
                    differs = what.format(values[others[0]], values[usual[0]], ranks_text(usual))
                    found.append(Finding(LOSS, "inventory", side, "drift", key, differs, others))
    return found


_VALUES = {
    "values": ("optimizer", "is {}, and {} on {}; a checkpoint keeps one for all"),
    "flags": ("model", "requires_grad is {}, and {} on {}: ranks do not train the same"),
    "extra": ("model", "is {}, and {} on {}; a checkpoint keeps one for all"),
}


def _usual(digests: dict[int, str]) -> list[int]:
    """The ranks of the largest group that agrees; of equal ones that with the lowest rank."""
    count = Counter(digests.values())
    most = max(count.values())
    winner = next(value for value in digests.values() if count[value] == most)
    return [rank for rank, value in digests.items() if value == winner]


def _of_some_ranks(claims: dict[str, Claim], size: int) -> list[Finding]:
    """Plain parameters that some ranks lack, while all ranks share others."""
    plain = [
        claim
        for claim in claims.values()
        if claim.any["kind"] == "parameter" and claim.any["layout"] == "plain"
    ]
    if all(len(claim.holders) < size for claim in plain):  # a pipeline
        return []
    what = "is a parameter of these ranks alone, while all ranks share others"
    return [
        Finding(NOTE, "inventory", "model", "on some ranks", claim.key, what, list(claim.holders))
        for claim in plain
        if len(claim.holders) < size and not claim.any["ranks"]
    ]


def _difference(claim: Claim, usual: list[int], others: list[int], first: str) -> Finding:
    told = claim.any
    if told["synced"] is not None:
        return Finding(
            NOTE,
            "inventory",
            claim.side,
            "buffer of each rank",
            claim.key,
            "differs between ranks until the next forward, when DDP gives all ranks that of rank "
            f"{told['synced']}; a checkpoint holds one of them",
            others,
            first,
        )
    if told["kind"] in UNSAVED:
        return Finding(
            NOTE,
            "inventory",
            claim.side,
            "rank-own data",
            claim.key,
            f"is a {told['kind']} with other data than on {ranks_text(usual)}",
            others,
            first,
        )
    if told["layout"] != "plain":
        return Finding(
            LOSS,
            "inventory",
            claim.side,
            "drift",
            claim.key,
            f"replicas have drifted apart: not what {ranks_text(usual)} "
            f"hold{'s' if len(usual) == 1 else ''} ({_layout(told)})",
            others,
            first,
            advice="bring the replicas together again before you save: broadcast them from the "
            "ranks that are right",
        )
    return Finding(
        LOSS,
        "inventory",
        claim.side,
        "rank-own data",
        claim.key,
        "is a plain tensor under a name that ranks share, with other data than on "
        f"{ranks_text(usual)}: replicas that drifted, or shards that no placement describes; a "
        "checkpoint keeps one for all",
        others,
        first,
        advice="make it a DTensor with its placement, or give each rank a name of its own",
    )


def _layout(told: Told) -> str:
    return str(told["layout"])


def _contradictions(claim: Claim) -> list[Finding]:
    found = []

    def say(kind: str, what: str, ranks: list[int]) -> None:
        found.append(
            Finding(LOSS, "inventory", claim.side, kind, claim.key, what, ranks, advice=_ADVICE)
        )

    for rank, told in claim.holders.items():
        if told["contradiction"]:
            say("contradiction", told["contradiction"], [rank])
    if claim.any["kind"] in UNSAVED:
        return found
    shapes: dict[str, list[int]] = {}
    for rank, told in claim.holders.items():
        shapes.setdefault(f"{told['part']['shape']} of {told['dtype']}", []).append(rank)
    if len(shapes) > 1:
        each = "; ".join(f"{shape} on {ranks_text(ranks)}" for shape, ranks in shapes.items())
        plain = all(told["layout"] == "plain" for told in claim.holders.values())
        what = f"ranks claim different whole tensors under one name: {each}"
        say("rank-own data" if plain else "contradiction", what, sorted(claim.holders))
        return found
    absent = sorted(
        {rank for told in claim.holders.values() for rank in told["ranks"]} - set(claim.holders)
    )
    if absent and claim.any["kind"] != "optimizer":
        sort = "DDP" if claim.any["layout"] == "plain" else "mesh"
        say("missing", f"its {sort} has ranks that do not have it", absent)
    parts = {str(t["part"]): t["part"] for t in claim.holders.values() if not t["part"]["own"]}
    if len(parts) != len({str(t["part"]) for t in claim.holders.values()}) or absent:
        return found
    volume = sum(Part.of(part).numel for part in parts.values())
    size = product(claim.any["part"]["shape"])
    if volume < size and claim.any["kind"] != "optimizer":
        say(
            "gap",
            f"the shards of all ranks have {volume} of {size} elements",
            sorted(claim.holders),
        )
    elif volume > size:
        say("overlap", f"the shards of all ranks have {volume} elements where the whole tensor has "
            f"{size}", sorted(claim.holders))  # fmt: skip
    return found


_ADVICE = "no road can save it: build its DTensors from one mesh and one placement on all ranks"


def _first_difference(
    claim: Claim, right: int, wrong: int, mine: Inventory, exchange: Exchange
) -> str:
    """Where two ranks differ first: digests of buckets, then of smaller ones, then the elements."""
    item = mine.items.get(claim.key) if exchange.rank in (right, wrong) else None
    start, stop = 0, None
    for size in (BUCKET, _FINE):
        said = exchange.all(
            f"where {claim.key} differs",
            [] if item is None else _digests(item.tensor, start, stop, size),
        )
        pairs = list(zip(said[right], said[wrong], strict=False))
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if at is None:
            return ""
        start, stop = start + at * size, start + (at + 1) * size
    said = exchange.all(
        f"where {claim.key} differs",
        None if item is None else _elements(item.tensor, start, stop or 0),
    )
    for at, (a, b) in enumerate(zip(said[right][0], said[wrong][0], strict=True)):
        if a != b:
            part = Part.of(claim.holders[wrong]["part"])
            values = f"{said[right][1][at]} on rank {right}, {said[wrong][1][at]} on rank {wrong}"
            return f"element {list(part.index(start + at))}: {values}"
    return ""


def _digests(tensor: torch.Tensor, start: int, stop: int | None, size: int) -> list[str]:
    flat = _flat(tensor)[start:stop]
    return [f"{digest(piece):x}" for _, piece in buckets(flat, size)]


def _elements(tensor: torch.Tensor, start: int, stop: int) -> tuple[list[str], list[str]]:
    flat = tensor.reshape(-1)[start:stop]
    bits = bits_of(flat).reshape(flat.numel(), -1).cpu().tolist()
    return [str(one) for one in bits], [text_of(one) for one in flat]


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    # A copy where the tensor is not contiguous; only of what differs.
    return tensor.reshape(-1)


def text_of(element: torch.Tensor) -> str:
    """A value with all digits that its dtype has."""
    value = element.item()
    return repr(value) if not isinstance(value, float) else f"{value:.17g}"
