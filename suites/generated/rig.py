"""What a generated case is made of and told in: tensors, meshes, groups, containers, outcomes.

Ranks use it, and each script that repeats a failure holds a copy: it needs torch alone.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import os
import pickle
import random
import threading
import warnings
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

SHORT = 256
"""Bytes of a tensor up to which an outcome holds all of them, and not a digest."""
_SPECIAL: dict[torch.dtype, tuple[int, ...]] = {
    # -0.0, the smallest subnormal, NaNs with a payload (quiet and signalling), infinities, the
    # largest, the largest subnormal, one above 1, as bits.
    torch.float64: (
        *(1 << 63, 1, 0x7FF8DEADBEEF0001, 0x7FF0000000000001, 0x7FF0000000000000, 0xFFF << 52),
        *(0x7FEFFFFFFFFFFFFF, 0x000FFFFFFFFFFFFF, 0x3FF0000000000001, 0xFFF8000000000002),
    ),
    torch.float32: (
        *(1 << 31, 1, 0x7FC0BEEF, 0x7F800001, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x007FFFFF),
        *(0x3F800001, 0xFFC00002),
    ),
    torch.bfloat16: (0x8000, 1, 0x7FC5, 0x7F81, 0x7F80, 0xFF80, 0x7F7F, 0x007F, 0x3F81, 0xFFC2),
    torch.float16: (0x8000, 1, 0x7E05, 0x7C01, 0x7C00, 0xFC00, 0x7BFF, 0x03FF, 0x3C01, 0xFE02),
    torch.int64: ((1 << 53) + 1, 1 << 63, (1 << 63) - 1, (1 << 64) - 1, (1 << 62) + 1, 0),
    torch.uint64: ((1 << 53) + 1, 1 << 63, (1 << 64) - 1, (1 << 63) - 1, (1 << 62) + 1, 0),
    torch.int32: (1 << 31, (1 << 31) - 1, (1 << 24) + 1, (1 << 32) - 1, 0),
}


def _hear_of_complex32() -> None:
    """Let torch warn, once in a process, that complex32 is experimental: here, and unheard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ones(1, dtype=torch.complex32)


_hear_of_complex32()


def pattern(dtype: str, shape: Sequence[int], fill: int) -> torch.Tensor:
    """A tensor of values that tell: 1, 2, 3 ... for fill 0, special bits for 1 to 10, then all bits.

    Neighbours differ, and so do tensors of other fills. What comes out depends on nothing else.
    """
    kind = getattr(torch, dtype)
    count = 1
    for size in shape:
        count *= size
    index = torch.arange(count, dtype=torch.int64)
    if fill == 0 and dtype != "float8_e8m0fnu":
        whole = index % 100 + 1
        made = whole % 2 == 1 if dtype == "bool" else whole.to(torch.float32).to(kind)
        if dtype.endswith(("int64", "int32", "int16", "int8")):
            made = whole.to(kind)
        return made.reshape(tuple(shape))
    width = kind.itemsize
    words = max(width // 8, 1)
    place = torch.arange(count * words, dtype=torch.int64)
    mixed = (place + 1 + fill * 1_000_003) * 0x2545F4914F6CDD1D
    mixed = (mixed ^ (mixed >> 29)) * 0x1B873593CC9E2D51
    mixed = mixed ^ (mixed >> 32)
    if dtype == "bool":
        return (mixed & 1).to(torch.bool).reshape(tuple(shape))
    part = {"complex64": torch.float32, "complex128": torch.float64, "complex32": torch.float16}
    real = part.get(dtype, kind)
    data = mixed.view(torch.uint8).reshape(count * words, 8)[:, : min(width, 8)].contiguous()
    if fill <= 10 and real in _SPECIAL:
        special = _SPECIAL[real]
        raw = b"".join(special[(fill - 1 + at) % len(special)].to_bytes(real.itemsize, "little")
                       for at in range(len(special)))
        table = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(len(special), -1)
        flat = data.reshape(-1, real.itemsize)
        data = table[torch.arange(len(flat)) % len(special)].contiguous()
    return data.reshape(-1).view(kind).reshape(tuple(shape))


def bits(dtype: str, shape: Sequence[int], data: str) -> torch.Tensor:
    """The tensor of these bytes, in hexadecimal."""
    raw = bytearray.fromhex(data)
    if not raw:
        return torch.empty(tuple(shape), dtype=getattr(torch, dtype))
    return torch.frombuffer(raw, dtype=torch.uint8).view(getattr(torch, dtype)).reshape(tuple(shape))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, in the order of its elements."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def laid_out(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The same values in other memory: transposed, sliced, offset."""
    if how == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "sliced" and tensor.dim():
        wide = tensor.new_empty((*tensor.shape[:-1], 2 * tensor.shape[-1]))
        return _written(wide[..., ::2], tensor)
    if how == "offset":
        return _written(tensor.new_empty(tensor.numel() + 5)[3 : 3 + tensor.numel()].view(
            tensor.shape), tensor)
    return tensor


def _written(target: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    wide = target.dtype.is_complex or target.dtype.itemsize > 8
    if wide or not target.numel():
        return target.copy_(values)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    as_bits = integers[target.dtype.itemsize]  # a copy of floats may change NaNs
    target.view(as_bits).copy_(values.view(as_bits))
    return target


def view_of(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """A view of a tensor: all of it, a part, or transposed."""
    if how == "first" and tensor.dim() and tensor.shape[0]:
        return tensor.detach()[:1]
    if how == "transposed" and tensor.dim() > 1:
        return tensor.detach().transpose(0, 1)
    return tensor.detach()


_meshes: dict[Any, Any] = {}
_groups: dict[Any, Any] = {}


def mesh(shape: Sequence[int], ranks: Sequence[int], line: int | None = None) -> DeviceMesh:
    """The mesh of these ranks, or of its dimension `line`; all ranks of the world call it."""
    key = (tuple(shape), tuple(ranks))
    if key not in _meshes:
        table = torch.tensor(list(ranks), dtype=torch.int).reshape(tuple(shape))
        names = tuple(f"d{n}" for n in range(len(shape)))
        _meshes[key] = DeviceMesh("cpu", table, mesh_dim_names=names)
    made = _meshes[key]
    if line is None:
        return made
    if (key, line) not in _meshes:
        _meshes[key, line] = made[f"d{line}"] if made.get_coordinate() is not None else made
    return _meshes[key, line]


def group(ranks: Sequence[int] | None) -> Any:
    """The group of these ranks, numbered in this order; all ranks of the world call it."""
    if ranks is None:
        return None
    key = tuple(ranks)
    if key not in _groups:
        unsorted = list(key) != sorted(key)
        more = {"sort_ranks": False} if unsorted else {}
        _groups[key] = dist.new_group(list(key), **more)
    return _groups[key]


def placements(names: Iterable[str]) -> list[Placement]:
    """S0 for Shard(0), R, SS0x2 for _StridedShard(0, split_factor=2), P or P-max for Partial."""
    found: list[Placement] = []
    for name in names:
        if name.startswith("SS"):
            dim, factor = name[2:].split("x")
            found.append(_StridedShard(int(dim), split_factor=int(factor)))
        elif name.startswith("S"):
            found.append(Shard(int(name[1:])))
        else:
            found.append(Replicate() if name == "R" else Partial(name[2:] or "sum"))
    return found


def _pieces(tensor: torch.Tensor, count: int, dim: int) -> list[torch.Tensor]:
    found = list(torch.chunk(tensor, count, dim))
    return found + [tensor.narrow(dim, tensor.shape[dim], 0)] * (count - len(found))


def part(full: torch.Tensor, over: DeviceMesh, names: Sequence[str]) -> torch.Tensor:
    """What this rank holds of a whole tensor."""
    place = over.get_coordinate()
    if place is None:
        return full.new_empty(0)
    for size, at, placed in zip(over.shape, place, placements(names), strict=True):
        if isinstance(placed, _StridedShard):
            groups = _pieces(full, int(placed.split_factor), placed.dim)
            full = torch.cat([_pieces(g, size, placed.dim)[at] for g in groups], placed.dim)
        elif isinstance(placed, Shard):
            full = _pieces(full, size, placed.dim)[at]
    return full.clone()


def dtensor(
    full: torch.Tensor,
    over: DeviceMesh,
    names: Sequence[str],
    how: str = "contiguous",
    wrong: str = "",
) -> DTensor:
    """A DTensor that holds `full`, made without a collective; `wrong`: shape or dtype is a lie."""
    local = laid_out(part(full, over, names), how)
    if wrong == "shape":
        local = local.new_ones((*local.shape[:-1], local.shape[-1] + 1) if local.dim() else (2,))
    elif wrong == "dtype":
        local = torch.ones(local.shape, dtype=torch.int32 if full.dtype != torch.int32 else
                           torch.float64)
    steps = torch.empty(full.shape, device="meta").stride()
    made: DTensor = DTensor.from_local(
        local, over, placements(names), run_check=False, shape=full.shape, stride=steps
    )
    return made


def sharded(
    full: torch.Tensor, boxes: Sequence[tuple[Any, Any, int]], over: Any, wrong: str = ""
) -> ShardedTensor:
    """A ShardedTensor in boxes of (offsets, sizes, number of the owner in the group)."""
    me = dist.get_rank(over)

    def seat(owner: int) -> int:
        return owner if over is None else dist.get_global_rank(over, owner)

    metadata = [ShardMetadata(list(o), list(s), f"rank:{seat(r)}/cpu") for o, s, r in boxes]
    mine = []
    for meta, (offsets, sizes, owner) in zip(metadata, boxes, strict=True):
        if owner == me:
            region = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            mine.append(LocalShard(full[region].clone(), meta))
    whole = ShardedTensorMetadata(metadata, full.size(), TensorProperties(dtype=full.dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        made = ShardedTensor._init_from_local_shards_and_global_metadata(
            mine, whole, process_group=over
        )
    if wrong == "shape" and made.local_shards():
        first = made.local_shards()[0]
        first.tensor = first.tensor.new_ones((*first.tensor.shape[:-1], first.tensor.shape[-1] + 1))
    return made


def parameter(tensor: torch.Tensor, trains: bool) -> nn.Parameter:
    """The tensor as a Parameter."""
    return nn.Parameter(tensor, requires_grad=trains)


def rewrite(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Write other values into the memory of a tensor, as a step of training does."""
    memory = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    if memory.numel():
        _written(memory.detach(), values)


class Pair(NamedTuple):
    """A namedtuple."""

    first: Any
    second: Any


def with_metadata(items: Iterable[tuple[Any, Any]]) -> OrderedDict[Any, Any]:
    """An OrderedDict with `_metadata`, as a module's state dict is."""
    made: OrderedDict[Any, Any] = OrderedDict(items)
    made._metadata = OrderedDict({"": {"version": 3}})  # type: ignore[attr-defined]
    return made


def counted(items: Iterable[tuple[Any, Any]]) -> defaultdict[Any, Any]:
    """A defaultdict of int."""
    return defaultdict(int, items)


def turned(mapping: Any, rank: int) -> Any:
    """The mapping with its keys in another order on each rank."""
    items = list(mapping.items())
    turn = rank % len(items) if items else 0
    mapping.clear()
    mapping.update(items[turn:] + items[:turn])
    return mapping


def identity(tensor: Any, *_: Any) -> Any:
    """The per-kind function of a walk that changes no tensor."""
    return tensor


def doubled(tensor: Any, *_: Any) -> Any:
    """The per-kind function of a walk that makes a tensor of its own."""
    with torch.no_grad():
        return tensor.detach().clone()


def flat_and_back(flatten: Any, unflatten: Any, state: Any) -> dict[str, Any]:
    """A state dict flat, its paths, and what comes back of it, also by a mapping once pickled."""
    flat, mapping = flatten(state)
    paths = [tuple(path) for path in mapping.values()]
    later = pickle.loads(pickle.dumps(mapping))
    return {
        "flat": flat,
        "paths": paths,
        "back": unflatten(flat, mapping),
        "back by a pickled mapping": unflatten(flat, later),
    }


def visits(traverse: Any, state: Any) -> list[Any]:
    """What a visitor is called with."""
    found: list[Any] = []
    traverse(state, lambda path, value: found.append((tuple(path), value)))
    return found


def flat_tensor(flatten: Any, tensor: Any) -> dict[str, Any]:
    """What `_flatten_tensor` gives, its spec in words."""
    local, spec = flatten(tensor)
    return {"local": local, "spec": spec_in_words(spec)}


def flat_tensor_and_back(flatten: Any, unflatten: Any, tensor: Any) -> Any:
    """A tensor through `_flatten_tensor` and `_unflatten_tensor`."""
    local, spec = flatten(tensor)
    return local if spec is None else unflatten(local, spec)


def spec_in_words(spec: Any) -> Any:
    """A DTensorSpec: (mesh, placements, shape)."""
    if spec is None:
        return None
    ranks = tuple(spec.mesh.mesh.flatten().tolist())
    return (tuple(spec.mesh.shape), ranks), tuple(map(_placed, spec.placements)), tuple(spec.shape)


def pending(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, not waited for."""
    from torch.distributed import _functional_collectives as functional

    return functional.all_reduce(tensor.detach().clone(), "sum", dist.group.WORLD)


def box(found: Any) -> Any:
    """A box as plain tuples."""
    return tuple(tuple(map(int, part)) for part in found)


def boxes_of(get: Any, tensor: Any, count: int) -> list[Any]:
    """The boxes of all shards, by number."""
    return [box(get(tensor, number)) for number in range(count)]


def described(create: Any, group_of: Any, tensor: Any) -> Any:
    """Metadata of a ShardedTensor: (size, dtype, boxes with their ranks)."""
    meta = create(tensor, group_of(tensor))
    shards = [(tuple(s.shard_offsets), tuple(s.shard_sizes), s.placement.rank())
              for s in meta.shards_metadata]
    return tuple(meta.size), _name(meta.tensor_properties.dtype), shards


def process_state() -> dict[str, Any]:
    """What a call may leave changed in the process."""
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "torch's random numbers": hash(bytes(torch.get_rng_state().tolist()[:64])),
        "Python's random numbers": hash(random.getstate()),
        "warning filters": list(map(repr, warnings.filters)),
        "environment": dict(os.environ),
        "threads": threading.active_count(),
        "groups": sorted(_names_of_groups()),
        "determinism": torch.are_deterministic_algorithms_enabled(),
    }


def _names_of_groups() -> list[str]:
    return list(dist.distributed_c10d._world.pg_names.values())


class Teller:
    """Says of values in plain data all that a caller may notice of them.

    Objects and memories are numbered as they are met, over all that one teller tells.
    """

    def __init__(self) -> None:
        self._objects: dict[int, int] = {}
        self._memories: dict[int, int] = {}
        self._kept: list[Any] = []

    def tell(self, value: Any) -> Any:
        """A tree of literals: containers as (type, items, more), leaves as dicts."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, Mapping):
            items = [(repr(key), self.tell(item)) for key, item in value.items()]
            return (type(value).__name__, items, repr(getattr(value, "_metadata", None)))
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            return (type(value).__name__, [(str(n), self.tell(v)) for n, v in enumerate(value)], "")
        return {"kind": type(value).__name__, "value": _said(value)}

    def _tensor(self, value: torch.Tensor) -> dict[str, Any]:
        self._kept.append(value)
        told: dict[str, Any] = {
            "object": self._objects.setdefault(id(value), len(self._objects)),
            "grad": value.requires_grad,
        }
        if isinstance(value, ShardedTensor):
            meta = value.metadata()
            shards = [(tuple(s.metadata.shard_offsets), self._memory(s.tensor))
                      for s in value.local_shards()]
            boxes = [(tuple(s.shard_offsets), tuple(s.shard_sizes), s.placement.rank())
                     for s in meta.shards_metadata]
            return told | {
                "kind": "ShardedTensor",
                "grad": meta.tensor_properties.requires_grad,
                "size": tuple(meta.size),
                "dtype": _name(meta.tensor_properties.dtype),
                "boxes": boxes,
                "shards": shards,
            }
        parameter = isinstance(value, nn.Parameter)
        if isinstance(value, DTensor):
            spec = value._spec
            return told | {
                "kind": "DTensor Parameter" if parameter else "DTensor",
                "size": tuple(value.shape),
                "dtype": _name(value.dtype),
                "placements": tuple(map(_placed, spec.placements)),
                "mesh": (tuple(spec.mesh.shape), tuple(spec.mesh.mesh.flatten().tolist())),
                "local": self._memory(value._local_tensor),
            }
        plain = type(value) in (torch.Tensor, nn.Parameter)
        return told | {
            "kind": "Parameter" if parameter else "Tensor" if plain else type(value).__name__,
            **self._memory(value),
        }

    def _memory(self, tensor: torch.Tensor) -> dict[str, Any]:
        told: dict[str, Any] = {
            "dtype": _name(tensor.dtype),
            "size": tuple(tensor.shape),
            "device": tensor.device.type,
            "stride": strides(tensor),
            "memory": None,
            "bits": "",
        }
        if not tensor.is_meta and tensor.numel():
            storage = tensor.untyped_storage()
            self._kept.append(storage)
            told["memory"] = self._memories.setdefault(storage.data_ptr(), len(self._memories))
            told["bits"] = digest(tensor)
            told["shared"] = tensor.is_shared()
        return told


def strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides that mean something: those of dimensions that have several elements."""
    if tensor.numel() < 2:
        return ()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(step if size > 1 else 0 for size, step in steps)


def digest(tensor: torch.Tensor) -> str:
    """The bytes in hexadecimal; of many of them their BLAKE2 digest."""
    data = raw(tensor).numpy().tobytes()
    return data.hex() if len(data) <= SHORT else "blake2 " + hashlib.blake2b(data).hexdigest()[:32]


def _said(value: Any) -> str:
    if isinstance(value, (set, frozenset)):
        return repr(sorted(value, key=repr))
    return repr(value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _placed(placement: Placement) -> str:
    if isinstance(placement, _StridedShard):
        return f"SS{placement.dim}x{placement.split_factor}"
    if isinstance(placement, Shard):
        return f"S{placement.dim}"
    if isinstance(placement, Partial):
        return "P-" + placement.reduce_op
    return "R" if isinstance(placement, Replicate) else repr(placement)


def attempt(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, Any, list[str]]:
    """("returned", value) or ("raised", exception), and what of the process was left changed."""
    before = process_state()
    try:
        word, value = "returned", call(*args, **kwargs)
    except Exception as error:
        word, value = "raised", error
    after = process_state()
    return word, value, [name for name in before if before[name] != after[name]]


def outcome(
    teller: Teller, word: str, value: Any, changed: list[str], given: Mapping[str, Any]
) -> dict[str, Any]:
    """What a call on this rank came to, in plain data: its result, and the inputs after it."""
    told: dict[str, Any] = {"word": word}
    told["given"] = {name: teller.tell(item) for name, item in given.items()}
    if word == "raised":
        told["error"] = (_public_type(value), f"{value}")
    else:
        told["result"] = teller.tell(value)
    return told | {"changed": changed}


def _public_type(error: BaseException) -> str:
    return type(error).__name__


class Watch:
    """Weak references to tensors, to tell which outlive the call."""

    def __init__(self) -> None:
        self._watched: list[tuple[str, Any]] = []

    def on(self, name: str, tensor: Any) -> None:
        """Watch a tensor, and what it is a view of."""
        self._watched.append((name, weakref.ref(tensor)))

    def living(self) -> list[str]:
        """The names of those that are alive, though nobody should hold them."""
        if any(reference() is not None for _, reference in self._watched):
            gc.collect()
        return [name for name, reference in self._watched if reference() is not None]


def accepts(call: Callable[..., Any], name: str) -> bool:
    """Whether a function has an argument of the name."""
    return name in inspect.signature(call).parameters
