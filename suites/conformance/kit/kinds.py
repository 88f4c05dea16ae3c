"""Every kind of leaf that a state dict may have, each made from one whole tensor.

A kind is added here, and the checks that sweep over kinds ask it of each function that can be given
such a leaf. All kinds are spread over a one-dimensional mesh of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed import _functional_collectives as funcol
from torch.distributed.tensor import DTensor, Partial

from conformance.kit.layouts import SS, R, S, dtensor, parameter, part, rows, sharded_tensor
from conformance.kit.subclasses import inside, subclass_with

Make = Callable[[torch.Tensor, Any], Any]
"""(the whole tensor, the mesh) -> a leaf that holds it; alike on every rank."""

GATHERED, KEPT, LANDED = "gathered", "kept", "landed"
"""What may be done with a leaf: made whole; copied as what it is; given the values of a whole one.

"""


@dataclass(frozen=True)
class Kind:
    """A kind of leaf.

    Attributes:
        make: gives such a leaf.
        uses: what may be done with it.
        whole: what a gather makes of it; a plain tensor, where nothing is said.
        copied: what a copy of it is; the same, where nothing is said.
        after: what stands in its place when a whole tensor has landed; the leaf itself, where
            nothing is said.
        usual: whether upstream's functions take it, and treat it right.

    """

    make: Make
    uses: frozenset[str]
    whole: Make = lambda full, _: full.clone()
    copied: Make | None = None
    after: Make | None = None
    usual: bool = True

    def landed(self, full: torch.Tensor, mesh: Any) -> Any:
        """What is in the place of such a target when `full` has landed in it."""
        return (self.after or self.make)(full, mesh)

    def copy(self, full: torch.Tensor, mesh: Any) -> Any:
        """What a copy of such a leaf is."""
        return (self.copied or self.make)(full, mesh)


def again(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that is lazily conjugated or negated where the tensor is: clone() carries that out."""
    if tensor.is_conj():
        return again(tensor.conj()).conj()
    if tensor.is_neg():
        return torch._neg_view(again(torch._neg_view(tensor)))
    return tensor.clone()


def spread(full: torch.Tensor) -> torch.Tensor:
    """The same values in every second place of memory."""
    room = torch.empty(*full.shape, 2, dtype=full.dtype, device=full.device)
    return room[..., 0].copy_(full)


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return parameter(tensor, tensor.is_floating_point() or tensor.is_complex())


def _rows(full: torch.Tensor, mesh: Any) -> DTensor:
    return dtensor(full, mesh, [S(0)], local=again(part(full, mesh, [S(0)])))


def _strided_on_one(full: torch.Tensor, mesh: Any) -> DTensor:
    """Rows that lie as anybody expects, but for those of the last rank."""
    mine, last = part(full, mesh, [S(0)]), mesh.get_coordinate()[0] == mesh.size() - 1
    return dtensor(full, mesh, [S(0)], local=spread(mine) if last else again(mine))


def _turned_rows(full: torch.Tensor, mesh: Any) -> DTensor:
    """Rows whose memory goes down the columns."""
    mine = part(full, mesh, [S(0)])
    turned = mine.transpose(0, -1).clone(memory_format=torch.contiguous_format)
    return dtensor(full, mesh, [S(0)], local=turned.transpose(0, -1))


def _conjugated_rows(full: torch.Tensor, mesh: Any) -> DTensor:
    """Rows whose memory holds what torch has to conjugate before it means the same."""
    mine = again(part(full, mesh, [S(0)]))
    if mine.dtype in (torch.complex64, torch.complex128):  # of narrower ones torch quiets NaNs
        pairs = torch.view_as_real(mine)
        pairs[..., 1].neg_()
        mine = mine.conj()
    return dtensor(full, mesh, [S(0)], local=mine)


def _negated_rows(full: torch.Tensor, mesh: Any) -> DTensor:
    """Rows whose memory holds the negatives: torch has to turn their signs when it reads them."""
    mine = again(part(full, mesh, [S(0)]))
    if mine.dtype in (torch.float32, torch.float64):  # of narrower ones torch quiets NaNs
        mine = torch._neg_view(mine.neg())
    return dtensor(full, mesh, [S(0)], local=mine)


def _pending(full: torch.Tensor, mesh: Any) -> DTensor:
    """The first rank adds all of it, the others nothing: -0.0 is what changes no float."""
    mine = again(full)
    if mesh.get_coordinate()[0]:
        mine = torch.zeros_like(full)
        mine = -mine if full.is_floating_point() else mine
    return dtensor(full, mesh, [Partial()], local=mine)


def _unfinished_rows(full: torch.Tensor, mesh: Any) -> DTensor:
    """Rows that a collective is still writing on each rank."""
    mine = part(full, mesh, [S(0)]).contiguous()
    lone = [0] * mesh.size()
    lone[mesh.get_coordinate()[0]] = len(mine)
    return dtensor(full, mesh, [S(0)], local=funcol.all_to_all_single(mine, lone, lone, mesh))


def _unfinished(full: torch.Tensor, mesh: Any) -> Any:
    """A plain tensor that a collective is still writing."""
    mine = full if mesh.get_coordinate()[0] == 0 else torch.empty_like(full)
    return funcol.broadcast(mine, 0, mesh)


def _counts(full: torch.Tensor, size: int) -> list[int]:
    even, more = divmod(len(full), size)
    return [even + (rank < more) for rank in range(size)]


def _shards(full: torch.Tensor, mesh: Any) -> Any:
    return sharded_tensor(full, rows(full.shape, _counts(full, mesh.size())))


def _turned_shards(full: torch.Tensor, mesh: Any) -> Any:
    owners = list(range(mesh.size()))[::-1]
    return sharded_tensor(full, rows(full.shape, _counts(full, mesh.size()), owners))


WRAPPER = subclass_with(None, True)
"""A tensor subclass around two tensors that has every operation."""


def _wrapper(full: torch.Tensor, _mesh: Any) -> Any:
    return WRAPPER(full.clone(), full.flip(0).contiguous())


def _rows_of_wrappers(full: torch.Tensor, mesh: Any) -> DTensor:
    whole = _wrapper(full, mesh)
    local = WRAPPER(*(part(inner, mesh, [S(0)]).clone() for inner in whole.parts))
    return inside(local, full, mesh, [S(0)])


_ALL = frozenset({GATHERED, KEPT, LANDED})
_NOT_LANDED = frozenset({GATHERED, KEPT})


_LANDED_ALONE = frozenset({LANDED})


def _on_meta(make: Make) -> Make:
    return lambda full, mesh: make(full.to("meta"), mesh)


def _plain(full: torch.Tensor, _mesh: Any) -> torch.Tensor:
    return full.clone()


KINDS: dict[str, Kind] = {
    "plain": Kind(lambda full, _: again(full), _ALL, after=_plain),
    "Parameter": Kind(
        lambda full, _: _parameter(again(full)),
        _ALL,
        whole=lambda full, _: _parameter(full.clone()),
        after=_plain,
    ),
    "frozen": Kind(
        lambda full, _: nn.Parameter(again(full), False),
        _ALL,
        whole=lambda full, _: nn.Parameter(full.clone(), False),
        after=_plain,
    ),
    "strided": Kind(lambda full, _: spread(full), _ALL, after=_plain),
    "rows": Kind(_rows, _ALL),
    "rows that train": Kind(lambda full, mesh: _parameter(_rows(full, mesh)), _ALL, usual=False),
    "strided rows": Kind(
        lambda full, mesh: dtensor(full, mesh, [S(0)], local=spread(part(full, mesh, [S(0)]))),
        _ALL,
    ),
    "rows strided on one rank": Kind(_strided_on_one, _ALL, usual=False),
    "turned rows": Kind(_turned_rows, _ALL, usual=False),
    "conjugated rows": Kind(_conjugated_rows, _ALL, usual=False),
    "negated rows": Kind(_negated_rows, _ALL, usual=False),
    "columns": Kind(lambda full, mesh: dtensor(full, mesh, [S(full.dim() - 1)]), _ALL),
    "replica": Kind(lambda full, mesh: dtensor(full, mesh, [R]), _ALL),
    "replica that trains": Kind(
        lambda full, mesh: _parameter(dtensor(full, mesh, [R])), _NOT_LANDED, usual=False
    ),
    "rows in turn": Kind(lambda full, mesh: dtensor(full, mesh, [SS(0, 2)]), _ALL, usual=False),
    "pending": Kind(_pending, _NOT_LANDED, usual=False),
    "shards": Kind(_shards, _NOT_LANDED),
    "turned shards": Kind(_turned_shards, _NOT_LANDED, usual=False),
    "unfinished": Kind(_unfinished, _NOT_LANDED, copied=_plain, usual=False),
    "unfinished rows": Kind(_unfinished_rows, _NOT_LANDED, copied=_rows, usual=False),
    "rows on meta": Kind(
        _on_meta(lambda full, mesh: dtensor(full, mesh, [S(0)])), _LANDED_ALONE, after=_rows
    ),
    "columns on meta that train": Kind(
        _on_meta(lambda full, mesh: _parameter(dtensor(full, mesh, [S(full.dim() - 1)]))),
        _LANDED_ALONE,
        after=lambda full, mesh: dtensor(full, mesh, [S(full.dim() - 1)]),
        usual=False,
    ),
    "plain on meta": Kind(_on_meta(_plain), _LANDED_ALONE, after=_plain),
    "wrapper": Kind(_wrapper, _NOT_LANDED, whole=_wrapper, usual=False),
    "rows of wrappers": Kind(_rows_of_wrappers, _NOT_LANDED, whole=_wrapper, usual=False),
}
"""Name -> kind, of tensors."""

VALUES: dict[str, Callable[[], Any]] = {
    "number": lambda: -0.0,
    "large number": lambda: 2**70 + 1,
    "text": lambda: "\ud83d\ude00 \u00e9",
    "bytes": lambda: b"\x00\xff",
    "set": lambda: {1, 2},
    "flag": lambda: True,
}
"""Name -> a leaf that is no tensor."""


def kinds_for(use: str, *, usual: bool | None = None) -> dict[str, Kind]:
    """The kinds with which this may be done; `usual`: those that upstream takes, or the others."""
    return {
        name: kind
        for name, kind in KINDS.items()
        if use in kind.uses and usual in (None, kind.usual)
    }
