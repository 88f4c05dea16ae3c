"""Tensor-parallel modules built without a collective, and the same modules over whole tensors.

`net(mesh)` is sharded as a trainer shards an MLP: the first layer by column, the second by row.
`net()` is its oracle: the same class with the same small whole numbers, unsharded. What a rank
must hold afterwards is `cut` from the oracle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.layouts import R, S, dtensor, part

Look = Callable[[nn.Module], Any]

SHARDED: dict[str, Placement] = {
    "up.weight": S(0),
    "up.bias": S(0),
    "down.weight": S(1),
    "down.bias": R,
}
"""The parameters of a `Net` that tensor parallelism holds, and how."""


def small(*shape: int, salt: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Whole numbers from -2 to 2: three steps of a two-layer net stay exact in float64."""
    return ((numbers(*shape, salt=salt) % 5) - 2).to(dtype)


def weight(
    full: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement], *, trains: bool = True
) -> nn.Parameter:
    """A DTensor parameter that holds `full`."""
    return nn.Parameter(dtensor(full, mesh, placements), requires_grad=trains)


def bag(**entries: Any) -> Any:
    """A module that holds parameters, other tensors (as buffers) and modules under these names."""
    return fill(nn.Module(), entries)


def fill(module: nn.Module, entries: dict[str, Any]) -> nn.Module:
    """Let the module hold these, as `bag` does."""
    for name, value in entries.items():
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            module.register_buffer(name, value)
        else:
            setattr(module, name, value)
    return module


class Layer(nn.Module):
    """x W^T + b, over DTensors where the weight is one."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = spread(x, self.weight) @ self.weight.t()
        if isinstance(product, DTensor):
            # Added to a Partial, a bias would be divided by the number of ranks first.
            product = product.redistribute(
                placements=[R if p.is_partial() else p for p in product.placements]
            )
        return product + self.bias


class Net(nn.Module):
    """Two layers, a parameter that is not sharded and a buffer that each forward changes."""

    def __init__(self, up: Layer, down: Layer, gain: nn.Parameter) -> None:
        super().__init__()
        self.up = up
        self.gain = gain
        self.down = down
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64, device=gain.device))

    def forward(self, x: torch.Tensor, look: Look | None = None) -> torch.Tensor:
        """`look` is called in the middle, with the module."""
        self.calls.add_(1)
        hidden = self.up(x).relu()
        if look is not None:
            look(self)
        return whole(self.down(hidden)) * self.gain


class Scaled(nn.Module):
    """Gives what each weight's local part, times its factor, sums up to: its gradient is that.

    The forward needs no operator of DTensors, so any placement will do.
    """

    def __init__(self, factors: dict[str, torch.Tensor], **weights: nn.Parameter) -> None:
        super().__init__()
        self.factors = factors
        for name, param in weights.items():
            self.register_parameter(name, param)

    def forward(self) -> torch.Tensor:
        sums = [(getattr(self, n).to_local() * factor).sum() for n, factor in self.factors.items()]
        return torch.stack(sums).sum()


def spread(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`x` as a replicated DTensor over the mesh of `like`, where that is a DTensor."""
    if isinstance(like, DTensor) and not isinstance(x, DTensor):
        mesh = like.device_mesh
        return DTensor.from_local(x, mesh, [R] * mesh.ndim, run_check=False)
    return x


def whole(x: torch.Tensor) -> torch.Tensor:
    """The plain tensor; a DTensor is gathered."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def net(
    mesh: DeviceMesh | None = None,
    hidden: int = 8,
    *,
    frozen: Sequence[str] = (),
    salt: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Net:
    """A `Net` of 4 inputs, `hidden` units and 3 outputs: sharded over `mesh`, or whole."""

    def made(name: str, *shape: int, at: int) -> nn.Parameter:
        full, trains = small(*shape, salt=salt + at, dtype=dtype), name not in frozen
        if mesh is None or name not in SHARDED:
            return nn.Parameter(full, requires_grad=trains)
        return weight(full, mesh, placements(mesh, name), trains=trains)

    return Net(
        Layer(made("up.weight", hidden, 4, at=1), made("up.bias", hidden, at=2)),
        Layer(made("down.weight", 3, hidden, at=3), made("down.bias", 3, at=4)),
        made("gain", 3, at=6),
    )


def placements(mesh: DeviceMesh, name: str) -> list[Placement]:
    """How a `Net` holds the parameter: replicated over all dimensions of the mesh but the last."""
    return [R] * (mesh.ndim - 1) + [SHARDED[name]]


def cut(full: torch.Tensor, mesh: DeviceMesh, name: str) -> torch.Tensor:
    """What this rank holds of a `Net`'s parameter, cut from the whole."""
    return part(full, mesh, placements(mesh, name)) if name in SHARDED else full


def batch(salt: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Inputs for a `Net`."""
    return small(2, 4, salt=salt + 5, dtype=dtype)


def loss(output: torch.Tensor, salt: int = 0) -> torch.Tensor:
    """A loss whose gradient differs from output to output."""
    return (output * small(*output.shape, salt=salt + 9, dtype=output.dtype)).sum()


def backward(model: nn.Module, salt: int = 0, look: Look | None = None) -> None:
    """One forward and backward on the batch of that salt."""
    dtype = next(model.parameters()).dtype
    loss(model(batch(salt, dtype), look), salt).backward()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer whose steps are exact on small dyadic numbers."""
    return torch.optim.SGD(model.parameters(), lr=2**-3, momentum=0.5)


def assert_holds(model: nn.Module, mesh: DeviceMesh, oracle: Net, what: str) -> None:
    """Plain local Parameters under the oracle's names, in order: values, flags and gradients."""
    names = [name for name, _ in model.named_parameters()]
    expected = [name for name, _ in oracle.named_parameters()]
    assert names == expected, f"{what}: named_parameters() gives {names}, expected {expected}"
    assert_trained(dict(model.named_parameters()), mesh, oracle, what)


def assert_trained(
    params: dict[str, nn.Parameter], mesh: DeviceMesh, oracle: Net, what: str
) -> None:
    """These Parameters, by name, are local, with the oracle's values, flags and gradients."""
    for name, param in params.items():
        full, where = oracle.get_parameter(name), f"{what}: {name}"
        assert isinstance(param, nn.Parameter), f"{where}: a {type(param).__name__}"
        assert_same(param.detach(), cut(full.detach(), mesh, name), where)
        assert param.requires_grad is full.requires_grad, f"{where}: {param.requires_grad=}"
        if full.grad is None:
            assert param.grad is None, f"{where}: has a gradient"
        else:
            assert param.grad is not None, f"{where}: no gradient"
            assert type(param.grad) is torch.Tensor, f"{where}: a {type(param.grad).__name__}"
            assert_same(param.grad, cut(full.grad, mesh, name), f"{where}.grad")


def assert_inside(model: nn.Module, mesh: DeviceMesh, what: str = "inside forward") -> None:
    """A `Net` in its forward: DTensors of the right layout where it is sharded."""
    for name, placement in SHARDED.items():
        owner, _, leaf = name.rpartition(".")
        found = getattr(model.get_submodule(owner), leaf)
        assert isinstance(found, DTensor), f"{what}: {name} is a {type(found).__name__}"
        assert found.placements[-1] == placement, f"{what}: {name} is {found.placements}"
        assert found.device_mesh == mesh, f"{what}: {name} is on {found.device_mesh}"


def identities(module: nn.Module) -> list[tuple[str, int]]:
    """Names and identities of all parameters, tied ones each time, in order."""
    return [(n, id(p)) for n, p in module.named_parameters(remove_duplicate=False)]


def baggage(module: nn.Module) -> dict[str, int]:
    """What may pile up: hooks of each kind and attributes, of modules and of parameters."""
    count: Counter[str] = Counter()
    for path, owner in module.named_modules():
        count[f"{path}: attributes"] = len(vars(owner))
        for name, held in vars(owner).items():
            if "hooks" in name and held is not None:
                count[f"{path}: {name}"] = len(held)
    for path, param in module.named_parameters():
        count[f"{path}: attributes"] = len(vars(param))
        count[f"{path}: hooks"] = len(param._backward_hooks or ())
        count[f"{path}: accumulation hooks"] = len(param._post_accumulate_grad_hooks or ())
    return dict(count)


def piled_up(module: nn.Module, before: dict[str, int]) -> list[str]:
    """What of the module's baggage is more than it was."""
    return [
        f"{name}: {before.get(name, 0)} -> {count}"
        for name, count in baggage(module).items()
        if count > before.get(name, 0)
    ]
