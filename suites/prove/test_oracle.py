"""What prove believes: digests that add up, and placements that say what DTensor does."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from defects import catalogue
from shardproof._prove import known_losses
from shardproof._prove.digests import bits_of, buckets, digest, sum_of
from shardproof._prove.placements import Part, part_of, whole

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.bool,
    torch.uint8,
    torch.int64,
    torch.uint16,
    torch.complex64,
    torch.complex128,
]


def _filled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    drawn = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(1))
    numbers = drawn + torch.arange(drawn.numel()).reshape(shape) % 7
    return numbers.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shards_add_up_to_the_whole(dtype: torch.dtype) -> None:
    """The digests of shards, cut in any way, add up to that of the whole tensor."""
    full = _filled((7, 5, 3), dtype)
    expected = digest(full)
    for sizes in ((2,), (4,), (2, 2), (3, 2)):
        for placements in itertools.product([Shard(0), Shard(1), Shard(2)], repeat=len(sizes)):
            found = {}
            for at in itertools.product(*map(range, sizes)):
                part = part_of(full.shape, placements, sizes, at)
                found[part] = digest(_cut(full, part), part.places())
            assert sum_of(list(found.values())) == expected, (sizes, placements)


def _cut(full: torch.Tensor, part: Part) -> torch.Tensor:
    for dim, runs in enumerate(part.runs):
        kept = [i for start, stop in runs for i in range(start, stop)]
        full = full.index_select(dim, torch.tensor(kept, dtype=torch.int64))
    return full


def test_a_part_is_what_dtensor_holds() -> None:
    """Placements say the same elements as DTensor's own cuts, uneven and strided ones, too."""
    full = torch.arange(11 * 3).reshape(11, 3)
    cases: list[tuple[list[Any], tuple[int, ...]]] = [
        ([Shard(0)], (4,)),
        ([Shard(0)], (3,)),
        ([Shard(1)], (4,)),
        ([Shard(0), Shard(0)], (2, 3)),
        ([Replicate(), Shard(0)], (2, 2)),
        ([_StridedShard(0, split_factor=2), Shard(0)], (2, 2)),
    ]
    for placements, sizes in cases:
        for at in itertools.product(*map(range, sizes)):
            expected = full
            for placement, size, coordinate in zip(placements, sizes, at, strict=True):
                if isinstance(placement, _StridedShard):
                    pieces = [
                        _chunks(piece, size, placement.dim)[coordinate]
                        for piece in _chunks(expected, int(placement.split_factor), placement.dim)
                    ]
                    expected = torch.cat(pieces, placement.dim)
                elif isinstance(placement, Shard):
                    expected = _chunks(expected, size, placement.dim)[coordinate]
            part = part_of(full.shape, placements, sizes, at)
            assert torch.equal(_cut(full, part), expected), (placements, at)
            assert part.local_shape == tuple(expected.shape)


def _chunks(tensor: torch.Tensor, parts: int, dim: int) -> list[torch.Tensor]:
    found = list(tensor.chunk(parts, dim))
    empty = tensor.narrow(dim, 0, 0)
    return found + [empty] * (parts - len(found))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_bit_and_any_place_counts(dtype: torch.dtype) -> None:
    """One bit changed, and two elements exchanged, have other digests."""
    full = _filled((6, 4), dtype)
    changed = full.clone()
    if dtype is torch.bool:
        changed[5, 3] = not changed[5, 3]
    else:
        bits_of(changed).view(-1)[-1] ^= 1
    assert digest(changed) != digest(full)
    exchanged = full.clone()
    exchanged[0, 0], exchanged[5, 3] = full[5, 3].clone(), full[0, 0].clone()
    same = torch.equal(bits_of(exchanged), bits_of(full))
    assert (digest(exchanged) == digest(full)) == same


def test_layout_in_memory_does_not_count() -> None:
    """A transposed tensor has the digest of its copy, and is read in pieces of a bucket."""
    full = torch.arange(40.0).reshape(5, 8).t()
    assert digest(full) == digest(full.contiguous())
    for bucket in (1, 3, 5, 7, 100):
        pieces = list(buckets(bits_of(full), bucket))
        assert all(len(piece) <= bucket for _, piece in pieces)
        assert torch.equal(torch.cat([p for _, p in pieces]), bits_of(full).reshape(-1))
        assert [start for start, _ in pieces] == list(
            itertools.accumulate([0, *(len(piece) for _, piece in pieces[:-1])])
        )


def test_a_flat_run_has_its_place() -> None:
    """A run of a flattened part, as FSDP1 cuts, is told in indices of the whole tensor."""
    part = Part((4, 6), (((2, 4),), ((0, 6),)), (5, 8))
    assert [part.index(i) for i in range(3)] == [(2, 5), (3, 0), (3, 1)]
    assert part.local_shape == (3,)
    full = torch.arange(24.0).reshape(4, 6)
    rest = [Part((4, 6), (((2, 4),), ((0, 6),)), run) for run in ((0, 5), (8, 12))]
    upper = Part((4, 6), (((0, 2),), ((0, 6),)))
    digests = [digest(full[:2], upper.places())]
    for one in (part, *rest):
        assert one.flat is not None
        digests.append(digest(full[2:].reshape(-1)[slice(*one.flat)], one.places()))
    assert sum_of(digests) == digest(full, whole((4, 6)).places())


def test_defects_are_of_the_catalogue() -> None:
    """Each id that prove gives is one of the catalogue, and is mended where prove says so."""
    known = catalogue.read()
    for rule in known_losses._RULES:
        assert rule.defect in known, rule.defect
        mended = "install" in known[rule.defect].mended_by
        assert rule.mended == mended, f"{rule.defect}: install() mends it: {mended}"
