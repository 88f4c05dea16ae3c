"""Transformed modules whose forwards meet, and what others do with them at the same time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from conformance.kit.compare import assert_same, assert_type, local
from conformance.kit.data import numbers
from conformance.kit.layouts import S, dtensor, part
from conformance.kit.refusals import refused
from conformance.kit.subclasses import inside, subclass_with
from conformance.kit.tensor_parallel import (
    Scaled,
    assert_holds,
    assert_inside,
    backward,
    bag,
    identities,
    net,
    weight,
)


class Inner(nn.Module):
    """Does something in the middle of its forward."""

    def __init__(self, w: nn.Parameter) -> None:
        super().__init__()
        self.w = w

    def forward(self, between: Callable[[], Any]) -> None:
        assert_type(self.w, DTensor, "before")
        between()
        assert_type(self.w, DTensor, "after")


class Outer(nn.Module):
    """Calls no child."""

    def __init__(self, inner: Inner, w: nn.Parameter) -> None:
        super().__init__()
        self.inner = inner
        self.w = w

    def forward(self) -> None:
        assert_type(self.w, DTensor, "outer")


class Cloned(nn.Module):
    """Puts a clone of its second parameter into its state dict."""

    def __init__(self, **held: nn.Parameter) -> None:
        super().__init__()
        for name, param in held.items():
            self.register_parameter(name, param)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "b"] = destination[prefix + "b"].detach().clone()


@pytest.mark.judges("tensor.parallel.ddp._pre_dp_module_transform")
class TestPreDpModuleTransformAmongOthers:
    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    def test_a_forward_that_ends_within_another(self, judged: Any, mesh: Any, world: Any) -> None:
        """A forward must keep its DTensors while one of a module around it begins and ends."""
        line, full = mesh(world.size), numbers(4, 3)
        module = Outer(Inner(weight(full, line, [S(0)])), weight(full, line, [S(0)]))
        judged(module)
        before = identities(module)
        for number in range(2):
            module.inner(module)
            assert identities(module) == before, f"other objects after forward {number}"

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1, 2)
    def test_another_composable_function(self, judged: Any, mesh: Any, world: Any) -> None:
        """A module that checkpoint() was composed with, before or after, must train exactly."""
        line = mesh(world.size)
        for when in ("before", "after"):
            module, oracle = net(line), net()
            if when == "before":
                checkpoint(module)
            judged(module)
            if when == "after":
                checkpoint(module)
            checkpoint(oracle)
            backward(module)
            backward(oracle)
            assert_holds(module, line, oracle, f"checkpoint() {when}")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1, 2)
    def test_a_module_that_saves_one_as_a_copy(self, judged: Any, mesh: Any, world: Any) -> None:
        """With keep_vars a module's own Parameter must stay one, and a copy become a DTensor."""
        line, full = mesh(world.size), numbers(4, 3)
        module = Cloned(**{name: weight(full, line, [S(0)]) for name in "abc"})
        judged(module)
        kept = module.state_dict(keep_vars=True)
        for name in "ac":
            assert kept[name] is module.get_parameter(name), f"{name}: another object"
        assert_type(kept["b"], DTensor, "the copy")
        assert_same(local(kept["b"]), part(full, line, [S(0)]), "the copy")

    @pytest.mark.law("group")
    @pytest.mark.world(2)
    def test_a_rank_outside_of_the_mesh(self, judged: Any, mesh: Any, rank: int) -> None:
        """A rank that has no part must load and compute like the others, and hold nothing."""
        full = numbers(4, 3)
        module = Scaled({"w": torch.ones(())}, w=weight(full, mesh(1, ranks=[0]), [S(0)]))
        judged(module)
        wrapped = DistributedDataParallel(module, init_sync=False)
        assert_same(wrapped().detach(), full.sum() if rank == 0 else torch.zeros(()).to(full))
        module.load_state_dict({"w": full + 1})
        held = module.get_parameter("w").detach()
        assert_same(held, full + 1 if rank == 0 else full.new_empty(0), "loaded")

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_assigned_by_a_module_inside_itself(self, judged: Any, mesh: Any) -> None:
        """A Parameter assigned on the way down must be the module's own on the way up."""
        line, full = mesh(1), numbers(4, 3)

        class Nested(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = weight(full, line, [S(0)])

            def forward(self, depth: int) -> None:
                if depth:
                    self.w = nn.Parameter(full + depth)
                    self(depth - 1)

        module = Nested()
        judged(module)
        module(2)
        assert_type(module.w, nn.Parameter, "afterwards")
        assert_same(module.w.detach(), full + 1, "afterwards")


@pytest.mark.judges("tensor.parallel.ddp._localize_dtensor")
class TestLocalizeDtensorWithinAForward:
    @pytest.mark.law("autograd")
    @pytest.mark.world(1, 2)
    def test_a_forward_that_has_begun(self, judged: Any, mesh: Any, world: Any) -> None:
        """Localized after its forward began, as by replicate(), a module must train exactly."""
        line, oracle = mesh(world.size), net()
        module = net(line)
        handle = module.register_forward_pre_hook(lambda m, _: judged(m, ignored_params=set()))
        for number in range(2):
            backward(module, number, lambda inside: assert_inside(inside, line))
            backward(oracle, number)
            handle.remove()
        assert_holds(module, line, oracle, "afterwards")

    @pytest.mark.law("autograd")
    @pytest.mark.world(1, 2)
    def test_as_a_hook_of_a_part(self, judged: Any, mesh: Any, world: Any) -> None:
        """The hook of a part leaves its DTensors in until the forward around it ends."""
        line, full = mesh(world.size), numbers(4, 3)

        class Around(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.part = nn.Identity()
                self.part.w = weight(full, line, [S(0)])

            def forward(self) -> None:
                self.part(full)
                assert_type(self.part.w, DTensor, "after the part's forward")

        module = Around()
        judged(module)
        module.part.register_forward_hook(judged)
        for _ in range(2):
            module()
            assert_type(module.part.w, nn.Parameter, "afterwards")

    @pytest.mark.law("all-or-nothing")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("kind", ["parameter", "buffer"])
    @pytest.mark.thorough(but=["w1-buffer", "w2-parameter"])
    def test_a_module_that_could_not_compute(
        self, judged: Any, mesh: Any, world: Any, kind: str
    ) -> None:
        """A module whose forward began and that itself holds a DTensor is refused, and stays."""
        line, full = mesh(world.size), numbers(4, 3)

        class Holder(nn.Module):
            def forward(self) -> None:
                raise AssertionError("it computes")

        module, held = Holder(), weight(full, line, [S(0)])
        if kind == "parameter":
            module.register_parameter("odd", held)
        else:
            module.register_buffer("odd", dtensor(full, line, [S(0)]))
        left: set[Any] = set()
        module.register_forward_pre_hook(lambda m, _: judged(m, ignored_params=left))
        refused(module, "'odd'", kinds=(RuntimeError,))
        assert_type(module.odd, DTensor, "after the refusal")
        if kind == "parameter":
            left.add(held)
            with pytest.raises(AssertionError, match="it computes"):
                module()


@pytest.mark.judges("tensor.parallel._data_parallel_utils._unflatten_tensor")
class TestUnflattenTensorUnused:
    @pytest.mark.law("autograd")
    @pytest.mark.world(1)
    def test_what_gets_no_gradient(self, judged: Any, mesh: Any) -> None:
        """Where the DTensor gets no gradient at all the local tensor must get none."""

        class Nothing(torch.autograd.Function):
            @staticmethod
            def forward(_ctx: Any, x: Any) -> torch.Tensor:
                return x.to_local().detach().sum()

            @staticmethod
            def backward(_ctx: Any, *_: Any) -> Any:
                return None

        leaf = numbers(4, 3).double().requires_grad_()
        made = judged(leaf, dtensor(numbers(4, 3).double(), mesh(1), [S(0)])._spec)
        Nothing.apply(made).backward()
        assert leaf.grad is None, f"a gradient: {leaf.grad}"


@pytest.mark.judges("tensor.parallel._data_parallel_utils._flatten_tensor")
class TestFlattenTensorPending:
    @pytest.mark.law("autograd")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("flatten", [True, False], ids=["traceable", "closed"])
    def test_a_class_with_views_alone(self, judged: Any, mesh: Any, flatten: bool) -> None:
        """A class that is not detached but viewed must come without a graph, too."""
        kind, full = subclass_with(["aten.view.default"], flatten), numbers(4, 3).double()
        held = kind(full, full.neg(), requires_grad=True)
        spec = dtensor(full, mesh(1), [S(0)])._spec
        got, _ = judged(DTensor(held, spec, requires_grad=True))
        assert got.grad_fn is None, f"recorded: {got.grad_fn}"

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_a_dtensor_in_a_container(self, judged: Any, mesh: Any) -> None:
        """A DTensor that the local tensor's type holds in a container is finished, too."""
        kind, full = subclass_with(["aten.detach.default"], flatten=False), numbers(4, 3)
        local_tensor: Any = kind(full, full.neg())
        pending: Any = AsyncCollectiveTensor(full)
        held = inside(pending, full, mesh(1), [S(0)])
        local_tensor.more = {"one": [held]}
        got, _ = judged(inside(local_tensor, full, mesh(1), [S(0)]))
        assert_type(held._local_tensor, torch.Tensor, "what it holds")
        assert_same(got.first, full)


@pytest.mark.judges("tensor.parallel.ddp._reconstruct_dtensor")
class TestReconstructDtensorWithinAForward:
    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    @pytest.mark.parametrize("where", ["", "child"], ids=["the module", "a child"])
    @pytest.mark.thorough(but=["w1-a child", "w2-the module"])
    def test_what_was_replaced_since(
        self, judged: Any, subject: Any, mesh: Any, world: Any, where: str
    ) -> None:
        """A Parameter assigned while DTensors are in must become one at the next call."""
        localize = subject.function("tensor.parallel.ddp._localize_dtensor")
        line, full, new = mesh(world.size), numbers(4, 3), numbers(4, 3, salt=1)
        held: Any = {name: weight(full, line, [S(0)]) for name in "ab"}
        module = bag(**held, child=bag(**held))
        localize(module)
        judged(module, ())
        owner = module.get_submodule(where)
        mine = owner.a = nn.Parameter(part(new, line, [S(0)]).clone())
        judged(owner, ())
        assert_type(owner.a, DTensor, "the new one")
        assert_same(local(owner.a).detach(), part(new, line, [S(0)]), "the new one")
        assert_same(local(owner.b).detach(), part(full, line, [S(0)]), "the other one")
        localize(module)
        assert owner.a is mine, "another Parameter came back"


@pytest.mark.judges("tensor.parallel._data_parallel_utils.sync_grad_hook")
class TestSyncGradHookOfContainers:
    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_what_holds_nothing_pending_stays(self, judged: Any) -> None:
        """A container of a gradient's type must stay the same object where nothing is pending."""
        kind, full = subclass_with([], flatten=False), numbers(4, 3)
        held: dict[str, Any] = {
            "list": [full, 1],
            "tuple": (full, "x"),
            "dict": {"one": full, "two": None},
            "nested": {"one": [full, {"two": (full, 1)}]},
            "empty": {},
        }
        grad: Any = kind(full, full.neg())
        vars(grad).update(held)
        assert judged(grad) is grad
        for name, value in held.items():
            assert vars(grad)[name] is value, f"{name}: another object"
        assert held["nested"]["one"][1]["two"][0] is full
        assert torch.equal(full, numbers(4, 3))
