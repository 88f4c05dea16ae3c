"""The functions of `tensor.parallel`, each with a small call for every kind of tensor it takes.

The list from which the sweeps draw: a new function is an entry of `FUNCTIONS`, and every dimension
is asked of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.fsdp._common_utils import _FSDPDeviceHandle
from torch.distributed.tensor import DTensor

from conformance.kit import fsdp1
from conformance.kit.boxes import assert_box, boxes
from conformance.kit.compare import assert_same, local
from conformance.kit.data import DTYPES
from conformance.kit.layouts import ONE_D, TWO_D, R, S, part
from conformance.kit.roads import Road
from conformance.kit.subclasses import assert_holds_pair
from conformance.kit.tensor_parallel import bag, fill
from conformance.kit.tp_kinds import (
    Kind,
    Seat,
    chunked,
    cut,
    dtensors,
    flat,
    laid,
    nested,
    plain,
    wrapper,
)

CPU: Any = _FSDPDeviceHandle.from_device(torch.device("cpu"))
"""What FSDP1 hands over when it trains on the CPU."""

Roads = Iterator[tuple[str, Road]]
Trained = Iterator[tuple[Kind, torch.Tensor, DTensor]]
_UTILS, _DDP, _FSDP = (
    "tensor.parallel._data_parallel_utils.",
    "tensor.parallel.ddp.",
    "tensor.parallel.fsdp.",
)


@dataclass(frozen=True)
class Function:
    """A function of the set.

    Attributes:
        path: below the subject's root.
        roads: (a full tensor with two dimensions, where) -> its calls by name. Every rank makes
            the same.
        ranks: how many its worlds have.
        moves: whether its results hold values that the tensors it is given have.
        copies: whether these lie in memory of their own.
        module: whether what it is given is changed, a module, and the tensors in there are not.
        trains: where gradients pass it: (a judged function, a full tensor, where) -> for each kind
            that trains, (the kind, the local tensor, the DTensor whose gradient must arrive there).

    """

    path: str
    roads: Callable[[torch.Tensor, Seat], Roads]
    ranks: int = 2
    moves: bool = True
    copies: bool = False
    module: bool = False
    trains: Callable[[Any, torch.Tensor, Seat], Trained] | None = None

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    def of(self, subject: Any) -> Any:
        """The subject's own."""
        return subject.function(self.path)


def _assert_local(got: torch.Tensor, kind: Kind, full: torch.Tensor, what: str) -> None:
    assert_same(local(got).detach(), kind.local(full), f"{kind.name}, {what}")


# --- _data_parallel_utils ---------------------------------------------------------------------


def _sync_grad_hook(full: torch.Tensor, seat: Seat) -> Roads:
    def road(grad: Any) -> Road:
        return Road(
            lambda judged: judged(grad),
            {"grad": grad},
            lambda got, whole: assert_same(local(got).detach(), whole),
        )

    yield "plain", road(cut(full, seat.line(), None))
    yield "DTensor", road(laid(full, seat.line(), [R]))
    pending: Any = AsyncCollectiveTensor(cut(full, seat.line(), None))
    yield "pending", Road(lambda judged: judged(pending), {"grad": pending.elem}, assert_same)


def _flatten(full: torch.Tensor, seat: Seat) -> Roads:
    for kind in (*plain(full, seat), *dtensors(full, seat)):

        def check(got: Any, whole: torch.Tensor, kind: Kind = kind) -> None:
            _assert_local(got[0], kind, whole, "the tensor")
            spec = kind.leaf._spec if isinstance(kind.leaf, DTensor) else None
            assert got[1] is spec, f"{kind.name}: another spec"

        leaf = kind.leaf
        yield kind.name, Road(lambda judged, leaf=leaf: judged(leaf), {"w": leaf}, check)  # type: ignore[misc]


def _unflatten(full: torch.Tensor, seat: Seat) -> Roads:
    for kind in dtensors(full, seat):
        spec, piece = kind.leaf._spec, kind.local(full)  # type: ignore[attr-defined]
        piece.requires_grad_(kind.leaf.requires_grad)
        if kind.is_parameter:
            piece = nn.Parameter(piece, requires_grad=piece.requires_grad)

        def check(got: Any, whole: torch.Tensor, kind: Kind = kind) -> None:
            assert got.placements == kind.placements, f"{kind.name}: {got.placements}"
            _assert_local(got, kind, whole, "the DTensor")

        yield (
            kind.name,
            Road(
                lambda judged, piece=piece, spec=spec: judged(piece, spec),  # type: ignore[misc]
                {"local": piece},
                check,
            ),
        )


# --- ddp --------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Its forward gives what it holds: the tensors, as it finds them."""

    def forward(self) -> dict[str, Any]:
        held: dict[str, Any] = dict(self.named_parameters(remove_duplicate=False))
        held |= self.named_buffers(remove_duplicate=False)
        for owner, module in self.named_modules():
            prefix = f"{owner}." if owner else ""
            held |= {prefix + n: t for n, t in module.__dict__.items() if isinstance(t, DTensor)}
        return held


def reader(**entries: Any) -> nn.Module:
    """A `Reader` that holds these."""
    return fill(Reader(), entries)


def _module(full: torch.Tensor, seat: Seat) -> tuple[Any, dict[str, Kind]]:
    """One that holds a tensor of each kind under its name, each tied to a second one; the kinds."""
    found = enumerate((*plain(full, seat), *dtensors(full, seat)))
    kinds = {f"w{number}": kind for number, kind in found}
    leaves = {name: kind.leaf for name, kind in kinds.items()}
    first, last = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    return reader(a=first, **leaves, child=bag(**leaves), z=last), kinds


def _leaves(kinds: dict[str, Kind]) -> dict[str, torch.Tensor]:
    return {name: kind.leaf for name, kind in kinds.items()}


def assert_between(module: Any, kinds: dict[str, Kind], whole: torch.Tensor) -> None:
    """Between forwards the module holds local tensors, tied and flagged as they were."""
    for name, kind in kinds.items():
        held, tied = getattr(module, name), getattr(module.child, name)
        assert not isinstance(held, DTensor), f"{kind.name}: a DTensor between forwards"
        assert held is tied, f"{kind.name}: untied"
        _assert_local(held, kind, whole, "between forwards")
        assert isinstance(held, nn.Parameter) is kind.is_parameter, f"{kind.name}: Parameter"
        assert held.requires_grad is kind.leaf.requires_grad, f"{kind.name}: requires_grad"


def assert_inside(held: Any, kinds: dict[str, Kind], whole: torch.Tensor) -> None:
    """What a forward, or a state dict, finds: DTensors where they were, under both names."""
    for name, kind in kinds.items():
        for path in (name, f"child.{name}"):
            sharded = kind.placements is not None
            assert isinstance(held[path], DTensor) is sharded, f"{kind.name}: {path} inside"
            _assert_local(held[path], kind, whole, f"{path} inside")
            if sharded:
                assert held[path].placements == kind.placements, f"{kind.name}: {path} placed"


def _localize(full: torch.Tensor, seat: Seat) -> Roads:
    module, kinds = _module(full, seat)
    yield (
        "module",
        Road(
            lambda judged: judged(module),
            _leaves(kinds),
            lambda _, whole: assert_between(module, kinds, whole),
        ),
    )
    for trains in (None, False, True) if full.dtype is torch.float32 else ():
        sharded: Any = wrapper(full, seat)
        held = sharded if trains is None else nn.Parameter(sharded, requires_grad=trains)
        owner: Any = bag(w=held)

        def check(
            _: Any, whole: torch.Tensor, owner: Any = owner, sharded: Any = sharded
        ) -> None:
            assert_holds_pair(owner.w, type(sharded._local_tensor), whole)

        name = f"wrapper, {'a buffer' if trains is None else f'Parameter, {trains=}'}"
        yield name, Road(lambda judged, owner=owner: judged(owner), {}, check)  # type: ignore[misc]


def _reconstruct(full: torch.Tensor, seat: Seat) -> Roads:
    localize = seat.subject.function(_DDP + "_localize_dtensor")
    module, kinds = _module(full, seat)
    localize(module)

    def check(_: Any, whole: torch.Tensor) -> None:
        held = {n: getattr(module, n) for n in kinds}
        inner = {f"child.{n}": getattr(module.child, n) for n in kinds}
        assert_inside(held | inner, kinds, whole)
        localize(module)
        assert_between(module, kinds, whole)

    yield "module", Road(lambda judged: judged(module, ()), _leaves(kinds), check)


def _transform(full: torch.Tensor, seat: Seat) -> Roads:
    module, kinds = _module(full, seat)

    def check(_: Any, whole: torch.Tensor) -> None:
        for _round in range(2):
            assert_between(module, kinds, whole)
            assert_inside(module(), kinds, whole)
        assert_between(module, kinds, whole)
        assert_inside(module.state_dict(), kinds, whole)

    yield "module", Road(lambda judged: judged(module), _leaves(kinds), check)


def _update(full: torch.Tensor, seat: Seat) -> Roads:
    for kind in (*plain(full, seat), *dtensors(full, seat)):
        old = nn.Parameter(torch.ones(2))
        owner: Any = bag(a=nn.Parameter(torch.ones(2)), w=old, z=nn.Parameter(torch.ones(2)))

        def check(_: Any, whole: torch.Tensor, kind: Kind = kind, owner: Any = owner) -> None:
            assert owner.w is kind.leaf, f"{kind.name}: another tensor"
            _assert_local(owner.w, kind, whole, "replaced")

        entry = (owner, "w", kind.leaf)
        yield (
            kind.name,
            Road(lambda judged, entry=entry: judged([entry]), {"w": kind.leaf}, check),  # type: ignore[misc]
        )


def _submodule(full: torch.Tensor, seat: Seat) -> Roads:
    for kind in (*plain(full, seat), *dtensors(full, seat)):
        if kind.is_parameter:
            owner = bag(w=kind.leaf)
            module = bag(child=bag(owner=owner))

            def check(got: Any, _: Any, owner: Any = owner, kind: Kind = kind) -> None:
                assert got[0] is owner, f"{kind.name}: another owner"
                assert got[1] == "w", f"{kind.name}: {got[1]!r}"

            yield (
                kind.name,
                Road(
                    lambda judged, module=module: judged(module, "child.owner.w"),  # type: ignore[misc]
                    {"w": kind.leaf},
                    check,
                ),
            )


# --- fsdp: boxes and metadata -----------------------------------------------------------------


def _line_kinds(full: torch.Tensor, seat: Seat) -> Iterator[Kind]:
    return dtensors(full, seat, [(seat.line(), p) for p in ONE_D], partial=False)


def _described(call: Callable[[Any, Kind, Seat], Any], check: Callable[..., None]) -> Any:
    def make(full: torch.Tensor, seat: Seat) -> Roads:
        for kind in _line_kinds(full, seat):
            yield (
                kind.name,
                Road(
                    lambda judged, kind=kind: call(judged, kind, seat),  # type: ignore[misc]
                    {"w": kind.leaf},
                    lambda got, whole, kind=kind: check(got, whole, kind, seat),  # type: ignore[misc]
                ),
            )

    return make


def _place(kind: Kind, full: torch.Tensor, seat: Seat, idx: int | None = None) -> Any:
    assert kind.placements is not None
    found = boxes(full.shape, seat.world.size, kind.placements[0])
    return found[kind.mesh.get_local_rank() if idx is None else idx]


def _check_box(got: Any, full: torch.Tensor, kind: Kind, seat: Seat) -> None:
    assert tuple(got[1]) == _place(kind, full, seat)[1], f"{kind.name}: {got}"


def _check_local_box(got: Any, full: torch.Tensor, kind: Kind, seat: Seat) -> None:
    assert_box(got, _place(kind, full, seat), full.shape, kind.name)


def _check_last_box(got: Any, full: torch.Tensor, kind: Kind, seat: Seat) -> None:
    assert_box(got, _place(kind, full, seat, seat.world.size - 1), full.shape, kind.name)


def _check_shard(got: Any, full: torch.Tensor, kind: Kind, seat: Seat) -> None:
    box = (got.shard_offsets, got.shard_sizes)
    assert_box(box, _place(kind, full, seat), full.shape, kind.name)


def _check_metadata(got: Any, full: torch.Tensor, kind: Kind, seat: Seat) -> None:
    assert got.tensor_properties.dtype == full.dtype, f"{kind.name}: {got.tensor_properties}"
    assert tuple(got.size) == tuple(full.shape), f"{kind.name}: {got.size}"
    for number, shard in enumerate(got.shards_metadata):
        box = (shard.shard_offsets, shard.shard_sizes)
        assert_box(box, _place(kind, full, seat, number), full.shape, f"{kind.name} {number}")


def _check_group(got: Any, full: torch.Tensor, kind: Kind, seat: Seat) -> None:
    assert got is kind.mesh.get_group(), f"{kind.name}: another group"


def _rewrite(full: torch.Tensor, seat: Seat) -> Roads:
    places: Any = [f"rank:{rank}/cuda:0" for rank in range(seat.world.size)]
    spec, rank = ChunkShardingSpec(0, places), seat.world.rank
    for kind in plain(full, seat):

        def check(got: Any, _: Any) -> None:
            devices = [str(place.device()) for place in got.placements]
            wanted = ["cpu" if at == rank else "cuda:0" for at in range(seat.world.size)]
            assert devices == wanted, devices

        leaf = kind.leaf
        yield (
            kind.name,
            Road(lambda judged, leaf=leaf: judged(spec, leaf, rank), {"w": leaf}, check),  # type: ignore[misc]
        )


# --- fsdp: chunks -----------------------------------------------------------------------------


def _rank_of(group: Any) -> tuple[int, int]:
    return group.rank(), group.size()


def _tp_kinds(full: torch.Tensor, seat: Seat) -> Iterator[Kind]:
    tp = fsdp1.tp_mesh(seat.root())
    yield from plain(full, seat)
    yield from dtensors(full, seat, [(tp, p) for p in ONE_D], partial=False)


def _rows_of(mine: torch.Tensor, seat: Seat) -> torch.Tensor:
    group = fsdp1.fsdp_mesh(seat.root()).get_group()
    counts = chunked(len(mine), group.size())
    start = sum(counts[: group.rank()])
    return mine[start : start + counts[group.rank()]]


def _innermost(tensor: Any) -> Any:
    (shard,) = tensor.local_shards()
    return _innermost(shard.tensor) if hasattr(shard.tensor, "local_shards") else shard.tensor


def _chunk_tensor(full: torch.Tensor, seat: Seat) -> Roads:
    root = seat.root()
    group, tp = fsdp1.fsdp_mesh(root).get_group(), fsdp1.tp_mesh(root)
    rank, size = _rank_of(group)

    def road(name: str, leaf: Any, mine: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        def check(got: Any, whole: torch.Tensor) -> None:
            assert_same(_innermost(got), _rows_of(mine(whole), seat), name)

        return name, Road(lambda judged: judged(leaf, rank, size, 0, group), {"w": leaf}, check)

    for kind in _tp_kinds(full, seat):
        yield road(kind.name, kind.leaf, kind.local)
    sharded = flat(full, tp.get_group(), chunked(len(full), tp.size()))
    yield road("ShardedTensor", sharded, lambda whole: cut(whole, tp, [S(0)]))


def _chunk_dtensor(full: torch.Tensor, seat: Seat) -> Roads:
    root = seat.root()
    column, rank = fsdp1.fsdp_mesh(root), fsdp1.fsdp_rank(root)
    for kind in _tp_kinds(full, seat):
        held = None if kind.placements is None else kind.placements[0]
        if held == S(0) and len(full) % 4:
            continue  # no placement may tell the truth then, and another dimension is cut

        def check(got: Any, whole: torch.Tensor, held: Any = held, kind: Kind = kind) -> None:
            tp_local = cut(whole, root, fsdp1.unsharded(root, held))
            assert_same(local(got), _rows_of(tp_local, seat), kind.name)

        leaf = kind.leaf
        yield (
            kind.name,
            Road(lambda judged, leaf=leaf: judged(leaf, rank, column), {"w": leaf}, check),  # type: ignore[misc]
        )


def _all_gather(full: torch.Tensor, seat: Seat) -> Roads:
    root = seat.root()
    # Each dtype meets half of the placements, the next dtype the other half.
    some = TWO_D[DTYPES.index(full.dtype) % 2 :: 2]
    for kind in dtensors(full, seat, [(root, p) for p in some], partial=False):

        def check(got: Any, whole: torch.Tensor, kind: Kind = kind) -> None:
            assert kind.placements is not None
            assert type(got) is torch.Tensor, f"{kind.name}: a {type(got).__name__}"
            assert_same(got, cut(whole, root, [R, kind.placements[-1]]), kind.name)

        leaf = kind.leaf
        yield kind.name, Road(lambda judged, leaf=leaf: judged(leaf, root), {"w": leaf}, check)  # type: ignore[misc]


def _pre_load(full: torch.Tensor, seat: Seat) -> Roads:
    root = seat.root()
    tp, column = fsdp1.tp_mesh(root), fsdp1.fsdp_mesh(root)
    alone = flat(full, None, chunked(len(full), seat.world.size))

    def check(got: Any, whole: torch.Tensor) -> None:
        mine = part(whole.view(torch.uint8), seat.line(), [S(0)]).view(whole.dtype)
        assert got[0] is alone, "another tensor"
        assert_same(got[1][0].tensor, mine)

    yield "flat", Road(lambda judged: judged(alone), {"w": alone}, check)
    outer, inner = nested(full, tp, column.get_group())

    def check_inner(got: Any, whole: torch.Tensor) -> None:
        assert got[0] is inner, "not the inner one"
        assert_same(got[1][0].tensor, _rows_of(cut(whole, tp, [S(0)]), seat))

    yield "nested", Road(lambda judged: judged(outer), {"w": inner}, check_inner)


def _extensions(full: torch.Tensor, seat: Seat) -> Roads:
    for kind in (*plain(full, seat), *dtensors(full, seat)):

        def call(judged: Any, kind: Kind = kind) -> Any:
            extensions = judged(CPU)
            flattened, extension = extensions.pre_flatten_transform(kind.leaf)
            if extension is None:
                return flattened, flattened
            return flattened, extensions.post_unflatten_transform(flattened, extension)

        def check(got: Any, whole: torch.Tensor, kind: Kind = kind) -> None:
            _assert_local(got[0], kind, whole, "flattened")
            _assert_local(got[1], kind, whole, "unflattened")

        yield kind.name, Road(call, {"w": kind.leaf}, check)


# --- where gradients pass ---------------------------------------------------------------------


def _trained(full: torch.Tensor, seat: Seat) -> Iterator[Kind]:
    for kind in dtensors(full, seat, partial=False):
        if kind.is_parameter:
            kind.leaf.requires_grad_()
            yield kind


def _through_unflatten(judged: Any, full: torch.Tensor, seat: Seat) -> Trained:
    for kind in _trained(full, seat):
        piece = nn.Parameter(kind.local(full))
        yield kind, piece, judged(piece, kind.leaf._spec)  # type: ignore[attr-defined]


def _through_extensions(judged: Any, full: torch.Tensor, seat: Seat) -> Trained:
    extensions = judged(CPU)
    for kind in _trained(full, seat):
        piece, extension = extensions.pre_flatten_transform(kind.leaf)
        yield kind, piece, extensions.post_unflatten_transform(piece, extension)


def _through_module(full: torch.Tensor, seat: Seat, enter: Callable[[Any], Any]) -> Trained:
    kinds = {f"w{number}": kind for number, kind in enumerate(_trained(full, seat))}
    module = reader(**_leaves(kinds), child=bag(**_leaves(kinds)))
    inside = enter(module)
    for name, kind in kinds.items():
        yield kind, getattr(module, name), inside[name]


def _through_reconstruct(judged: Any, full: torch.Tensor, seat: Seat) -> Trained:
    localize = seat.subject.function(_DDP + "_localize_dtensor")

    def enter(module: Any) -> Any:
        localize(module)
        judged(module, ())
        inside = module.forward()
        localize(module)
        return inside

    return _through_module(full, seat, enter)


def _through_localize(judged: Any, full: torch.Tensor, seat: Seat) -> Trained:
    reconstruct = seat.subject.function(_DDP + "_reconstruct_dtensor")

    def enter(module: Any) -> Any:
        judged(module)
        reconstruct(module, ())
        inside = module.forward()
        judged(module)
        return inside

    return _through_module(full, seat, enter)


def _through_transform(judged: Any, full: torch.Tensor, seat: Seat) -> Trained:
    def enter(module: Any) -> Any:
        judged(module)
        return module()

    return _through_module(full, seat, enter)


FUNCTIONS: tuple[Function, ...] = (
    Function(_UTILS + "sync_grad_hook", _sync_grad_hook),
    Function(_UTILS + "_flatten_tensor", _flatten),
    Function(_UTILS + "_unflatten_tensor", _unflatten, trains=_through_unflatten),
    Function(_DDP + "_get_submodule_n_params", _submodule, moves=False),
    Function(_DDP + "_update_module_param", _update, module=True),
    Function(_DDP + "_localize_dtensor", _localize, module=True, trains=_through_localize),
    Function(_DDP + "_reconstruct_dtensor", _reconstruct, module=True, trains=_through_reconstruct),
    Function(_DDP + "_pre_dp_module_transform", _transform, module=True, trains=_through_transform),
    Function(
        _FSDP + "_get_box", _described(lambda f, k, _: f(k.leaf), _check_box), moves=False
    ),
    Function(
        _FSDP + "_get_box_for",
        _described(lambda f, k, seat: f(k.leaf, seat.world.size - 1), _check_last_box),
        moves=False,
    ),
    Function(
        _FSDP + "_get_local_box",
        _described(lambda f, k, _: f(k.leaf), _check_local_box),
        moves=False,
    ),
    Function(
        _FSDP + "_create_shard_md_from_dt",
        _described(lambda f, k, seat: f(k.leaf, seat.world.rank), _check_shard),
        moves=False,
    ),
    Function(
        _FSDP + "_create_sharded_tensor_md_from_dt",
        _described(lambda f, k, _: f(k.leaf, k.mesh.get_group()), _check_metadata),
        moves=False,
    ),
    Function(
        _FSDP + "_get_dt_pg", _described(lambda f, k, _: f(k.leaf), _check_group), moves=False
    ),
    Function(_FSDP + "_rewrite_spec_if_needed", _rewrite, moves=False),
    Function(_FSDP + "DTensorExtensions", _extensions, trains=_through_extensions),
    Function(_FSDP + "_chunk_tensor", _chunk_tensor, ranks=4, copies=True),
    Function(_FSDP + "_chunk_dtensor", _chunk_dtensor, ranks=4, copies=True),
    Function(_FSDP + "_pre_load_state_dict", _pre_load, ranks=4),
    Function(_FSDP + "_all_gather_dtensor", _all_gather, ranks=4, copies=True),
)


def functions(ranks: int, choose: Callable[[Function], bool] = lambda _: True) -> Any:
    """A mark for a check: it is asked of each of these functions, in a world of that size."""

    def decorate(body: Any) -> Any:
        found = [
            pytest.param(f, id=f.name, marks=pytest.mark.judges(f.path))
            for f in FUNCTIONS
            if f.ranks == ranks and choose(f)
        ]
        return pytest.mark.world(ranks)(pytest.mark.parametrize("function", found)(body))

    return decorate


