"""A transformed module whose state dicts others adapt, match by identity, or change later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from conformance.kit.compare import assert_same
from conformance.kit.data import numbers
from conformance.kit.layouts import R, S, dtensor, part
from conformance.kit.tensor_parallel import (
    assert_holds,
    assert_inside,
    backward,
    bag,
    batch,
    net,
    sgd,
    weight,
    whole,
)

ROWS = 6


def pad(state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A load hook: a checkpoint of fewer rows than the module has is filled with zeros."""
    given = state[prefix + "w"]
    if len(given) < ROWS:
        state[prefix + "w"] = torch.cat([given, given.new_zeros(ROWS - len(given), 2)])


def strip(_: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """A state dict hook: the last row is padding, and is not saved."""
    state[prefix + "w"] = whole(state[prefix + "w"])[: ROWS - 1]


class Padded(nn.Module):
    """A module that pads what it loads by itself."""

    def __init__(self, w: nn.Parameter) -> None:
        super().__init__()
        self.w = w

    def _load_from_state_dict(self, state: Any, prefix: str, *others: Any) -> None:
        pad(state, prefix)
        super()._load_from_state_dict(state, prefix, *others)


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.mark.judges("tensor.parallel.ddp._pre_dp_module_transform")
class TestPreDpModuleTransformAdapting:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w2"])
    def test_the_parameters_themselves(self, judged: Any, mesh: Any, world: Any) -> None:
        """state_dict(keep_vars=True) must hold the module's own Parameters, gradients and all."""
        line, oracle = mesh(world.size), net()
        module = net(line)
        module.register_buffer("mask", dtensor(numbers(4), line, [S(0)]))
        judged(module)
        for when in ("transformed", "after a backward"):
            kept: Any = nn.Sequential(module).state_dict(keep_vars=True)
            for name, param in (*module.named_parameters(), *module.named_buffers()):
                got = kept[f"0.{name}"]
                assert got is param, f"{when}: {name} is another {type(got).__name__}"
            assert isinstance(module.state_dict()["up.weight"], DTensor), f"{when}: no DTensor"
            module.zero_grad()
            backward(module)
        backward(oracle)
        with torch.no_grad():
            for name, value in module.state_dict(keep_vars=True).items():
                if value.grad is not None:
                    expected: Any = oracle.get_parameter(name)
                    value.sub_(value.grad)
                    expected.sub_(expected.grad)
        delattr(module, "mask")
        assert_holds(module, line, oracle, "stepped through the state dict")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1, 2)
    def test_local_tensors_loaded_back(self, judged: Any, mesh: Any, world: Any) -> None:
        """Copies of what the module holds between forwards must load as this rank's parts."""
        line, oracle = mesh(world.size), net(salt=1)
        source, module = net(line, salt=1), net(line)
        judged(source)
        judged(module)
        kept = source.state_dict(keep_vars=True)
        for what, state in {
            "the Parameters": kept,
            "their copies": {name: value.detach().clone() for name, value in kept.items()},
        }.items():
            module.load_state_dict(state)
            assert_holds(module, line, oracle, what)
            module.load_state_dict(net().state_dict())
            assert_holds(module, line, net(), "reset")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("kind", ["hook before", "hook after", "override"])
    @pytest.mark.thorough(but=["w1-override", "w2-hook before", "w2-hook after"])
    def test_a_module_that_adapts_what_it_loads(
        self, judged: Any, mesh: Any, world: Any, kind: str
    ) -> None:
        """A shape must not be refused before the module's own hook or method had its turn."""
        line, full = mesh(world.size), numbers(ROWS, 2)
        param = weight(full, line, [S(0)])
        module: Any = Padded(param) if kind == "override" else bag(w=param)
        if kind == "hook before":
            module._register_load_state_dict_pre_hook(pad)
        judged(module)
        if kind == "hook after":
            module._register_load_state_dict_pre_hook(pad)
        small = numbers(ROWS - 1, 2, salt=1)
        for given in (small, dtensor(small, line, [R])):
            module.load_state_dict({"w": given})
            padded = torch.cat([small, torch.zeros(1, 2)])
            assert_same(module.w.detach(), part(padded, line, [S(0)]), f"{type(given).__name__}")
            with torch.no_grad():
                module.w.zero_()

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("moment", ["before", "after"])
    @pytest.mark.thorough(but=["w1-after", "w2-before"])
    def test_a_hook_that_adapts_what_is_saved(
        self, judged: Any, mesh: Any, world: Any, moment: str
    ) -> None:
        """Others' state dict hooks must be given the whole's DTensor, whenever they came."""
        line, full = mesh(world.size), numbers(ROWS, 2)
        module = bag(w=weight(full, line, [S(0)]))
        if moment == "before":
            module.register_state_dict_post_hook(strip)
        judged(module)
        if moment == "after":
            module.register_state_dict_post_hook(strip)
        assert_same(module.state_dict()["w"], full[: ROWS - 1], "saved")

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_a_load_hook_that_is_removed(self, judged: Any, mesh: Any) -> None:
        """Handles of load hooks, from before the transform and after, must remove them still."""
        module, ran = net(mesh(1)), list[str]()
        layer: Any = module.up
        early = layer._register_load_state_dict_pre_hook(lambda *_: ran.append("early"))
        judged(module)
        late = layer._register_load_state_dict_pre_hook(lambda *_: ran.append("late"))
        module.load_state_dict(module.state_dict())
        assert ran == ["early", "late"]
        early.remove()
        late.remove()
        module.load_state_dict(module.state_dict())
        assert ran == ["early", "late"], f"ran after it was removed: {ran}"

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_one_element_for_a_scalar(self, judged: Any, mesh: Any) -> None:
        """A checkpoint's one element must load into a scalar, as nn.Module takes it."""
        line = mesh(1)
        module = bag(w=weight(numbers(), line, [R]))
        judged(module)
        for given in (numbers(1, salt=1), dtensor(numbers(1, salt=2), line, [R])):
            module.load_state_dict({"w": given})
            assert_same(module.w.detach(), whole(given)[0], type(given).__name__)

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1, 2)
    def test_a_parametrization_that_comes_later(self, judged: Any, mesh: Any, world: Any) -> None:
        """A weight that is parametrized after the transform must compute and train as before it."""
        line = mesh(world.size)
        module: Any = net(line)
        oracle: Any = net()
        judged(module)
        held = module.up.weight
        for model in (module, oracle):
            parametrize.register_parametrization(model.up, "weight", Double(), unsafe=True)
        for number in range(2):
            with torch.no_grad():
                assert_same(module(batch(number)), oracle(batch(number)), f"forward {number}")
        for model in (module, oracle):
            backward(model)
        assert module.up.parametrizations.weight.original is held, "another Parameter"
        expected = oracle.up.parametrizations.weight.original.grad
        assert_same(held.grad, part(expected, line, [S(0)]), "gradient")
        saved = module.state_dict()["up.parametrizations.weight.original"]
        assert isinstance(saved, DTensor), f"saved as {type(saved).__name__}"

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1, 2)
    def test_forward_hooks_that_come_later(self, judged: Any, mesh: Any, world: Any) -> None:
        """A forward hook must see the DTensors, whether it came before the transform or after."""
        line, seen = mesh(world.size), list[str]()
        module = net(line)

        def hook(name: str) -> Callable[..., None]:
            def look(inside: nn.Module, *_: Any) -> None:
                assert_inside(inside, line, name)
                seen.append(name)

            return look

        for when in ("before", "after"):
            module.register_forward_pre_hook(hook(f"pre-hook {when}"))
            module.register_forward_hook(hook(f"hook {when}"))
            if when == "before":
                judged(module)
        for _ in range(2):
            module(batch())
        assert len(seen) == 8, f"{seen}"
        assert_holds(module, line, net(), "after the forwards")

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_hooks_from_before_are_removed(self, judged: Any, mesh: Any) -> None:
        """The handle of a hook from before the transform must remove it afterwards, too."""
        module, seen = net(mesh(1)), list[str]()

        def hook(name: str) -> Callable[..., None]:
            return lambda *_: seen.append(name)

        handles = {
            "forward pre-hook": module.register_forward_pre_hook(hook("forward pre-hook")),
            "forward hook": module.register_forward_hook(hook("forward hook")),
            "state dict pre-hook": module.register_state_dict_pre_hook(hook("state dict pre-hook")),
            "state dict hook": module.register_state_dict_post_hook(hook("state dict hook")),
            "load pre-hook": module.register_load_state_dict_pre_hook(hook("load pre-hook")),
            "load hook": module.register_load_state_dict_post_hook(hook("load hook")),
        }
        judged(module)
        for left in (set(handles), set[str]()):
            seen.clear()
            module(batch())
            module.load_state_dict(module.state_dict())
            assert set(seen) == left, f"called {sorted(set(seen))}, expected {sorted(left)}"
            for handle in handles.values():
                handle.remove()

    @pytest.mark.law("autograd")
    @pytest.mark.world(1)
    def test_an_evaluation_that_was_interrupted(self, judged: Any, mesh: Any) -> None:
        """Ctrl-C in an evaluation must not take the gradients from the training step after it."""
        line, oracle = mesh(1), net()
        module = net(line)
        judged(module)

        def interrupt(_: nn.Module) -> None:
            raise KeyboardInterrupt

        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            module(batch(), interrupt)
        backward(module)
        backward(oracle)
        assert_holds(module, line, oracle, "after the interrupt")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("trained", [False, True], ids=["new", "with state"])
    @pytest.mark.thorough(but=["w1-new", "w2-with state"])
    def test_an_optimizer_from_before(
        self, judged: Any, mesh: Any, world: Any, trained: bool
    ) -> None:
        """An optimizer that was made before the transform must train the module's Parameters."""
        line, oracle = mesh(world.size), net()
        module = net(line)
        ours, theirs = sgd(module), sgd(oracle)
        for step in range(3):
            if step == int(trained):
                judged(module)
            for model, optimizer in ((module, ours), (oracle, theirs)):
                optimizer.zero_grad()
                backward(model, step)
                optimizer.step()
        assert_holds(module, line, oracle, "after three steps")
        held = [id(param) for param in module.parameters()]
        theirs_too = [id(param) for param in ours.param_groups[0]["params"]]
        assert theirs_too == held, "the optimizer holds other Parameters, or another order"

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1, 2)
    def test_every_optimizer_from_before(self, judged: Any, mesh: Any, world: Any) -> None:
        """Each of several, with state and without, must hold the module's Parameters alone."""
        module = net(mesh(world.size))
        optimizers = [torch.optim.SGD(module.parameters(), 0.5, momentum=0.5) for _ in range(3)]
        backward(module)
        for optimizer in optimizers[:2]:
            optimizer.step()
        judged(module)
        held = list(map(id, module.parameters()))
        backward(module)
        for number, optimizer in enumerate(optimizers):
            name = f"optimizer {number}"
            params = list(map(id, optimizer.param_groups[0]["params"]))
            assert params == held, f"{name} holds other Parameters"
            assert set(map(id, optimizer.state)) <= set(held), f"{name} has state of others"
            optimizer.step()
            state = optimizer.state_dict()["state"]
            assert sorted(state) == list(range(len(held))), f"{name}: state of {sorted(state)}"

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("first", ["plain", "sharded", "of another module"])
    def test_an_optimizer_of_several_groups(
        self, judged: Any, mesh: Any, world: Any, first: str
    ) -> None:
        """Each of its groups must hold the module's Parameters, whatever the others hold."""
        line = mesh(world.size)
        module = bag(w=weight(numbers(4, 2), line, [S(0)]), plain=nn.Parameter(torch.ones(2)))
        groups = {
            "plain": [module.plain],
            "sharded": [module.w],
            "of another module": [nn.Parameter(torch.ones(3))],
        }
        order = [first, *(name for name in groups if name != first)]
        optimizer = torch.optim.SGD([{"params": groups[name]} for name in order], 0.5)
        judged(module)
        found = zip(order, optimizer.param_groups, strict=True)
        held = {name: group["params"] for name, group in found}
        assert held["sharded"][0] is module.w, "the optimizer goes on with what was replaced"
        assert held["plain"][0] is module.plain
        assert len(held["of another module"]) == 1
