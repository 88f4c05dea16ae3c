"""The manifest of a broadcast: what the source rank has, sent to all ranks first."""

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
from shardproof._core.tensors.properties import is_lazy, is_opaque, is_ordinary, unwrapped
from shardproof._core.tensors.ties import geometry, maybe_tied
from shardproof._core.tensors.values import bits

_LENGTH = struct.Struct("<q")


class ManifestEntry(NamedTuple):
    """What the source has under a key, without the data.

    Attributes:
        kind: ``tensor``, ``scalar`` (0-dim, its bytes travel with the manifest), ``value``, or
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
class Manifest:
    """All that the source has, by column: most keys are offered like another.

    Attributes:
        keys: in the order of the state dict.
        numbers: of each key the index of its entry.
        kinds: the distinct entries.
        roots: key -> the first key with the same memory, where that is another one.
        values: the bytes of scalars, and values.
        wholes: the full tensors, detached; on the source alone.

    """

    keys: list[Any] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    kinds: list[ManifestEntry] = field(default_factory=list)
    roots: dict[Any, Any] = field(default_factory=dict)
    values: dict[Any, Any] = field(default_factory=dict)
    wholes: dict[Any, torch.Tensor] = field(default_factory=dict)

    def number(self, entry: ManifestEntry) -> int:
        """The index of an entry, which is added where it is new."""
        if entry not in self.kinds:
            self.kinds.append(entry)
        return self.kinds.index(entry)

    def add(self, key: Any, entry: ManifestEntry, value: Any) -> None:
        """Add a key whose value travels with the manifest."""
        self.keys.append(key)
        self.numbers.append(self.number(entry))
        self.values[key] = value

    def items(self) -> Iterator[tuple[Any, ManifestEntry]]:
        """(key, entry) in the order of the state dict."""
        return zip(self.keys, map(self.kinds.__getitem__, self.numbers), strict=True)

    def to_columns(self) -> tuple[Any, ...]:
        """What is sent to the other ranks."""
        columns = list(zip(*self.kinds, strict=True))
        return self.keys, self.numbers, columns, self.roots, self.values

    @staticmethod
    def from_columns(
        keys: list[Any],
        numbers: list[int],
        columns: list[tuple[Any, ...]],
        roots: dict[Any, Any],
        values: dict[Any, Any],
    ) -> Manifest:
        """What :meth:`to_columns` was made of, without the tensors."""
        kinds = list(map(ManifestEntry._make, zip(*columns, strict=True)))
        return Manifest(keys, numbers, kinds, roots, values)


def build_manifest(
    full: dict[str, Any], keys: list[str] | None, device: torch.device
) -> tuple[Manifest, Failure | None]:
    """What the source has, in the order of its state dict. ``device`` is the transport's."""
    manifest = Manifest()
    small: dict[Hashable, int] = {}
    try:
        for key in full if keys is None else dict.fromkeys(keys):
            if key not in full:
                raise KeyError(f"the full state dict lacks {key!r}")
            value = full[key]
            if not isinstance(value, torch.Tensor):
                if keys is not None:
                    raise TypeError(f"{key!r}: expected a full tensor, got {type(value)}")
                manifest.add(key, ManifestEntry("value"), value)
                continue
            plain = plain_full_tensor(key, value)
            size, dtype, ordinary = plain.shape, plain.dtype, is_ordinary(plain)
            if not ordinary:
                inner = unwrapped(plain)
                if inner is None or is_opaque(inner.layout, dtype):
                    # Whether this is an error is seen by the rank that has a target.
                    description = f"a {type(plain).__name__} of {dtype} and {plain.layout}"
                    manifest.add(key, ManifestEntry("opaque", tuple(size), dtype), description)
                    continue
                plain, ordinary = inner, is_ordinary(inner)
            if not plain.dim() and keys is None:
                raw = bits(plain).cpu().reshape(1).view(torch.uint8).numpy().tobytes()
                manifest.add(key, ManifestEntry("scalar", (), dtype), raw)
                continue
            number = small.get((size, dtype))
            if number is None:
                is_small = math.prod(size) * dtype.itemsize < limits.alone_bytes()
                flat = not is_small and (
                    ordinary
                    and plain.device == device
                    and plain.is_contiguous()
                    and not is_lazy(plain)
                )
                number = manifest.number(ManifestEntry("tensor", tuple(size), dtype, flat))
                if is_small:
                    small[size, dtype] = number
            manifest.keys.append(key)
            manifest.numbers.append(number)
            manifest.wholes[key] = plain
    except Exception as error:
        return Manifest(), Failure.of(error)
    wholes = manifest.wholes
    tied = maybe_tied(list(wholes.values()))
    first: dict[Hashable, Any] = {}
    for (key, plain), ask in zip(wholes.items(), tied, strict=False):
        if ask and plain.numel():
            root = first.setdefault(geometry(plain), key)
            if root != key:
                manifest.roots[key] = root
    return manifest, None


def broadcast_manifest(
    domain: Domain,
    group: dist.ProcessGroup,
    manifest: Manifest,
    failure: Failure | None,
    meanwhile: Callable[[], None],
) -> tuple[Manifest, Failure | None]:
    """Send the source's manifest, or its error, to all.

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
        body = _pickle_manifest(domain, manifest, failure)
        head = _as_tensor(_LENGTH.pack(len(body)), domain.device)
        data = _as_tensor(body, domain.device)
        # Both at once: the others may still be looking at their targets.
        works = [broadcast(group, head), broadcast(group, data)]
        meanwhile()
        for work in works:
            finish(work)
    # The peers of a process group run the same program: they are trusted as torch trusts them.
    *columns, refusal = pickle.loads(body)  # noqa: S301
    return Manifest.from_columns(*columns), refusal


def _pickle_manifest(domain: Domain, manifest: Manifest, failure: Failure | None) -> bytes:
    """What the source says."""
    if failure is not None:
        failure = Failure(failure.kind, f"{domain.name(0)}: {failure.message}", True)
    try:
        return pickle.dumps((*manifest.to_columns(), failure))
    except Exception as error:
        culprit = _unpicklable(manifest)
        text = f"{domain.name(0)}: {culprit!r}: expected a value that can be pickled: {error}"
        return pickle.dumps((*Manifest().to_columns(), Failure("TypeError", text, True)))


def _unpicklable(manifest: Manifest) -> Any:
    """The first key that cannot be sent, or whose value cannot."""
    for key in manifest.keys:
        try:
            pickle.dumps((key, manifest.values.get(key)))
        except Exception:
            return key
    return None


def _as_tensor(data: bytes, device: torch.device) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
