"""The functions of `tensor.parallel`, each with a small call for every kind of tensor it takes.

The list from which the sweeps draw: a new function is an entry of `FUNCTIONS`, a new kind of tensor
one in `tp_kinds`, and every dimension is asked of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from conformance.kit import tp_calls_data as data
from conformance.kit import tp_calls_fsdp as fsdp
from conformance.kit import tp_calls_modules as modules
from conformance.kit.tp_calls import DDP, FSDP, UTILS, Roads, Trained
from conformance.kit.tp_kinds import Seat


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
        placed: whether it looks at meshes or groups.
        module: whether what it is given is changed, a module, and the tensors in there are not.
        trains: where gradients pass it: (a judged function, a full tensor, where) -> for each kind
            that trains, (the kind, the local tensor, the DTensor whose gradient must arrive there).

    """

    path: str
    roads: Callable[[torch.Tensor, Seat], Roads]
    ranks: int = 2
    moves: bool = True
    copies: bool = False
    placed: bool = True
    module: bool = False
    trains: Callable[[Any, torch.Tensor, Seat], Trained] | None = None

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    def of(self, subject: Any) -> Any:
        """The subject's own."""
        return subject.function(self.path)


FUNCTIONS: tuple[Function, ...] = (
    Function(UTILS + "sync_grad_hook", data.sync_grad_hook, placed=False),
    Function(UTILS + "_flatten_tensor", data.flatten_tensor),
    Function(UTILS + "_unflatten_tensor", data.unflatten_tensor, trains=data.through_unflatten),
    Function(DDP + "_get_submodule_n_params", modules.submodule, moves=False, placed=False),
    Function(DDP + "_update_module_param", modules.update, moves=False, placed=False, module=True),
    Function(
        DDP + "_localize_dtensor", modules.localize, module=True, trains=modules.through_localize
    ),
    Function(
        DDP + "_reconstruct_dtensor",
        modules.reconstruct,
        module=True,
        trains=modules.through_reconstruct,
    ),
    Function(
        DDP + "_pre_dp_module_transform",
        modules.transform,
        module=True,
        trains=modules.through_transform,
    ),
    Function(FSDP + "_get_box", fsdp.box, moves=False),
    Function(FSDP + "_get_box_for", fsdp.box_for, moves=False),
    Function(FSDP + "_get_local_box", fsdp.local_box, moves=False),
    Function(FSDP + "_create_shard_md_from_dt", fsdp.shard_metadata, moves=False),
    Function(FSDP + "_create_sharded_tensor_md_from_dt", fsdp.metadata, moves=False),
    Function(FSDP + "_get_dt_pg", fsdp.group, moves=False),
    Function(FSDP + "_rewrite_spec_if_needed", fsdp.rewrite_spec, moves=False, placed=False),
    Function(FSDP + "DTensorExtensions", data.extensions, trains=data.through_extensions),
    Function(FSDP + "_chunk_tensor", fsdp.chunk_tensor, ranks=4, copies=True),
    Function(FSDP + "_chunk_dtensor", fsdp.chunk_dtensor, ranks=4, copies=True),
    Function(FSDP + "_pre_load_state_dict", fsdp.pre_load, ranks=4),
    Function(FSDP + "_all_gather_dtensor", fsdp.all_gather, ranks=4, copies=True),
)


def functions(
    ranks: int, choose: Callable[[Function], bool] = lambda _: True, *, world: int | None = None
) -> Any:
    """A mark for a check: it is asked of each of these functions, in a world of their size."""

    def decorate(body: Any) -> Any:
        found = [
            pytest.param(f, id=f.name, marks=pytest.mark.judges(f.path))
            for f in FUNCTIONS
            if f.ranks == ranks and choose(f)
        ]
        return pytest.mark.world(world or ranks)(pytest.mark.parametrize("function", found)(body))

    return decorate
