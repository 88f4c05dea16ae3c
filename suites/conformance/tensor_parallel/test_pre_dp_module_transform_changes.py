"""What becomes of a transformed module between forwards: copies, casts, compilation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from conformance.kit.compare import assert_same, local, shares_memory
from conformance.kit.data import numbers
from conformance.kit.layouts import S, part
from conformance.kit.tensor_parallel import (
    assert_holds,
    assert_inside,
    assert_trained,
    backward,
    bag,
    baggage,
    batch,
    identities,
    net,
    piled_up,
    sgd,
    weight,
)


@pytest.mark.judges("tensor.parallel.ddp._pre_dp_module_transform")
class TestPreDpModuleTransformCopies:
    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("when", ["at once", "after a step"])
    @pytest.mark.thorough(but=["w1-at once"])
    def test_a_copy_trains_on_its_own(self, judged: Any, mesh: Any, world: Any, when: str) -> None:
        """A deep copy has parameters of its own; it trains exactly, and so does the original."""
        line = mesh(world.size)
        module, oracle = net(line), net()
        judged(module)
        if when == "after a step":
            for model in (module, oracle):
                optimizer = sgd(model)
                backward(model)
                optimizer.step()
                optimizer.zero_grad()
        twin, still = copy.deepcopy(module), copy.deepcopy(oracle)
        for (name, ours), theirs in zip(module.named_parameters(), twin.parameters(), strict=True):
            assert ours is not theirs, f"{name}: the copy holds the same object"
            assert not shares_memory(ours, theirs), f"{name}: the copy lies in the same memory"
        assert_holds(twin, line, still, "the copy")
        assert_holds(module, line, still, "the original")
        trained = sgd(twin), sgd(oracle)
        for model, optimizer in zip((twin, oracle), trained, strict=True):
            backward(model, 1)
            optimizer.step()
        assert_holds(twin, line, oracle, "the copy, trained")
        assert_holds(module, line, still, "the original, while the copy trained")
        backward(module, 2)
        backward(still, 2)
        assert_holds(module, line, still, "the original, trained")
        assert_holds(twin, line, oracle, "the copy, while the original trained")

    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w1"])
    def test_a_moving_average(self, judged: Any, mesh: Any, world: Any) -> None:
        """A copy that averages the trained weights evaluates as the unsharded average does."""
        line = mesh(world.size)
        module, oracle = net(line), net()
        judged(module)
        averages = copy.deepcopy(module).requires_grad_(False), copy.deepcopy(oracle)
        for step in range(2):
            for model, average in zip((module, oracle), averages, strict=True):
                optimizer = torch.optim.SGD(model.parameters(), lr=2**-3)
                optimizer.zero_grad()
                backward(model, step)
                optimizer.step()
                with torch.no_grad():
                    for mean, param in zip(average.parameters(), model.parameters(), strict=True):
                        mean.add_(param).mul_(0.5)
        with torch.no_grad():
            expected = averages[1](batch())
            assert_same(averages[0](batch()), expected, "the average")
        before = identities(module)

        def teach(inside: nn.Module) -> None:
            with torch.no_grad():
                assert_same(averages[0](batch()), expected, "the average, in the other's forward")
            assert_inside(inside, line, "after the average's forward")

        module(batch(), teach)
        assert identities(module) == before, "other objects after the average's forward"

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    def test_a_copy_is_like_the_original(self, judged: Any, mesh: Any, world: Any) -> None:
        """A copy, and a copy of it, keep ties, flags, hooks, state dict and a second transform."""
        line, full = mesh(world.size), numbers(5, 2)
        tied = weight(full, line, [S(0)])
        module = bag(
            a=tied,
            frozen=weight(full + 1, line, [S(0)], trains=False),
            b=tied,
            child=bag(c=tied, n=nn.Parameter(numbers(2))),
        )
        judged(module)
        twin = copy.deepcopy(copy.deepcopy(module))
        carried = baggage(module)
        assert not piled_up(twin, carried), piled_up(twin, carried)
        judged(twin)
        assert not piled_up(twin, carried), f"after the second transform {piled_up(twin, carried)}"
        assert twin.a is twin.b is twin.child.c, "come apart"
        assert not twin.frozen.requires_grad, "the frozen one trains"
        names = [n for n, _ in twin.named_parameters()]
        assert names == ["a", "frozen", "child.n"] or names == [
            n for n, _ in module.named_parameters()
        ]
        state = twin.state_dict()
        for name in ("a", "b", "child.c"):
            assert isinstance(state[name], DTensor), f"{name}: a {type(state[name]).__name__}"
            assert_same(local(state[name]), part(full, line, [S(0)]), name)
            assert not shares_memory(state[name], tied), f"{name}: the original's memory"
        twin.load_state_dict({**state, "a": full * 2, "b": full * 2, "child.c": full * 2})
        assert_same(twin.a.detach(), part(full * 2, line, [S(0)]), "loaded")
        assert_same(module.a.detach(), part(full, line, [S(0)]), "the original")

    @pytest.mark.law("autograd")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w2"])
    def test_another_dtype(self, judged: Any, mesh: Any, world: Any) -> None:
        """Cast between forwards, the module computes and trains in the new dtype."""
        line = mesh(world.size)
        module, oracle = net(line, dtype=torch.float32), net(dtype=torch.float32)
        judged(module)
        held = dict(module.named_parameters())
        for what, dtype in (
            ("as made", torch.float32),
            ("double", torch.float64),
            ("float again", torch.float32),
        ):
            for model in (module, oracle):
                model.to(dtype)
                model.zero_grad()
                backward(model)
            assert_trained(held, line, oracle, what)
            for name, value in module.state_dict().items():
                assert value.dtype == oracle.state_dict()[name].dtype, f"{what}: {name}"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_cast_before_the_first_forward(self, judged: Any, mesh: Any) -> None:
        """Cast right after the transform, and the optimizer's Parameters are those that train."""
        line = mesh(1)
        module, oracle = net(line, dtype=torch.float32), net(dtype=torch.float32)
        judged(module)
        held = dict(module.named_parameters())
        ours, theirs = sgd(module), sgd(oracle)
        for model, optimizer in ((module, ours), (oracle, theirs)):
            model.double()
            backward(model)
            optimizer.step()
        assert_trained(held, line, oracle, "after a step")

    # Dynamo looks at the gradient of whatever it meets.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_compiled(self, judged: Any, mesh: Any) -> None:
        """Under torch.compile the module gives the same output and gradients."""
        line = mesh(1)
        module, oracle = net(line), net()
        judged(module)
        held = dict(module.named_parameters())
        compiled: Any = torch.compile(module, backend="eager")
        for number in range(2):
            backward(compiled, number)
            backward(oracle, number)
            assert_trained(held, line, oracle, f"forward {number}")
