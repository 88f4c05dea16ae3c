"""A tensor-parallel module made ready for DDP: what it holds before, in and after a forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from conformance.kit.agree import attempt
from conformance.kit.collectives import Collectives
from conformance.kit.compare import assert_same, assert_type, local, shares_memory
from conformance.kit.data import numbers
from conformance.kit.layouts import R, S, dtensor, part
from conformance.kit.refusals import SHAPE, refused
from conformance.kit.tensor_parallel import (
    assert_holds,
    assert_inside,
    backward,
    bag,
    batch,
    fill,
    identities,
    net,
    small,
    weight,
    whole,
)


class BrokenForwardError(Exception):
    """What a forward fails with."""


def fail(*_: Any) -> None:
    """A hook, or a look inside, that fails."""
    raise BrokenForwardError


class Calls(nn.Module):
    """A module whose forward is the function that is given, called with the module."""

    def __init__(self, body: Callable[[Any], Any], **entries: Any) -> None:
        super().__init__()
        self.body = body
        fill(self, entries)

    def forward(self) -> Any:
        return self.body(self)


@pytest.mark.judges("tensor.parallel.ddp._pre_dp_module_transform")
class TestPreDpModuleTransform:
    @pytest.mark.law("values")
    @pytest.mark.world(1, 2, 3, 4)
    @pytest.mark.thorough(but=["w2"])
    def test_the_module_computes_what_it_did(self, judged: Any, mesh: Any, world: Any) -> None:
        """The transformed module gives the unsharded one's output; the transform is silent."""
        line = mesh(world.size)
        for hidden in (8, 3):
            module, oracle = net(line, hidden), net(hidden=hidden)
            with Collectives() as seen:
                judged(module)
            assert seen.count == 0, f"{hidden} units: {seen.names}"
            for salt in range(2):
                expected = oracle(batch(salt)).detach()
                assert_same(module(batch(salt)).detach(), expected, f"{hidden} units, {salt}")

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w2"])
    def test_local_parameters_between_forwards(self, judged: Any, mesh: Any, world: Any) -> None:
        """Before and after forwards the module holds the local Parameters, in their order."""
        line, oracle = mesh(world.size), net(hidden=5, frozen=["up.bias"])
        module = net(line, 5, frozen=["up.bias"])
        judged(module)
        assert_holds(module, line, oracle, "transformed")
        for number in range(3):
            module(batch())
            assert_holds(module, line, oracle, f"after forward {number}")

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w1"])
    def test_the_same_objects_each_time(self, judged: Any, mesh: Any, world: Any) -> None:
        """The Parameters are the same objects after every forward, in training and evaluation."""
        module = net(mesh(world.size))
        judged(module)
        before = identities(module)
        for number in range(3):
            backward(module)
            assert identities(module) == before, f"after forward and backward {number}"
            module.eval()
            with torch.no_grad():
                module(batch())
            assert identities(module) == before, f"after evaluation {number}"
            module.train()

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w1"])
    def test_dtensors_inside_forward(self, judged: Any, mesh: Any, world: Any) -> None:
        """In each forward, and in those of its submodules, the module holds DTensors."""
        line = mesh(world.size)
        module = net(line)
        judged(module)
        for number in range(3):
            seen: list[int] = []

            def look(inside: nn.Module, n: int = number, seen: list[int] = seen) -> None:
                assert_inside(inside, line, f"in forward {n}")
                assert not isinstance(inside.gain, DTensor), "a plain one is a DTensor"
                seen.append(n)

            module(batch(), look)
            assert seen == [number]

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("moment", ["before", "after"])
    @pytest.mark.parametrize(
        "where", ["pre-hook", "child's pre-hook", "child's hook", "hook", "forward"]
    )
    @pytest.mark.thorough(but=["child's hook-before"])
    def test_after_an_exception(self, judged: Any, mesh: Any, where: str, moment: str) -> None:
        """A forward that fails, in a hook older or newer than the transform, leaves all local."""
        line, oracle = mesh(1), net()
        module = net(line)
        if moment == "after":
            judged(module)
        handle = {
            "forward": lambda: None,
            "hook": lambda: module.register_forward_hook(fail),
            "pre-hook": lambda: module.register_forward_pre_hook(fail),
            "child's hook": lambda: module.up.register_forward_hook(fail),
            "child's pre-hook": lambda: module.down.register_forward_pre_hook(fail),
        }[where]()
        if moment == "before":
            judged(module)
        before = identities(module)
        for number in range(2):
            look = fail if where == "forward" else None
            error = attempt(lambda look=look: module(batch(), look))  # type: ignore[misc]
            assert isinstance(error, BrokenForwardError), f"{error!r}"
            assert_holds(module, line, oracle, f"after failure {number}")
            assert identities(module) == before, f"other objects after failure {number}"
        if handle is not None:
            handle.remove()
        backward(module)
        backward(oracle)
        assert_holds(module, line, oracle, "after the next forward")

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_after_an_exception_on_all_ranks(self, judged: Any, mesh: Any) -> None:
        """After a forward that failed in the middle the ranks train on together."""
        line, oracle = mesh(2), net()
        module = net(line)
        judged(module)
        held = identities(module)
        assert isinstance(attempt(lambda: module(batch(), fail)), BrokenForwardError)
        assert_holds(module, line, oracle, "after the failure")
        backward(module)
        backward(oracle)
        assert_holds(module, line, oracle, "after the next forward")
        assert identities(module) == held, "other objects"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_a_wrong_shape_leaves_all_local(self, judged: Any, mesh: Any) -> None:
        """A forward refused for one Parameter's shape leaves all local, and can be mended."""
        line = mesh(1)
        module = net(line)
        judged(module)
        before, good = identities(module), module.down.weight.data
        module.down.weight.data = small(2, 2)
        refused(lambda: module(batch()), SHAPE, what="(2, 2) for down.weight")
        assert identities(module) == before, "other objects"
        module.down.weight.data = good
        assert_holds(module, line, net(), "after the failure")
        assert_same(module(batch()).detach(), net()(batch()).detach())

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_after_recomputation(self, judged: Any, mesh: Any) -> None:
        """Activation checkpointing, which breaks forwards off, leaves the same Parameters."""
        module = net(mesh(1))
        judged(module)
        before = identities(module)
        for number in range(2):
            output: Any = checkpoint(module, batch(), use_reentrant=False)
            output.sum().backward()
            assert identities(module) == before, f"after backward {number}"
            hidden: Any = checkpoint(module.up, batch(), use_reentrant=False)
            whole(hidden).sum().backward()
            assert identities(module) == before, f"after the child's backward {number}"

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w1"])
    def test_hooks_of_others_still_run(self, judged: Any, mesh: Any, world: Any) -> None:
        """Forward hooks that stood there, or come later, run once each and change what they may."""
        module, oracle = net(mesh(world.size)), net()
        ran: list[str] = []

        def add(module: nn.Module, name: str, hook: Any, *, post: bool, kwargs: bool) -> None:
            def body(_: nn.Module, *args: Any) -> Any:
                ran.append(name)
                return hook(*args)

            register: Any = module.register_forward_hook
            if not post:
                register = module.register_forward_pre_hook
            register(body, with_kwargs=kwargs)

        for model in (module, oracle):
            add(model, "pre", lambda args: (args[0] + 1, *args[1:]), post=False, kwargs=False)
            add(model, "post", lambda *given: given[-1] * 2, post=True, kwargs=True)
            add(model.up, "child", lambda *given: given[-1] + 1, post=True, kwargs=False)
        judged(module)
        for model in (module, oracle):
            add(model, "late pre", lambda args, named: (args, named), post=False, kwargs=True)
            add(model, "late post", lambda *given: given[-1] + 3, post=True, kwargs=False)
        for number in range(2):
            ran.clear()
            expected = oracle(batch())
            order = list(ran)
            ran.clear()
            assert_same(module(batch()).detach(), expected.detach(), f"forward {number}")
            assert ran == order, f"forward {number}: {ran}, expected {order}"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_arguments_and_output_pass_untouched(self, judged: Any, mesh: Any) -> None:
        """What forward is given and what it returns are the caller's objects, of any kind."""
        given: list[Any] = []

        class Echo(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = weight(numbers(4), mesh(1), [S(0)])

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                given.append((args, kwargs))
                return kwargs.get("back")

        module = Echo()
        judged(module)
        for back in (None, numbers(2), {"a": [1, numbers(2)]}, (), module.w):
            first, named = [1], {"x": 2}
            assert module(first, named=named, back=back) is back
            args, kwargs = given.pop()
            assert args[0] is first
            assert kwargs["named"] is named

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    def test_buffers(self, judged: Any, mesh: Any, world: Any) -> None:
        """Buffers stay; one that is a DTensor is one in forward, and keeps what forward wrote."""
        line, full = mesh(world.size), numbers(5, 2)
        ours, plain = dtensor(full, line, [S(0)]), numbers(3)

        def body(self: Any) -> None:
            assert_type(self.mean, DTensor, "self.mean")
            assert self.mean.placements == (S(0),)
            self.mean.add_(dtensor(torch.ones(5, 2), line, [S(0)]))
            self.count.add_(1)

        module = Calls(body, mean=ours, w=weight(full, line, [S(0)]), count=plain)
        names = [n for n, _ in module.named_buffers()]
        judged(module)
        for number in (1, 2):
            module()
            assert [n for n, _ in module.named_buffers()] == names
            assert module.count is plain, "the plain buffer is another object"
            assert_same(plain, numbers(3) + number, f"forward {number}")
            assert_same(
                local(module.get_buffer("mean")),
                part(full, line, [S(0)]) + number,
                f"forward {number}",
            )

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_integer_parameters(self, judged: Any, mesh: Any) -> None:
        """Integer and bool parameters go through forwards unchanged, and never train."""
        for dtype in (torch.int64, torch.int8, torch.bool):
            full = numbers(4, dtype=dtype)
            module = Calls(
                lambda self: (type(self.w), self.w.dtype, self.w.requires_grad),
                w=weight(full, mesh(1), [S(0)], trains=False),
            )
            judged(module)
            mine = module.w
            for _ in range(2):
                assert module() == (DTensor, dtype, False), f"{dtype}"
                assert module.w is mine, f"{dtype}: another object"
                assert_same(mine, full, f"{dtype}")

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    def test_tied_and_shared(self, judged: Any, mesh: Any, world: Any) -> None:
        """Ties within a module, across modules and in a shared module hold in and after forward."""
        line, full = mesh(world.size), numbers(5, 2)

        def body(self: Any) -> None:
            places = [self.a, self.b, self.child.c, self.left.w, self.right.w]
            assert all(isinstance(p, DTensor) for p in places), [type(p).__name__ for p in places]
            assert all(shares_memory(self.a, p) for p in places), "come apart in forward"

        tied = weight(full, line, [S(0)])
        shared = bag(w=tied)
        module = Calls(body, a=tied, n=nn.Parameter(numbers(2)), b=tied, child=bag(c=tied))
        module.left = module.right = shared
        judged(module)
        before = identities(module)
        assert len({i for _, i in before}) == 2, "come apart"
        for number in range(3):
            module()
            assert identities(module) == before, f"after forward {number}"

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    def test_parameter_containers(self, judged: Any, mesh: Any, world: Any) -> None:
        """DTensors in a ParameterList, in a ParameterDict and under a parametrization are met."""
        line, full = mesh(world.size), numbers(5, 2)

        class Double(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * 2

        def body(self: Any) -> None:
            for found in (*self.several, *self.named.values(), self.child.w):
                assert isinstance(found, DTensor), f"a {type(found).__name__}"
            assert_same(local(self.child.w).detach(), part(full * 2, line, [S(0)]))

        child = bag(w=weight(full, line, [S(0)]))
        parametrize.register_parametrization(child, "w", Double(), unsafe=True)
        module = Calls(
            body,
            several=nn.ParameterList([weight(full, line, [S(0)]), weight(full, line, [R])]),
            named=nn.ParameterDict([(n, weight(full, line, [S(1)])) for n in "za"]),
            child=child,
        )
        names, named = [n for n, _ in module.named_parameters()], cast("Any", module).named
        judged(module)
        before = identities(module)
        assert [n for n, _ in before] == names
        for number in range(2):
            module()
            assert identities(module) == before, f"after forward {number}"
            assert list(named) == ["z", "a"], f"after forward {number}"
