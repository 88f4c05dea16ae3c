"""What ranks make a case's tensors with, and what they call functions through.

Each script that repeats a failure holds a copy: it needs torch alone.
"""

from __future__ import annotations

import pickle
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from generated.data import laid_out, name_of, written
from generated.telling import placed, rank_of

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
        more: dict[str, Any] = {"sort_ranks": False} if unsorted else {}
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
    """What this rank holds of a whole tensor, by its number in the group of each mesh dimension."""
    if over.get_coordinate() is None:
        return full.new_empty(0)
    place = [over.get_group(dim).rank() for dim in range(over.ndim)]
    for size, at, one in zip(over.shape, place, placements(names), strict=True):
        if isinstance(one, _StridedShard):
            groups = _pieces(full, int(one.split_factor), one.dim)
            full = torch.cat([_pieces(g, size, one.dim)[at] for g in groups], one.dim)
        elif isinstance(one, Shard):
            full = _pieces(full, size, one.dim)[at]
    return full.clone()


def dtensor(
    full: torch.Tensor,
    over: DeviceMesh,
    names: Sequence[str],
    how: str = "contiguous",
    wrong: str = "",
) -> DTensor:
    """A DTensor that holds `full`, made without a collective; `wrong`: how its local part lies."""
    local = laid_out(part(full, over, names), how)
    steps = torch.empty(full.shape, device="meta").stride()
    made: DTensor = DTensor.from_local(
        local, over, placements(names), run_check=False, shape=full.shape, stride=steps
    )
    if wrong:
        made._local_tensor = _lie(local, wrong)
    return made


def _lie(local: torch.Tensor, wrong: str) -> torch.Tensor:
    """Another local tensor than the placements give: of another shape, size or dtype."""
    if wrong == "dtype":
        of_its_size = {
            1: (torch.int8, torch.uint8),
            2: (torch.int16, torch.bfloat16),
            8: (torch.int64, torch.float64),
        }
        one, other = of_its_size.get(local.element_size(), (torch.int32, torch.float32))
        return torch.ones(local.shape, dtype=one if local.dtype != one else other)
    if wrong == "turned":  # as many elements
        return local.unsqueeze(0).clone() if local.dim() < 2 else local.movedim(0, -1).clone()
    return local.new_ones((*local.shape[:-1], local.shape[-1] + 1))


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
        written(memory.detach(), values)


def late(here: bool) -> None:
    """Let the other ranks begin the next call first."""
    if here:
        time.sleep(0.2)


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
    return (tuple(spec.mesh.shape), ranks), tuple(map(placed, spec.placements)), tuple(spec.shape)


def infos(info: Any, full: Any) -> dict[Any, Any]:
    """What ranks without the data know of full tensors."""
    return {key: info(value.size(), value.dtype) for key, value in full.items()}


def pending(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, not waited for."""
    from torch.distributed import _functional_collectives as functional

    world: Any = dist.group.WORLD
    return functional.all_reduce(tensor.detach().clone(), "sum", world)


def box(found: Any) -> Any:
    """A box as plain tuples."""
    return tuple(tuple(map(int, part)) for part in found)


def boxes_of(get: Any, tensor: Any, count: int) -> list[Any]:
    """The boxes of all shards, by number."""
    return [box(get(tensor, number)) for number in range(count)]


def described(create: Any, group_of: Any, tensor: Any) -> Any:
    """Metadata of a ShardedTensor: (size, dtype, boxes with their ranks)."""
    meta = create(tensor, group_of(tensor))
    shards = [
        (tuple(s.shard_offsets), tuple(s.shard_sizes), rank_of(s)) for s in meta.shards_metadata
    ]
    return tuple(meta.size), name_of(meta.tensor_properties.dtype), shards


class Net(nn.Module):
    """A module around parameters; names with dots are those of submodules."""

    def __init__(self, named: dict[str, Any]) -> None:
        super().__init__()
        for name, tensor in named.items():
            *above, last = name.split(".")
            owner: nn.Module = self
            for step in above:
                if not hasattr(owner, step):
                    owner.add_module(step, nn.Module())
                owner = getattr(owner, step)
            owner.register_parameter(last, tensor)

    def forward(self, fail: bool) -> dict[str, Any]:
        """The parameters as a forward sees them; or an exception in its midst."""
        found = parameters_of(self)
        if fail:
            raise RuntimeError("on purpose")
        return found


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """Its parameters by name, tied ones under each of theirs."""
    return dict(module.named_parameters(remove_duplicate=False))


def state_of(module: nn.Module) -> dict[str, Any]:
    """Its state dict, without more."""
    return dict(module.state_dict())


def without_grad(call: Any, *args: Any) -> Any:
    """What a call gives in evaluation."""
    with torch.no_grad():
        return call(*args)
