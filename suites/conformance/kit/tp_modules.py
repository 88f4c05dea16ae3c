"""Module trees with names, containers and sizes that a walk over parameters may stumble on.

Each of `TREES` is a function of one that makes a DTensor parameter, a new one with each call; what
a function of `tensor.parallel.ddp` must leave alone in any of them is `outline`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from conformance.kit.compare import local
from conformance.kit.tensor_parallel import bag

Make = Callable[[], nn.Parameter]


class Walk(nn.Module):
    """Holds a tree; its forward gives what each name has in there: (name, tensor)."""

    def __init__(self, tree: nn.Module) -> None:
        super().__init__()
        self.tree = tree

    def forward(self) -> list[tuple[str, Any]]:
        return held(self)


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


class Forwards(nn.Module):
    """A wrapper that answers for what it wraps, as compiled modules and adapters do."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)


def _unicode(made: Make) -> nn.Module:
    names = ("ä", "Ω", "权重", "a b", "0", "-1", "_", "weight_orig", "self", "None", "a\\b", "é")
    inner = nn.Module()
    for name in names:
        inner.register_parameter(name, made())
    return nn.ModuleDict(OrderedDict((name, bag(w=made(), inner=inner)) for name in names))


def _containers(made: Make) -> nn.Module:
    return bag(
        a=nn.ParameterList([made(), nn.Parameter(torch.ones(1)), made()]),
        b=nn.ParameterDict([("z", made()), ("a", nn.Parameter(torch.ones(1))), ("0", made())]),
        c=nn.ModuleList([nn.ModuleList(), nn.Sequential(), bag(w=made()), nn.ModuleDict()]),
        d=nn.Sequential(OrderedDict([("last", bag(w=made())), ("first", bag(w=made()))])),
    )


def _empty(made: Make) -> nn.Module:
    tree = bag(a=nn.Module(), b=nn.Sequential(), w=made(), c=nn.Identity())
    tree.register_parameter("bias", None)
    tree.register_buffer("buffer", None)
    tree.register_module("nothing", None)
    tree.register_buffer("passing", torch.ones(1), persistent=False)
    return tree


def _nothing(made: Make) -> nn.Module:
    return nn.Sequential(nn.Identity(), nn.Module())


def _shared(made: Make) -> nn.Module:
    tied, child = made(), bag(w=made(), b=nn.Parameter(torch.ones(1)))
    child.register_parameter("again", child.w)
    return bag(a=child, w=tied, b=bag(c=child, tied=tied, d=nn.ParameterList([tied, tied])), z=tied)


def _views(made: Make) -> nn.Module:
    """Several Parameters over one memory, which are not one Parameter."""
    first: Any = made()
    frozen = nn.Parameter(first.data, requires_grad=False)
    rows = nn.Parameter(first._local_tensor.detach()[:1])
    return bag(w=first, v=nn.Parameter(first.data), f=frozen, child=bag(r=rows, b=first.detach()))


def _parametrized(made: Make) -> nn.Module:
    owner = bag(w=made(), v=nn.Parameter(torch.ones(2)))
    parametrize.register_parametrization(owner, "w", Halved(), unsafe=True)
    return bag(owner=owner, other=bag(w=made()))


def _attributes(made: Make) -> nn.Module:
    tree: Any = bag(w=made(), child=bag(w=made()))
    tree.note, tree.child.note = {"a": 1}, [torch.ones(1)]
    tree.child.eval()
    for number, param in enumerate(tree.parameters()):
        param.tag = f"number {number}"
    made_of: nn.Module = tree
    return made_of


def _deep(made: Make) -> nn.Module:
    tree = bag(w=made())
    for _ in range(100):
        tree = bag(a=tree)
    return tree


def _wide(made: Make) -> nn.Module:
    return nn.Sequential(*(bag(w=made(), b=nn.Parameter(torch.ones(1))) for _ in range(400)))


TREES: dict[str, Callable[[Make], nn.Module]] = {
    "unicode": _unicode,
    "containers": _containers,
    "empty and None": _empty,
    "nothing sharded": _nothing,
    "shared and tied": _shared,
    "several over one memory": _views,
    "parametrized": _parametrized,
    "attributes": _attributes,
    "a hundred levels": _deep,
    "four hundred layers": _wide,
}


def held(module: nn.Module) -> list[tuple[str, Any]]:
    """(path, parameter or buffer) as the tables of all modules have them, each name, in order."""
    return [
        (f"{path}.{name}".strip("."), value)
        for path, owner in module.named_modules(remove_duplicate=False)
        for name, value in (*owner._parameters.items(), *owner._buffers.items())
    ]


def outline(module: nn.Module) -> dict[str, Any]:
    """All but the tensors themselves: names, order, ties, flags, attributes, modes, hooks of it."""
    tensors = held(module)
    first: dict[int, str] = {}
    for path, value in tensors:
        first.setdefault(id(value), path)
    return {
        "names in order": [path for path, _ in tensors],
        "ties": [first[id(value)] for _, value in tensors],
        "named_parameters()": [n for n, _ in module.named_parameters()],
        "state dict": list(module.state_dict()),
        "training": [m.training for m in module.modules()],
        "types of modules": [type(m) for m in module.modules()],
        "attributes of modules": [
            {n: id(v) for n, v in vars(m).items() if not n.startswith("_")}
            for m in module.modules()
        ],
        "trains": [getattr(value, "requires_grad", None) for _, value in tensors],
        "attributes": [
            {n: v for n, v in vars(value).items() if not n.startswith("_")}
            for _, value in tensors
            if value is not None
        ],
        "Parameters": [isinstance(value, nn.Parameter) for _, value in tensors],
    }


def memory(module: nn.Module) -> list[int]:
    """Where each tensor lies."""
    return [
        local(value).untyped_storage().data_ptr() for _, value in held(module) if value is not None
    ]


def sharded(module: nn.Module) -> list[str]:
    """The names that have a DTensor."""
    return [path for path, value in held(module) if isinstance(value, DTensor)]
