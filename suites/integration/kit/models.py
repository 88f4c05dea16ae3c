"""The models that are trained, as data: how to build, shard and feed each.

`MODELS[name].build()` gives the whole model with the same numbers on every rank: it is the oracle,
and what a recipe wraps. `MODELS[name].shard(model, mesh)` puts it under tensor parallelism with
torch's own `parallelize_module`.

The MLP holds small whole numbers, and its loss is linear in the output: several steps of SGD with
dyadic rates stay exact in float64, in whatever order sums are taken. The transformer has softmax
and layer norms and is exact nowhere; in float64 its rounding errors are near 1e-15.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own habit
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

Batch = tuple[torch.Tensor, torch.Tensor]


def small(*shape: int, salt: int = 0) -> torch.Tensor:
    """Whole numbers from -2 to 2, the same for the same shape and salt."""
    generator = torch.Generator().manual_seed(salt)
    return torch.randint(-2, 3, shape, generator=generator).to(torch.float64)


class Mlp(nn.Module):
    """Two layers, under tensor parallelism by column and by row, and one beside that TP leaves.

    No more than two weights are multiplied with each other: with three the number of binary
    digits would double in each step. Tied: a twin of the first layer has the same Parameters.
    """

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8, dtype=torch.float64)
        self.beside = nn.Linear(4, 3, dtype=torch.float64)
        self.down = nn.Linear(8, 3, dtype=torch.float64)
        if tied:
            self.twin = nn.Linear(4, 8, dtype=torch.float64)
            self.tie()

    def tie(self) -> None:
        """Give the twin the first layer's Parameters; after sharding it has some of its own."""
        self.twin.weight, self.twin.bias = self.up.weight, self.up.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x).relu()
        if hasattr(self, "twin"):
            hidden = hidden + self.twin(-x).relu()
        out: torch.Tensor = self.down(hidden) + self.beside(x)
        return out


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.per_head = width // heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.o = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.per_head)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: torch.Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and a two-layer MLP, each behind a layer norm and beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        out: torch.Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class Transformer(nn.Module):
    """A causal language model. Tied: `head.weight` and `embed.weight` are one Parameter."""

    def __init__(
        self,
        *,
        tied: bool = True,
        vocabulary: int = 16,
        width: int = 8,
        heads: int = 2,
        depth: int = 2,
    ) -> None:
        super().__init__()
        self.tied = tied
        self.recompute = False
        """Whether blocks keep no activations, and compute them again in the backward."""
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.tie()
        self.to(torch.float64)

    def tie(self) -> None:
        """Make the head's weight the embedding's; after sharding each has one of its own."""
        if self.tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        out: torch.Tensor = self.head(self.norm(x))
        # A DTensor's local tensor is a view, and fully_shard warns of a view as output.
        return out.clone()


@dataclass(frozen=True)
class Model:
    """A kind of model, and all that depends on which it is."""

    name: str
    build: Callable[[], nn.Module]
    """The whole model, in float64 on the CPU, with the same numbers on every rank."""
    shard: Callable[[nn.Module, DeviceMesh], nn.Module]
    """Put the model under tensor parallelism over a 1-D mesh, in place."""
    batch: Callable[[int, int], Batch]
    """(salt, rows) -> inputs and targets."""
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """(outputs, targets) -> the mean over all rows."""
    units: Callable[[nn.Module], list[nn.Module]]
    """The submodules that FSDP and fully_shard wrap on their own, besides the whole."""
    exact: bool
    """Whether training with SGD stays exact, so that results compare bitwise."""


def _mlp(*, tied: bool = False, frozen: tuple[str, ...] = ()) -> nn.Module:
    model = Mlp(tied=tied)
    _fill(model, lambda number, param: small(*param.shape, salt=number))
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return model


def _shard_mlp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    assert isinstance(model, Mlp)
    frozen = [name for name, param in model.named_parameters() if not param.requires_grad]
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if hasattr(model, "twin"):
        plan["twin"] = ColwiseParallel()
    parallelize_module(model, mesh, plan)
    if hasattr(model, "twin"):
        model.tie()
    assert not [name for name in frozen if model.get_parameter(name).requires_grad]
    return model


def _mlp_batch(salt: int, rows: int) -> Batch:
    return small(rows, 4, salt=100 + salt), small(rows, 3, salt=200 + salt)


def _linear(output: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return (output * factors).sum() / len(output)


def _transformer(tied: bool) -> nn.Module:
    """With block 0 frozen, as in fine-tuning."""
    model = Transformer(tied=tied)

    def drawn(number: int, param: nn.Parameter) -> torch.Tensor:
        generator = torch.Generator().manual_seed(number)
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64) / 4
        return noise + 1 if param.ndim == 1 and "norm" in names[number] else noise

    names = [name for name, _ in model.named_parameters()]
    _fill(model, drawn)
    model.get_submodule("blocks.0").requires_grad_(False)
    return model


def _fill(model: nn.Module, value: Callable[[int, nn.Parameter], torch.Tensor]) -> None:
    with torch.no_grad():
        for number, (_, param) in enumerate(model.named_parameters()):
            param.copy_(value(number, param))


def _shard_transformer(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """With sequence parallelism, as trainers do: every parameter becomes a DTensor."""
    assert isinstance(model, Transformer)
    frozen = [name for name, param in model.named_parameters() if not param.requires_grad]
    parallelize_module(
        model,
        mesh,
        {
            "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        },
    )
    model.tie()
    for block in model.blocks:
        parallelize_module(
            block,
            mesh,
            {
                "norm1": SequenceParallel(),
                "attention": PrepareModuleInput(
                    input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
                ),
                "attention.q": ColwiseParallel(),
                "attention.k": ColwiseParallel(),
                "attention.v": ColwiseParallel(),
                "attention.o": RowwiseParallel(output_layouts=Shard(1)),
                "norm2": SequenceParallel(),
                "up": ColwiseParallel(input_layouts=Shard(1)),
                "down": RowwiseParallel(output_layouts=Shard(1)),
            },
        )
    for name in frozen:  # SequenceParallel makes its parameters anew, and all of them train.
        model.get_parameter(name).requires_grad_(False)
    return model


def _tokens(salt: int, rows: int) -> Batch:
    generator = torch.Generator().manual_seed(1000 + salt)
    text = torch.randint(16, (rows, 5), generator=generator)
    return text[:, :-1], text[:, 1:]


def _cross_entropy(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


MLP = Model("mlp", _mlp, _shard_mlp, _mlp_batch, _linear, lambda _: [], exact=True)
FROZEN = replace(MLP, name="mlp-frozen", build=partial(_mlp, frozen=("up.bias", "down.bias")))
"""The MLP with two frozen weights among the others, one sharded and one replicated."""
TIED = replace(
    FROZEN, name="mlp-tied", build=partial(_mlp, tied=True, frozen=("up.bias", "down.bias"))
)
"""The same with a twin."""
TRANSFORMER = Model(
    "transformer",
    partial(_transformer, tied=True),
    _shard_transformer,
    _tokens,
    _cross_entropy,
    lambda model: [m for m in model.modules() if isinstance(m, Block)],
    exact=False,
)
UNTIED = replace(TRANSFORMER, name="untied", build=partial(_transformer, tied=False))
"""The transformer with a head of its own: FSDP1 flattens tied DTensors twice, so they part."""
MODELS = {model.name: model for model in (MLP, FROZEN, TIED, TRANSFORMER, UNTIED)}
