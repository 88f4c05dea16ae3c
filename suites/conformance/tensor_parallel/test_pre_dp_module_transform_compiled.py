"""A transformed module that is compiled, in whole or block by block, before or after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from conformance.kit.compare import assert_same
from conformance.kit.layouts import R, S
from conformance.kit.tensor_parallel import Layer, batch, loss, small, weight, whole

# Dynamo asks each tensor for its .grad, and makes fake DTensors from what it has not detached.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:To construct DTensor from torch.Tensor"),
]

BLOCKS = ("up", "down")


class Chain(nn.Module):
    """Two blocks, one after the other, each of which gives a plain tensor."""

    def __init__(self, up: Layer, down: Layer) -> None:
        super().__init__()
        self.up, self.down = Block(up), Block(down)
        self.recompute = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (self.up, self.down):
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return x


class Block(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return whole(self.layer(x))


def chain(mesh: Any = None) -> Chain:
    """A `Chain` from 4 to 8 to 3, sharded over the mesh, or whole."""

    def made(*shape: int, salt: int) -> nn.Parameter:
        full = small(*shape, salt=salt)
        placement = S(0) if len(shape) == 2 else R
        return nn.Parameter(full) if mesh is None else weight(full, mesh, [placement])

    return Chain(
        Layer(made(8, 4, salt=1), made(8, salt=2)), Layer(made(3, 8, salt=3), made(3, salt=4))
    )


def by_itself(module: Any, options: dict[str, Any]) -> Any:
    module.compile(**options)
    return module


def wrapped(module: Any, options: dict[str, Any]) -> Any:
    return torch.compile(module, **options)


def each(compiled: Callable[..., Any]) -> Callable[..., Any]:
    def compile_blocks(module: Any, options: dict[str, Any]) -> Any:
        for name in BLOCKS:
            setattr(module, name, compiled(getattr(module, name), options))
        return module

    return compile_blocks


WAYS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "whole": by_itself,
    "whole, wrapped": wrapped,
    "blocks": each(by_itself),
    "blocks, wrapped": each(wrapped),
}


def assert_like(module: Any, held: dict[str, Any], oracle: Chain, salt: int, what: str) -> None:
    """A step's output and gradients are the oracle's."""
    for param in (*held.values(), *oracle.parameters()):
        param.grad = None
    output, expected = module(batch(salt)), oracle(batch(salt))
    assert_same(output.detach(), expected.detach(), f"{what}: output")
    loss(output, salt).backward()
    loss(expected, salt).backward()
    for name, param in oracle.named_parameters():
        assert param.grad is not None
        grad = held[name].grad
        assert grad is not None, f"{what}: {name} has no gradient"
        assert_same(grad, param.grad, f"{what}: {name}.grad")


@pytest.mark.judges("tensor.parallel.ddp._pre_dp_module_transform")
class TestPreDpModuleTransformCompiled:
    def made(
        self, judged: Any, mesh: Any, way: str, when: str, counter: Any
    ) -> tuple[Any, dict[str, Any], Chain]:
        """The compiled module, its local Parameters by their plain names, and the oracle."""
        module: Any = chain(mesh(1))
        options = {"backend": counter, "fullgraph": True}
        if when == "before":
            module = WAYS[way](module, options)
        judged(module)
        held = {n.replace("_orig_mod.", ""): p for n, p in module.named_parameters()}
        if when == "after":
            module = WAYS[way](module, options)
        return module, held, chain()

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    @pytest.mark.parametrize(
        "backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.thorough)]
    )
    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.thorough(but=["blocks-after-eager"])
    def test_one_graph(self, judged: Any, mesh: Any, way: str, when: str, backend: str) -> None:
        """Compiled with fullgraph=True, the first step must give the unsharded output and grads."""
        counter = CompileCounterWithBackend(backend)
        module, held, oracle = self.made(judged, mesh, way, when, counter)
        assert_like(module, held, oracle, 0, "the first step")
        expected = 1 if way.startswith("whole") else len(BLOCKS)
        assert counter.frame_count == expected, f"{counter.frame_count} graphs"

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.thorough(but=["whole, wrapped-after"])
    def test_many_steps(self, judged: Any, mesh: Any, way: str, when: str) -> None:
        """Later steps must be exact without a new graph; evaluation may add one for each."""
        counter = CompileCounterWithBackend("eager")
        module, held, oracle = self.made(judged, mesh, way, when, counter)
        for step in range(3):
            assert_like(module, held, oracle, step, f"step {step}")
            assert counter.frame_count <= len(BLOCKS), f"step {step}: {counter.frame_count} graphs"
        for number in range(2):
            with torch.no_grad():
                assert_same(module(batch(number)), oracle(batch(number)), f"evaluation {number}")
        assert_like(module, held, oracle, 3, "after evaluation")
        assert counter.frame_count <= 2 * len(BLOCKS), f"at last: {counter.frame_count} graphs"
        names = [name.replace("_orig_mod.", "") for name, _ in module.named_parameters()]
        assert names == list(held), f"the module has the parameters {names}"

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_hooks_that_were_there(self, judged: Any, mesh: Any) -> None:
        """Compiled with fullgraph=True, layers' own hooks, with closures, must work as before."""
        counter, factor = CompileCounterWithBackend("eager"), 2.0
        module, oracle = chain(mesh(1)), chain()
        for each in (module.up.layer, module.down.layer, oracle.up.layer, oracle.down.layer):
            each.register_forward_pre_hook(lambda _, args: (factor * args[0],))
            each.register_forward_hook(lambda *called: factor * called[-1])
        judged(module)
        held = dict(module.named_parameters())
        module.compile(backend=counter, fullgraph=True)
        assert_like(module, held, oracle, 0, "the first step")
        assert counter.frame_count == 1, f"{counter.frame_count} graphs"

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("way", ["blocks", "blocks, wrapped"])
    @pytest.mark.thorough(but=["blocks, wrapped-after"])
    def test_blocks_that_are_called_alone(
        self, judged: Any, mesh: Any, way: str, when: str
    ) -> None:
        """A compiled block called by itself, or recomputed, must compute as within the whole."""
        counter = CompileCounterWithBackend("eager")
        module, held, oracle = self.made(judged, mesh, way, when, counter)
        module.recompute = True
        for step in range(2):
            assert_like(module, held, oracle, step, f"recomputed, step {step}")
            with torch.no_grad():
                expected = oracle.up(batch(step))
                assert_same(module.up(batch(step)), expected, f"alone after step {step}")
