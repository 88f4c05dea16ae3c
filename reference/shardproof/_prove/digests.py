"""Digests of a tensor's bits: computed where the tensor lies, one bucket at a time.

The digest is a sum over the elements, modulo 2^64, of a mixture of an element's bits and of its
place in the whole tensor. A sum has no order: the digests of disjoint shards add up to the digest
of the whole tensor, however it was cut, and no shard has to travel for the comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

BUCKET = 1 << 20
"""Elements that are looked at together. Their places and mixtures take 8 bytes each."""

_MASK = (1 << 64) - 1
# Of splitmix64, as signed numbers.
_PLACE, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, one for each element; two for each of complex128."""
    tensor = tensor.detach()
    if tensor.is_conj():
        tensor = tensor.resolve_conj()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor)
    return tensor.view(_BITS[tensor.element_size()])


def buckets(bits: torch.Tensor, bucket: int = BUCKET) -> Iterator[tuple[int, torch.Tensor]]:
    """(first flat index, elements in logical order) of pieces of at most a bucket."""
    if bits.is_contiguous():
        flat = bits.view(-1)
        for start in range(0, flat.numel(), bucket):
            yield start, flat[start : start + bucket]
        return
    if bits.numel() <= bucket:
        if bits.numel():
            yield 0, bits.reshape(-1)
        return
    row = bits.numel() // bits.shape[0]
    step = max(1, bucket // row)
    for first in range(0, bits.shape[0], step):
        some = bits[first : first + step]
        if step > 1:
            yield first * row, some.reshape(-1)
        else:  # a row may be larger than a bucket
            for start, piece in buckets(some[0], bucket):
                yield first * row + start, piece


def digest(tensor: torch.Tensor, places: Places | None = None) -> int:
    """The digest of the bits of a plain tensor whose elements lie at `places` of a whole one."""
    bits = bits_of(tensor)
    per_element = bits.numel() // max(tensor.numel(), 1)
    total = 0
    for start, piece in buckets(bits):
        where = torch.arange(start, start + piece.numel(), device=piece.device)
        if places is not None:
            if per_element > 1:
                where = places(where // per_element) * per_element + where % per_element
            else:
                where = places(where)
        mixed = where.mul_(_PLACE).add_(piece.to(torch.int64))
        mixed ^= mixed >> 31
        mixed.mul_(_FIRST)
        mixed ^= mixed >> 27
        mixed.mul_(_SECOND)
        mixed ^= mixed >> 30
        total += int(mixed.sum())
    return total & _MASK


def sum_of(digests: Sequence[int]) -> int:
    """The digest of a whole tensor from those of disjoint parts that cover it."""
    return sum(digests) & _MASK


class Places:
    """Flat indices in the local tensor -> flat indices in the whole one."""

    def __init__(
        self,
        shape: Sequence[int],
        indices: Sequence[torch.Tensor | range],
        local: Sequence[int],
        start: int = 0,
    ) -> None:
        """For each dimension of the whole tensor: which of its indices the local tensor has.

        Where only a run of these elements is here, it begins at `start`.
        """
        self.start = start
        self.local = tuple(local)
        self.indices = indices
        self.strides = [1] * len(shape)
        for dim in range(len(shape) - 2, -1, -1):
            self.strides[dim] = self.strides[dim + 1] * shape[dim + 1]
        whole = [isinstance(i, range) and len(i) == n for i, n in zip(indices, shape, strict=True)]
        first = indices[0] if indices else range(0)
        self.offset = (
            first.start * self.strides[0]
            if all(whole[1:]) and isinstance(first, range) and indices
            else None
        )
        """Where only rows are cut, and follow each other: the place of the first element."""

    def __call__(self, flat: torch.Tensor) -> torch.Tensor:
        """Places of these elements of the local tensor."""
        if self.start:
            flat = flat + self.start
        if self.offset is not None:
            return flat + self.offset
        found = torch.zeros_like(flat)
        for dim in range(len(self.local) - 1, -1, -1):
            at = flat % self.local[dim]
            flat = flat // self.local[dim]
            indices = self.indices[dim]
            at = at + indices.start if isinstance(indices, range) else indices.to(at.device)[at]
            found += at * self.strides[dim]
        return found
