"""What the source of a broadcast has, told to all ranks before tensors move."""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from shardproof._core import limits
from shardproof._core.comms.agreement import Failure
from shardproof._core.comms.collectives import broadcast, finish
from shardproof._core.loading.value_checks import plain_full_tensor
from shardproof._core.sharding.domain import Domain
from shardproof._core.tensors.properties import is_opaque, is_ordinary, unwrapped
from shardproof._core.tensors.ties import geometry, maybe_tied
from shardproof._core.tensors.values import bits

_LENGTH = struct.Struct("<q")


class Offer(NamedTuple):
    """What the source has under a key, without the data.

    Attributes:
        kind: ``tensor``, ``scalar`` (0-dim, its bytes travel with the offers), ``value``, or
            ``opaque``: a tensor that cannot be sent, and what it is as the value.
        size: of a tensor.
        dtype: of a tensor.
        flat: whether a tensor is large, and its memory can be sent from where it is, as it is.

    """

    kind: str
    size: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    flat: bool = False


@dataclass
class Offers:
    """All that the source has, by column: most keys are offered like another.

    Attributes:
        keys: in the order of the state dict.
        numbers: of each key its offer.
        kinds: the distinct offers.
        roots: key -> the first key with the same memory, where that is another one.
        values: the bytes of scalars, and values.
        wholes: the full tensors, detached; on the source alone.

    """

    keys: list[Any] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    kinds: list[Offer] = field(default_factory=list)
    roots: dict[Any, Any] = field(default_factory=dict)
    values: dict[Any, Any] = field(default_factory=dict)
    wholes: dict[Any, torch.Tensor] = field(default_factory=dict)

    def number(self, offer: Offer) -> int:
        """That of an offer, a new one for a new offer."""
        if offer not in self.kinds:
            self.kinds.append(offer)
        return self.kinds.index(offer)

    def add(self, key: Any, offer: Offer, value: Any) -> None:
        """Offer something whose value is told."""
        self.keys.append(key)
        self.numbers.append(self.number(offer))
        self.values[key] = value

    def items(self) -> Iterator[tuple[Any, Offer]]:
        """(key, offer) in the order of the state dict."""
        return zip(self.keys, map(self.kinds.__getitem__, self.numbers), strict=True)

    def told(self) -> tuple[Any, ...]:
        """What is sent to the other ranks."""
        columns = list(zip(*self.kinds, strict=True))
        return self.keys, self.numbers, columns, self.roots, self.values

    @staticmethod
    def heard(
        keys: list[Any],
        numbers: list[int],
        columns: list[tuple[Any, ...]],
        roots: dict[Any, Any],
        values: dict[Any, Any],
    ) -> Offers:
        """What :meth:`told` was made of, without the tensors."""
        kinds = list(map(Offer._make, zip(*columns, strict=True)))
        return Offers(keys, numbers, kinds, roots, values)


def offers_of(
    full: dict[str, Any], keys: list[str] | None, device: torch.device
) -> tuple[Offers, Failure | None]:
    """What the source has, in the order of its state dict. ``device`` is the transport's."""
    offers = Offers()
    small: dict[Hashable, int] = {}
    try:
        for key in full if keys is None else dict.fromkeys(keys):
            if key not in full:
                raise KeyError(f"the full state dict lacks {key!r}")
            value = full[key]
            if not isinstance(value, torch.Tensor):
                if keys is not None:
                    raise TypeError(f"{key!r}: expected a full tensor, got {type(value)}")
                offers.add(key, Offer("value"), value)
                continue
            plain = plain_full_tensor(key, value)
            size, dtype, ordinary = plain.shape, plain.dtype, is_ordinary(plain)
            if not ordinary:
                inner = unwrapped(plain)
                if inner is None or is_opaque(inner.layout, dtype):
                    # Whether this is an error is seen where it is wanted.
                    said = f"a {type(plain).__name__} of {dtype} and {plain.layout}"
                    offers.add(key, Offer("opaque", tuple(size), dtype), said)
                    continue
                plain, ordinary = inner, is_ordinary(inner)
            if not plain.dim() and keys is None:
                raw = bits(plain).cpu().reshape(1).view(torch.uint8).numpy().tobytes()
                offers.add(key, Offer("scalar", (), dtype), raw)
                continue
            number = small.get((size, dtype))
            if number is None:
                is_small = math.prod(size) * dtype.itemsize < limits.alone_bytes()
                flat = not is_small and (
                    ordinary
                    and plain.device == device
                    and plain.is_contiguous()
                    and not (plain.is_conj() or plain.is_neg())
                )
                number = offers.number(Offer("tensor", tuple(size), dtype, flat))
                if is_small:
                    small[size, dtype] = number
            offers.keys.append(key)
            offers.numbers.append(number)
            offers.wholes[key] = plain
    except Exception as error:
        return Offers(), Failure.of(error)
    wholes = offers.wholes
    tied = maybe_tied(list(wholes.values()))
    first: dict[Hashable, Any] = {}
    for (key, plain), ask in zip(wholes.items(), tied, strict=False):
        if ask and plain.numel():
            root = first.setdefault(geometry(plain), key)
            if root != key:
                offers.roots[key] = root
    return offers, None


def tell(
    domain: Domain,
    group: dist.ProcessGroup,
    offers: Offers,
    failure: Failure | None,
    meanwhile: Callable[[], None],
) -> tuple[Offers, Failure | None]:
    """Send the source's offers, or its error, to all.

    The source runs ``meanwhile``, which must not raise, while the bytes travel. Two broadcasts.
    """
    if domain.index() != 0:
        head = _as_tensor(bytes(_LENGTH.size), domain.device)
        finish(broadcast(group, head))
        length = int(_LENGTH.unpack(bytes(head.tolist()))[0])
        data = _as_tensor(bytes(length), domain.device)
        finish(broadcast(group, data))
        body = data.cpu().numpy().tobytes()
    else:
        body = _written(domain, offers, failure)
        head = _as_tensor(_LENGTH.pack(len(body)), domain.device)
        data = _as_tensor(body, domain.device)
        # Both at once: the others may still be looking at their targets.
        works = [broadcast(group, head), broadcast(group, data)]
        meanwhile()
        for work in works:
            finish(work)
    # The peers of a process group run the same program: they are trusted as torch trusts them.
    *told, refused = pickle.loads(body)  # noqa: S301
    return Offers.heard(*told), refused


def _written(domain: Domain, offers: Offers, failure: Failure | None) -> bytes:
    """What the source says."""
    if failure is not None:
        failure = Failure(failure.kind, f"{domain.name(0)}: {failure.message}", True)
    try:
        return pickle.dumps((*offers.told(), failure))
    except Exception as error:
        culprit = _unpicklable(offers)
        text = f"{domain.name(0)}: {culprit!r}: expected a value that can be pickled: {error}"
        return pickle.dumps((*Offers().told(), Failure("TypeError", text, True)))


def _unpicklable(offers: Offers) -> Any:
    """The first key that cannot be sent, or whose value cannot."""
    for key in offers.keys:
        try:
            pickle.dumps((key, offers.values.get(key)))
        except Exception:
            return key
    return None


def _as_tensor(data: bytes, device: torch.device) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
