"""DTensors that say what their local tensors contradict, and calls that the contract refuses.

`lies` makes of one DTensor all those that the local data contradict, also where the sizes happen to
fit; `REFUSED` lists for each function what it must refuse, with what the error must name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial

from conformance.kit import fsdp1
from conformance.kit.data import numbers
from conformance.kit.layouts import SS, R, S, dtensor, rows, sharded_tensor
from conformance.kit.refusals import MISFIT, MISSING, SHAPE, Mention
from conformance.kit.tensor_parallel import bag
from conformance.kit.tp_calls import CPU
from conformance.kit.tp_kinds import Seat, laid, nested

MESH = re.compile("(?i)mesh")
PLACED = re.compile("(?i)mesh|placement|shard|partial|dim")
SHAPED = re.compile(SHAPE.pattern + "|volume")
TYPE = re.compile("(?i)tensor")


def around(local: torch.Tensor, like: DTensor) -> DTensor:
    """The DTensor that says of `local` what `like` says of its own."""
    return DTensor(local, like._spec, requires_grad=False)


def lies(like: DTensor) -> Iterator[tuple[str, DTensor]]:
    """Around local tensors of other shapes; of `like` no dimension of the local part is 1."""
    local = like._local_tensor
    for name, wrong in {
        "transposed": local.t().contiguous(),  # as many elements
        "flat": local.reshape(-1),
        "one more dimension": local.unsqueeze(0),
        "fewer rows": local[:-1],
        "more rows": torch.cat([local, local]),
        "no rows": local[:0],
        "fewer columns": local[:, :-1],
        "a scalar": local[0, 0],
    }.items():
        yield name, around(wrong.clone(), like)


class Refused(NamedTuple):
    """A call that must raise, and what the error names."""

    name: str
    call: Callable[[Any], Any]
    mentions: tuple[Mention, ...]
    kinds: tuple[type[Exception], ...] = MISFIT


Refusals = Iterator[Refused]


def given(*args: Any) -> Callable[[Any], Any]:
    """The call of a function with these."""
    return lambda judged: judged(*args)


def _of_extensions(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda judged: call(judged(CPU).post_unflatten_transform)


def _with(call: Callable[[Any], Any], group: Any) -> Callable[[Any], Any]:
    return lambda judged: call(lambda tensor: judged(tensor, group))


def _unflatten(seat: Seat) -> Refusals:
    for mesh, placements in seat.layouts():
        like = laid(numbers(8, 12), mesh, placements)
        for name, lie in lies(like):
            local, what = lie._local_tensor, f"{name} for {placements} on {tuple(mesh.shape)}"
            for trains in (False, True):
                piece = nn.Parameter(local, requires_grad=trains)
                yield Refused(what, given(piece, like._spec), (SHAPE,))


def _extensions(seat: Seat) -> Refusals:
    for what, call, *_ in _unflatten(seat):
        yield Refused(
            what,
            _of_extensions(call),
            (SHAPE,),
        )


def _submodule(seat: Seat) -> Refusals:
    module = bag(child=bag(w=nn.Parameter(numbers(2)), l=nn.ParameterList([numbers(1)])))
    for path in ("v", "child.v", "child.w.v", "other.w", "child..w", "child.l.1", "child.", "."):
        yield Refused(repr(path), given(module, path), (path,), MISSING)
    yield Refused("no path", given(module, ""), (), MISSING)


def _update(seat: Seat) -> Refusals:
    module, good = bag(a=nn.Parameter(numbers(2))), nn.Parameter(numbers(2))
    for name in ("v", "", "a.b"):
        entries = [(module, "a", good), (module, name, good), (module, "a", good)]
        yield Refused(repr(name), given(entries), (repr(name),), MISSING)
    values: tuple[Any, ...] = (1, "a", [good], good.numpy)
    for value in values:
        entries = [(module, "a", good), (module, "a", value)]
        yield Refused(str(type(value)), given(entries), (TYPE,))


def _reconstruct(seat: Seat) -> Refusals:
    localize = seat.subject.function("tensor.parallel.ddp._localize_dtensor")
    for mesh, placements in seat.layouts():
        like = laid(numbers(8, 12), mesh, placements)
        for name, lie in lies(like):
            module: Any = bag(a=nn.Parameter(like), wrong=nn.Parameter(like), z=nn.Parameter(like))
            localize(module)
            module.wrong = nn.Parameter(lie._local_tensor)
            what = f"{name} for {placements} on {tuple(mesh.shape)}"
            yield Refused(what, given(module, ()), (SHAPE, "wrong"))
            mended = bag(wrong=nn.Parameter(lie))
            localize(mended)
            yield Refused(
                f"localized so: {what}",
                given(mended, ()),
                (SHAPE, "wrong"),
            )


def _transform(seat: Seat) -> Refusals:
    for name, call, mentions, kinds in _reconstruct(seat):

        def forward(transform: Any, call: Any = call) -> None:
            def enter(module: Any, _: Any) -> None:
                transform(module)
                module.forward = lambda: None
                module()

            call(enter)

        yield Refused(name, forward, mentions, kinds)


def _described(*others: Any, whole: bool = False) -> Callable[[Seat], Refusals]:
    """What boxes and metadata refuse; `others` are the arguments after the DTensor.

    With `whole` what they say is of the whole tensor, whatever this rank holds.
    """

    def make(seat: Seat) -> Refusals:
        size = seat.world.size
        for placements, mesh in (
            ([R, S(0)], seat.mesh(1, size)),
            ([S(0), R], seat.mesh(size, 1)),
            ([SS(0, 2)], seat.line()),
            ([Partial()], seat.line()),
        ):
            tensor = dtensor(numbers(8, 12), mesh, placements, local=numbers(4, 12))
            name = f"{placements} on {tuple(mesh.shape)}"
            yield Refused(name, given(tensor, *others), (PLACED,))
        for placement in (S(0), S(1), R) if not whole else ():
            for name, lie in lies(laid(numbers(8, 12), seat.line(), [placement])):
                yield Refused(
                    f"{name} for {placement}",
                    given(lie, *others),
                    (SHAPE,),
                )

    return make


def _box_for(seat: Seat) -> Refusals:
    yield from _described(0, whole=True)(seat)
    tensor = laid(numbers(8, 12), seat.line(), [S(0)])
    for idx in (-1, seat.world.size, 99):
        yield Refused(f"shard {idx}", given(tensor, idx), (str(idx),))


def _group(seat: Seat) -> Refusals:
    for shape in ((1, seat.world.size), (seat.world.size, 1)):
        tensor = laid(numbers(8, 12), seat.mesh(*shape), [R, R])
        yield Refused(str(shape), given(tensor), (MESH,))


def _metadata(seat: Seat) -> Refusals:
    for name, call, mentions, kinds in _described(whole=True)(seat):
        yield Refused(
            name,
            _with(call, seat.line().get_group()),
            mentions,
            kinds,
        )
    alone = seat.mesh(seat.world.size, 1).get_group(1)
    tensor = laid(numbers(8, 12), seat.line(), [S(0)])
    yield Refused("another group", given(tensor, alone), (re.compile("(?i)rank|group"),))


def _chunk_tensor(seat: Seat) -> Refusals:
    root = seat.root()
    group, tp = fsdp1.fsdp_mesh(root).get_group(), fsdp1.tp_mesh(root)
    rank, size = group.rank(), group.size()

    def ask(name: str, leaf: Any, *mentions: Mention) -> Refused:
        return Refused(name, given(leaf, rank, size, 0, group), mentions)

    for placement in (S(0), S(1)):
        for name, lie in lies(laid(numbers(8, 12), tp, [placement])):
            yield ask(f"{name} for {placement}", lie, SHAPED)
    yield ask("Partial", dtensor(numbers(8, 12), tp, [Partial()], local=numbers(8, 12)), PLACED)
    yield ask("strided", dtensor(numbers(8, 12), tp, [SS(0, 2)]), PLACED)
    yield ask("two dimensions", laid(numbers(8, 12), root, [S(0), S(1)]), MESH)
    outer, _ = nested(numbers(8, 12), tp, group)
    yield ask("sharded twice", outer, re.compile("(?i)shard"))
    twice = sharded_tensor(numbers(8, 12), rows((8, 12), [2, 2, 4], [0, 0, 1]), tp.get_group())
    yield ask("two shards on one rank", twice, re.compile("(?i)shard"))
    alone = sharded_tensor(numbers(8, 12), rows((8, 12), [8], [1]), tp.get_group())
    yield ask("no shard on one rank", alone, re.compile("(?i)shard"))
    full = numbers(8, 12)
    for name, said in {
        "another rank": (1 - rank, size),
        "no such rank": (size, size),
        "another size": (rank, size + 1),
        "the world's": (seat.world.rank + size, seat.world.size),
    }.items():
        yield Refused(
            name,
            given(full, *said, 0, group),
            (re.compile("(?i)rank|size|world"),),
        )


def _chunk_dtensor(seat: Seat) -> Refusals:
    root = seat.root()
    column, tp, rank = fsdp1.fsdp_mesh(root), fsdp1.tp_mesh(root), fsdp1.fsdp_rank(root)

    def ask(name: str, leaf: Any, mesh: Any, *mentions: Mention) -> Refused:
        return Refused(name, given(leaf, rank, mesh), mentions)

    full = numbers(8, 12)
    for placement in (S(0), S(1), R):
        for name, lie in lies(laid(full, tp, [placement])):
            yield ask(f"{name} for {placement}", lie, column, SHAPE)
    yield ask("no mesh", full, None, MESH)
    yield ask("a root of one dimension", full, seat.line(), MESH)
    for placement in (S(0), S(1)):
        yield ask(f"TP's mesh for {placement}", laid(full, tp, [placement]), tp, MESH)
        yield ask(f"the whole root for {placement}", laid(full, tp, [placement]), root, MESH)
    yield ask("on FSDP's dimension", laid(full, column, [S(0)]), column, MESH)
    other = seat.mesh(2, 2, ranks=[0, 2, 1, 3], names=("dp", "tp"))
    yield ask("of another root", laid(full, other["tp"], [S(0)]), column, MESH)
    sharded = sharded_tensor(full, rows(full.shape, [4, 4]), tp.get_group())
    yield ask("a ShardedTensor", sharded, column, re.compile("ShardedTensor"))


def _pre_load(seat: Seat) -> Refusals:
    sharded = laid(numbers(8, 12), seat.line(), [S(0)])
    values: tuple[Any, ...] = (numbers(2), sharded, None, {}, [numbers(2)])
    for value in values:
        kind = type(value).__name__
        yield Refused(kind, given(value), (re.compile("ShardedTensor"), kind))


REFUSED: dict[str, Callable[[Seat], Refusals]] = {
    "_unflatten_tensor": _unflatten,
    "DTensorExtensions": _extensions,
    "_get_submodule_n_params": _submodule,
    "_update_module_param": _update,
    "_reconstruct_dtensor": _reconstruct,
    "_pre_dp_module_transform": _transform,
    "_get_box": _described(),
    "_get_box_for": _box_for,
    "_get_local_box": _described(),
    "_create_shard_md_from_dt": _described(0),
    "_create_sharded_tensor_md_from_dt": _metadata,
    "_get_dt_pg": _group,
    "_chunk_tensor": _chunk_tensor,
    "_chunk_dtensor": _chunk_dtensor,
    "_pre_load_state_dict": _pre_load,
}
"""Function -> what one rank alone is refused. Those that are not here refuse nothing of their own
input; `_all_gather_dtensor`, which all ranks call together, has checks of its own."""


def _lie(name: str) -> Callable[[DTensor], DTensor]:
    return lambda tensor: dict(lies(tensor))[name]


def together(seat: Seat) -> Iterator[tuple[str, DTensor, Callable[[DTensor], DTensor]]]:
    """For `_all_gather_dtensor`: (name, a DTensor over the root mesh, what makes a lie of it)."""
    root = seat.root()
    for placements in ([S(0), R], [S(0), S(1)], [S(1), S(0)], [R, S(0)], [S(0), S(0)], [R, R]):
        full = numbers(8, 12)
        good = laid(full, root, placements)
        for name in ("transposed", "fewer rows", "more rows"):
            yield f"{name} for {placements}", good, _lie(name)
        yield (
            f"another dtype for {placements}",
            good,
            lambda t: around(t._local_tensor.view(torch.int32), t),
        )


def other_cut(seat: Seat) -> Iterator[tuple[str, DTensor, DTensor]]:
    """(name, a DTensor, another of which as many bytes are gathered, cut otherwise)."""
    root, full = seat.root(), numbers(8, 8)
    for first, second in (
        ([S(0), R], [S(1), R]),
        ([S(0), S(1)], [S(1), S(0)]),
    ):
        name = f"{first} and {second}"
        yield name, laid(full, root, first), laid(full, root, second)
    yield (
        "other global shapes",
        laid(full, root, [S(0), R]),
        laid(numbers(4, 16), root, [S(0), R]),
    )
    yield (
        "other dtypes",
        laid(full, root, [S(0), R]),
        laid(full.view(torch.int32), root, [S(0), R]),
    )
