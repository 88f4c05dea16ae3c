"""Transforms within transforms and again, and what must not pile up on a transformed module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from conformance.kit.agree import attempt
from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.layouts import S
from conformance.kit.refusals import SHAPE, assert_refusal
from conformance.kit.tensor_parallel import (
    assert_holds,
    assert_inside,
    backward,
    baggage,
    batch,
    identities,
    net,
    piled_up,
    small,
    weight,
)


def fail(*_: Any) -> None:
    """A look inside a forward that fails."""
    raise ZeroDivisionError


@pytest.mark.judges("tensor.parallel.ddp._pre_dp_module_transform")
class TestPreDpModuleTransformLaws:
    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("parts", [["up"], ["up", "down"]], ids=["one part", "all parts"])
    @pytest.mark.thorough(but=["w1-all parts"])
    def test_parts_that_were_transformed_before(
        self, judged: Any, mesh: Any, world: Any, parts: list[str]
    ) -> None:
        """Children transformed on their own, then the whole: the whole's forward decides."""
        line, oracle = mesh(world.size), net()
        module = net(line)
        for name in parts:
            judged(module.get_submodule(name))
        judged(module)
        before = identities(module)
        for number in range(2):

            def look(inside: nn.Module, n: int = number) -> None:
                # The first child's forward is over, the second's is to come.
                assert_inside(inside, line, f"forward {n}")

            module.zero_grad()
            backward(module, look=look)
            assert identities(module) == before, f"after forward {number}"
        backward(oracle)
        assert_holds(module, line, oracle, "after two forwards")
        module.up(batch())
        assert identities(module) == before, "after a forward of the child"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_a_failure_that_forward_catches(self, judged: Any, mesh: Any) -> None:
        """Where a child fails and the forward goes on, it goes on with DTensors."""
        line, oracle = mesh(1), net()
        module = net(line)
        judged(module)
        before = identities(module)

        def look(inside: Any) -> None:
            error = attempt(lambda: inside.up(small(3, 3)))
            assert_refusal(error, SHAPE, what="a (3, 3) batch for a (9, 4) weight")
            assert_inside(inside, line, "after the child failed")

        backward(module, look=look)
        backward(oracle)
        assert_holds(module, line, oracle, "afterwards")
        assert identities(module) == before, "other objects"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_after_an_interrupt(self, judged: Any, mesh: Any) -> None:
        """A forward that was interrupted does not hinder the next one, which leaves all local."""
        line, oracle = mesh(1), net()
        module = net(line)
        judged(module)
        before = identities(module)

        def interrupt(_: nn.Module) -> None:
            raise KeyboardInterrupt

        for number in range(2):
            with pytest.raises(KeyboardInterrupt):
                module(batch(), interrupt)
            backward(module, number, lambda inside: assert_inside(inside, line))
            backward(oracle, number)
            assert_holds(module, line, oracle, f"after interrupt {number}")
            assert identities(module) == before, f"other objects after interrupt {number}"

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("fails", [False, True], ids=["returning", "failing"])
    def test_a_module_inside_itself(self, judged: Any, mesh: Any, world: Any, fails: bool) -> None:
        """A module that calls itself holds DTensors until its outermost forward ends."""
        line = mesh(world.size)

        class Nested(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = weight(numbers(5, 2), line, [S(0)])

            def forward(self, depth: int) -> None:
                assert isinstance(self.w, DTensor), f"on the way down at {depth}"
                if depth:
                    error = attempt(lambda: self(depth - 1))
                    assert error is None or isinstance(error, ZeroDivisionError), f"{error!r}"
                elif fails:
                    fail()
                assert isinstance(self.w, DTensor), f"on the way up at {depth}"

        module = Nested()
        judged(module)
        mine = module.w
        for _ in range(2):
            module(3)
            assert module.w is mine, "another object"

    @pytest.mark.law("autograd")
    @pytest.mark.world(1)
    def test_a_module_inside_itself_with_grad(self, judged: Any, mesh: Any) -> None:
        """What a module computes with grad inside its forward without must train it."""
        line = mesh(1)

        class Nested(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = weight(numbers(5, 2), line, [S(0)])

            def forward(self, depth: int) -> torch.Tensor:
                if depth:
                    with torch.set_grad_enabled(depth == 1):
                        return self(depth - 1)
                whole: Any = self.w * 3
                return whole.to_local().sum()

        module = Nested()
        judged(module)
        with torch.no_grad():
            module(3).backward()
        assert_same(module.w.grad, torch.full((5, 2), 3.0, dtype=module.w.dtype))

    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w1"])
    def test_a_second_transform_changes_nothing(self, judged: Any, mesh: Any, world: Any) -> None:
        """Transformed again, before or after forwards, the module is as after the first time."""
        line, oracle = mesh(world.size), net()
        module = net(line)
        judged(module)
        before, carried = identities(module), baggage(module)
        judged(module)
        assert identities(module) == before, "other parameters"
        assert not piled_up(module, carried), piled_up(module, carried)
        module(batch())
        judged(module)
        assert identities(module) == before, "other parameters, after a forward"
        assert not piled_up(module, carried), f"after a forward  {piled_up(module, carried)}"
        backward(module)
        backward(oracle)
        assert_holds(module, line, oracle, "after both")

    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w1"])
    def test_nothing_piles_up(self, judged: Any, mesh: Any, world: Any) -> None:
        """Hooks and attributes, of modules and parameters, are no more after many forwards."""
        module = net(mesh(world.size))
        judged(module)
        backward(module)
        once = baggage(module)
        for number in range(3):
            backward(module)
            with torch.no_grad():
                module(batch())
            attempt(lambda: module(batch(), fail))
            assert not piled_up(module, once), f"round {number} {piled_up(module, once)}"

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_a_module_without_dtensors(self, judged: Any) -> None:
        """A module that holds no DTensor trains as before, with the objects that it had."""
        module, oracle = net(), net()
        before = identities(module)
        judged(module)
        backward(module)
        backward(oracle)
        assert identities(module) == before
        for name, param in module.named_parameters():
            expected = oracle.get_parameter(name).grad
            assert expected is not None
            assert_same(param.grad, expected, name)
