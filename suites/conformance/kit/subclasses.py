"""Tensor subclasses that implement a chosen set of operations, and nothing beside it.

A library writes the operations that its tensors meet on the roads it knows, as torchao does for
quantised weights: `detach`, `clone`, `copy_`, a handful more. What upstream's function asks of such
a tensor is found out by letting it run with a type that can do everything (`subclass_with(None,
...)`) and reading `asked`; a type with exactly these operations then stands for all such libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing

from conformance.kit.agree import attempt
from conformance.kit.compare import assert_same
from conformance.kit.layouts import dtensor

_aliased = cast(Callable[..., Any], return_and_correct_aliasing)


class Pair(torch.Tensor):
    """A wrapper of two tensors of one shape: its elements, and what would be lost beside them.

    Attributes:
        first: the elements.
        second: another tensor; `of` makes it the negative of the first.
        ops: the operations that the type implements, as `str(func)` names them; None for all.
        asked: the operations that tensors of the type were asked for, in order, with repetitions.
        pending: whether what a collective gives is handed on unfinished, inside the wrapper.

    """

    first: torch.Tensor
    second: torch.Tensor
    ops: frozenset[str] | None
    asked: list[str]
    pending: bool
    policy: str | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[Pair], first: torch.Tensor, second: torch.Tensor, requires_grad: bool = False
    ) -> Pair:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            first.size(),
            strides=first.stride(),
            storage_offset=first.storage_offset(),
            dtype=first.dtype,
            layout=first.layout,
            device=first.device,
            requires_grad=requires_grad,
            dispatch_sizes_strides_policy=cls.policy,
        )
        made.first, made.second = first, second
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        """`__new__` has done it all; torch's own would complain."""

    @classmethod
    def of(cls, full: torch.Tensor) -> Pair:
        """One that holds `full`, and its negative."""
        return cls(full, full.neg())

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All that it holds."""
        return self.first, self.second

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.first}, {self.second})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = str(func), kwargs or {}
        cls.asked.append(name)
        if cls.ops is not None and name not in cls.ops:
            raise NotImplementedError(f"{cls.__name__} does not implement {name}")
        written = [
            given
            for given, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if any(not isinstance(t, cls) for t in pytree.tree_leaves(written)):
            raise NotImplementedError(f"{cls.__name__} writes no other tensor, as {name} asks")
        outs = [
            func(*pytree.tree_map_only(cls, pick, args), **pytree.tree_map_only(cls, pick, kwargs))
            for pick in (lambda t: t.first, lambda t: t.second)
        ]
        flat, spec = pytree.tree_flatten(outs[0])
        found = [cls._around(*two) for two in zip(flat, pytree.tree_leaves(outs[1]), strict=True)]
        result = pytree.tree_unflatten(found, spec)
        if name.startswith("aten."):
            return _aliased(func, args, kwargs, result)
        if written:
            return (written[0], *result[1:]) if isinstance(result, tuple) else written[0]
        if cls.pending and name.startswith("_c10d_functional.") and "wait" not in name:
            return cls(*(AsyncCollectiveTensor(part) for part in result.parts))
        return result

    @classmethod
    def _around(cls, first: Any, second: Any) -> Any:
        if isinstance(first, torch.Tensor):
            return cls(first, second)
        if isinstance(first, torch.ScriptObject):
            # Work of a collective: who waits for what is handed on would wait for one part only.
            for boxed in (first, second):
                torch.distributed.Work.unbox(boxed).wait()
        return first


def subclass_with(
    ops: Collection[str] | None,
    flatten: bool,
    *,
    pending: bool = False,
    policy: str | None = None,
) -> type[Pair]:
    """A type of `Pair` that implements `ops` alone, say `aten.detach.default`; all where None.

    Args:
        ops: what `Pair.ops` says; anything else raises NotImplementedError that names it.
        flatten: whether it has `__tensor_flatten__`, by which others find what it holds.
        pending: what `Pair.pending` says.
        policy: `"strides"` or `"sizes"`: then questions for these are operations as well.

    """
    name = f"Pair{'' if flatten else 'Closed'}{'All' if ops is None else len(ops)}"
    body: dict[str, Any] = {
        "ops": None if ops is None else frozenset(ops),
        "asked": [],
        "pending": pending,
        "policy": policy,
    }
    made: type[Pair] = type(name, (Pair,), body)
    if flatten:
        made.__tensor_flatten__ = lambda _: (["first", "second"], None)  # type: ignore[attr-defined]
        made.__tensor_unflatten__ = staticmethod(  # type: ignore[attr-defined]
            lambda inner, _meta, _size, _stride: made(inner["first"], inner["second"])
        )
    return made


def inside(
    local: torch.Tensor, full: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]
) -> DTensor:
    """A DTensor of the shape of `full` around `local`; no operation of `local` is asked for."""
    return DTensor(local, dtensor(full, mesh, placements)._spec, requires_grad=False)


def like_upstream(
    road: Callable[[type[Pair]], Any], flatten: bool, **options: Any
) -> tuple[type[Pair], set[str]]:
    """A type with what `road`, a way through torch as it is, asks of one that can do everything.

    Collective where `road` is. What is asked for while tensors are made counts as well, and so does
    what upstream asks for before it fails for another reason.
    """
    able = subclass_with(None, flatten, **options)
    attempt(lambda: road(able))
    return subclass_with(able.asked, flatten, **options), set(able.asked)


def assert_holds_pair(got: Any, kind: type[Pair], full: torch.Tensor, what: str = "result") -> None:
    """`got` is of that type, and holds `full` and its negative, both finished."""
    assert isinstance(got, kind), f"{what}: a {type(got).__name__}, expected a {kind.__name__}"
    for part, expected, name in zip(
        got.parts, (full, full.neg()), ("first", "second"), strict=True
    ):
        assert type(part) is torch.Tensor, f"{what}.{name}: a {type(part).__name__}, not finished"
        assert_same(part, expected, f"{what}.{name}")
