"""The cost model of the reference as formulas; COST.md explains them, test_cost.py counts.

Terms: `leaves` of a model, n ranks in the group. A leaf that is sharded over p of its parts leaves
size/p on a rank. Nothing here imports torch, so that it runs where a cluster is planned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.settings import Leaf

BUCKET = 32 << 20
"""Bytes that a call may need besides its result, backend included (SHARDPROOF_BUCKET_MIB)."""
ALONE = BUCKET // 16
"""Bytes from which on a tensor may have a collective of its own."""
AGREEMENT = 64
"""Most bytes with which a rank states what it is about to do, so that all can compare."""
ENTRY = 96
"""Most bytes, besides its name, with which the source of a broadcast describes one tensor."""
STEPS = 4
"""Most collectives that a call needs besides the tensors': to agree, and to tell sizes."""


@dataclass(frozen=True)
class Cost:
    """Bytes and collectives of one call, on the rank that has most of them."""

    payload: int
    """Bytes of tensors that the rank receives: no implementation can do with fewer."""
    overhead: int
    """Most bytes received besides."""
    collectives: int
    """Most collectives issued."""

    @property
    def received(self) -> int:
        """Most bytes received."""
        return self.payload + self.overhead


def _held(leaves: Sequence[Leaf], n: int) -> int:
    return sum(leaf.nbytes // leaf.parts(n) for leaf in leaves)


def _total(leaves: Sequence[Leaf]) -> int:
    return sum(leaf.nbytes for leaf in leaves)


def _transfers(leaves: Sequence[Leaf], piece: int = 0, held: int = 2) -> int:
    """Most collectives for the tensors.

    `piece`: the most bytes of a large one that one collective takes; 0: all of it.
    `held`: how many buckets of the others there are at a time; a fifth of one may stay empty.
    """
    sizes = [leaf.nbytes for leaf in leaves if leaf.nbytes >= ALONE]
    large = sum(math.ceil(size / piece) for size in sizes) if piece else len(sizes)
    shared = sum(leaf.nbytes for leaf in leaves if leaf.nbytes < ALONE)
    return large + math.ceil(5 * held * shared / (4 * BUCKET))


def gather(leaves: Sequence[Leaf], n: int, meshes: int = 1, backend: str = "nccl") -> Cost:
    """`_gather_state_dict` of n ranks: everything that a rank does not hold, once.

    `meshes`: how many meshes or submeshes, of how many dimensions in all, the leaves lie on.
    `backend`: Gloo takes large tensors in pieces, because it needs room for what it receives.
    """
    payload = _total(leaves) - _held(leaves, n)
    most = meshes * STEPS + _transfers(leaves, BUCKET // 2 if backend == "gloo" else 0)
    return Cost(payload, AGREEMENT * (n - 1) * meshes, most)


def broadcast(leaves: Sequence[Leaf], n: int, backend: str = "nccl", device: str = "cuda") -> Cost:
    """`_broadcast_state_dict` to n ranks: what a rank holds of each leaf, and each leaf's entry.

    `backend`, `device`: Gloo takes room on a device for what it scatters, so that there is less
    for buckets, and large tensors go in pieces.
    """
    names = sum(len(leaf.name) for leaf in leaves)
    overhead = AGREEMENT * (n - 1) + 2 * names + ENTRY * len(leaves) + 1024
    takes_room = backend == "gloo" and device != "cpu"
    transfers = _transfers(leaves, BUCKET, held=3) if takes_room else _transfers(leaves)
    return Cost(_held(leaves, n), overhead, 2 * STEPS + transfers)


def distribute(leaves: Sequence[Leaf], n: int) -> Cost:
    """`_distribute_state_dict`: every rank cuts from what it holds; nothing moves."""
    return Cost(0, 0, 0)
