"""A module whose DTensor parameters give way to local ones, as data parallelism wants them."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from conformance.kit.collectives import Collectives
from conformance.kit.compare import assert_same, assert_type, fingerprint, local, shares_memory
from conformance.kit.data import EACH_DTYPE, numbers
from conformance.kit.layouts import ONE_D, THREE_D, TWO_D, R, S, dtensor, part, placement_id
from conformance.kit.subclasses import inside
from conformance.kit.tensor_parallel import bag, baggage, piled_up, weight

SHAPES = [(4, 6), (5, 3), (3, 3), (1, 1), (0, 3), (3, 0), (2, 3, 5)]
"""Even, uneven, fewer rows than ranks, empty."""


def assert_local(got: Any, expected: torch.Tensor, what: str, *, trains: bool = True) -> None:
    """`got` is a plain Parameter with these values, and a leaf."""
    assert isinstance(got, nn.Parameter), f"{what}: a {type(got).__name__}"
    assert_same(got.detach(), expected, what)
    assert got.requires_grad is trains, f"{what}: requires_grad is {got.requires_grad}"
    assert got.is_leaf, f"{what}: part of a graph"
    assert got.grad is None, f"{what}: has a gradient"


class Comparisons(TorchDispatchMode):
    """Counts elementwise comparisons."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func.name().partition(".")[0] in {"aten::eq", "aten::ne", "aten::equal"}
        return func(*args, **(kwargs or {}))


class HalfIgnored(nn.Module):
    def __init__(self, w: nn.Parameter, ignored: nn.Parameter) -> None:
        super().__init__()
        self.w, self.ignored = w, ignored

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum() + local(self.w.detach()).sum()


@pytest.mark.judges("tensor.parallel.ddp._localize_dtensor")
class TestLocalizeDtensor:
    @pytest.mark.law("values")
    @pytest.mark.world(1, 2, 3, 4)
    @pytest.mark.parametrize("placements", ONE_D, ids=placement_id)
    @pytest.mark.thorough(but=["w3-S1"])
    def test_local_parameters(self, judged: Any, mesh: Any, world: Any, placements: Any) -> None:
        """A DTensor parameter becomes the Parameter of its local tensor, over the same memory."""
        line = mesh(world.size)
        for shape in SHAPES:
            full = numbers(*shape)
            module = bag(w=weight(full, line, placements))
            held = local(module.w)
            with Collectives() as seen:
                judged(module)
            assert seen.count == 0, f"{shape}: {seen.names}"
            assert_local(module.w, part(full, line, placements), str(shape))
            assert held.numel() == 0 or shares_memory(module.w, held), f"{shape}: a copy"
            assert module.w.stride() == held.stride(), f"{shape}: {module.w.stride()}"

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_two_and_three_dimensions(self, judged: Any, mesh: Any) -> None:
        """Each placement over a 2-D and a 3-D mesh must become its local tensor's Parameter."""
        for grid, combinations in ((mesh(2, 2), TWO_D), (mesh(1, 2, 2), THREE_D)):
            for placements in combinations:
                for shape in [(8, 4), (7, 5), (2, 1)]:
                    full, what = numbers(*shape), f"{shape} {placement_id(placements)}"
                    module = bag(w=weight(full, grid, placements))
                    judged(module)
                    assert_local(module.w, part(full, grid, placements), what)

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    def test_meshes_of_some_ranks(self, judged: Any, mesh: Any) -> None:
        """On a mesh of some ranks, in any order, each member gets its own part; none waits."""
        for ranks in ([1, 3], [3, 1], [2, 3, 0]):
            line, full = mesh(len(ranks), ranks=ranks), numbers(5, 2)
            module = bag(w=weight(full, line, [S(0)]))
            if line.get_coordinate() is not None:
                judged(module)
                assert_local(module.w, part(full, line, [S(0)]), f"ranks {ranks}")

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    @EACH_DTYPE
    def test_every_dtype(self, judged: Any, mesh: Any, dtype: torch.dtype) -> None:
        """A parameter of any dtype, integers and bool too, is localized bit for bit."""
        for shape in [(4,), (), (0, 3)]:
            full = numbers(*shape, dtype=dtype)
            module = bag(w=weight(full, mesh(1), [S(0) if shape else R], trains=False))
            judged(module)
            assert isinstance(module.w, nn.Parameter), f"{shape}: a {type(module.w).__name__}"
            assert_same(module.w.detach(), full, f"{dtype} {shape}")

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    def test_the_order_stays(self, judged: Any, mesh: Any, world: Any) -> None:
        """Names and order of parameters, buffers and state dict keys stay, at every depth."""
        line = mesh(world.size)

        def shard(salt: int) -> nn.Parameter:
            return weight(numbers(5, 2, salt=salt), line, [S(0)])

        plain = {n: nn.Parameter(numbers(3, salt=i)) for i, n in enumerate("abc")}
        module = bag(
            a=shard(1),
            b=plain["a"],
            state=numbers(2),
            child=bag(a=plain["b"], b=shard(2), c=plain["c"], deep=nn.Sequential(bag(w=shard(3)))),
            c=shard(4),
            several=nn.ParameterList([shard(5), nn.Parameter(numbers(2)), shard(6)]),
            named=nn.ParameterDict([("z", shard(7)), ("a", nn.Parameter(numbers(2)))]),
        )
        names = [n for n, _ in module.named_parameters()]
        keys = list(module.state_dict())
        untouched = {n: p for n, p in module.named_parameters() if not isinstance(p, DTensor)}
        buffer = module.state
        judged(module)
        assert [n for n, _ in module.named_parameters()] == names
        assert list(module.state_dict()) == keys
        assert list(module.named) == ["z", "a"]
        assert not [n for n, p in module.named_parameters() if isinstance(p, DTensor)]
        for name, param in untouched.items():
            assert module.get_parameter(name) is param, f"{name}: another object"
        assert module.state is buffer, "the buffer is another object"
        for name, salt in (("a", 1), ("child.b", 2), ("child.deep.0.w", 3), ("several.2", 6)):
            expected = part(numbers(5, 2, salt=salt), line, [S(0)])
            assert_local(module.get_parameter(name), expected, name)

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    def test_ties_stay(self, judged: Any, mesh: Any, world: Any) -> None:
        """A parameter tied within a module, across modules, in a shared module, is one again."""
        line, full = mesh(world.size), numbers(5, 2)
        tied, shared = weight(full, line, [S(0)]), bag(w=weight(full + 1, line, [S(0)]))
        module = bag(a=tied, other=nn.Parameter(numbers(2)), b=tied, left=shared, right=shared)
        module.child = bag(c=tied)
        every = [n for n, _ in module.named_parameters(remove_duplicate=False)]
        judged(module)
        assert [n for n, _ in module.named_parameters()] == ["a", "other", "left.w"]
        assert [n for n, _ in module.named_parameters(remove_duplicate=False)] == every
        assert module.a is module.b is module.child.c, "come apart"
        assert_local(module.child.c, part(full, line, [S(0)]), "tied")
        assert_local(module.right.w, part(full + 1, line, [S(0)]), "of the shared module")

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    def test_frozen_stays_frozen(self, judged: Any, mesh: Any, world: Any) -> None:
        """Each local Parameter trains exactly where its DTensor did."""
        line, full = mesh(world.size), numbers(4, 6)
        for placements in ONE_D:
            module = bag(
                frozen=weight(full, line, placements, trains=False),
                trained=weight(full, line, placements),
            )
            judged(module)
            expected, what = part(full, line, placements), placement_id(placements)
            assert_local(module.frozen, expected, f"frozen {what}", trains=False)
            assert_local(module.trained, expected, f"trained {what}")

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_other_parameters_are_ignored_later(self, judged: Any, mesh: Any) -> None:
        """A later call with `ignored_params` of its own must localize what an earlier one left."""
        line = mesh(1)
        one, other = (bag(w=weight(numbers(4), line, [S(0)])) for _ in range(2))
        module = bag(one=one, other=other)
        judged(module, ignored_params={one.w})
        assert isinstance(one.w, DTensor)
        judged(module, ignored_params={other.w})
        assert_local(one.w, numbers(4), "left by an earlier call")

    @pytest.mark.law("structure")
    @pytest.mark.should("nobody is promised what a caller hangs on a parameter")
    @pytest.mark.world(1)
    def test_a_gradient_that_is_pending(self, judged: Any, mesh: Any) -> None:
        """A gradient that nobody has waited for moves to the local parameter, finished."""
        module = bag(w=weight(numbers(4), mesh(1), [S(0)]))
        pending: Any = AsyncCollectiveTensor(numbers(4, salt=1))
        module.w.grad = inside(pending, numbers(4), mesh(1), [S(0)])
        judged(module)
        assert_type(module.w.grad, torch.Tensor, "gradient")
        assert_same(module.w.grad, numbers(4, salt=1))

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_outside_autograd(self, judged: Any, mesh: Any, mode: Any) -> None:
        """Localized where no graph is recorded, parameters train all the same."""
        module = bag(w=weight(numbers(4), mesh(1), [S(0)]))
        with mode():
            judged(module)
        assert module.w.requires_grad
        (module.w * numbers(4, salt=1)).sum().backward()
        assert_same(module.w.grad, numbers(4, salt=1))

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_strides_and_offset(self, judged: Any, mesh: Any) -> None:
        """A local tensor that is a view becomes a Parameter over that view."""
        room = numbers(40)
        for name, view in {
            "transposed": room[:24].view(6, 4).t(),
            "offset": room[5:29].view(4, 6),
            "sliced": room[:40:2][:12].view(4, 3),
        }.items():
            module = bag(w=nn.Parameter(dtensor(view, mesh(1), [S(0)], local=view)))
            judged(module)
            assert_local(module.w, view, name)
            assert shares_memory(module.w, room), f"{name}: a copy"
            place = (module.w.stride(), module.w.storage_offset())
            assert place == (view.stride(), view.storage_offset()), f"{name}: {place}"

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    def test_ignored_parameters(self, judged: Any, mesh: Any, world: Any) -> None:
        """Ignored are the parameters in the set, and no others, though they hold equal values."""
        line, full = mesh(world.size), numbers(5, 2)
        one, twin, third = (weight(full, line, [S(0)]) for _ in range(3))
        module = bag(one=one, child=bag(twin=twin, third=third))
        before = fingerprint(twin)
        with Comparisons() as seen:
            judged(module, ignored_params={twin})
        assert seen.count == 0, "tensors are compared by value"
        assert module.child.twin is twin, "the ignored one was replaced"
        assert fingerprint(twin) == before, "the ignored one was changed"
        assert_local(module.one, part(full, line, [S(0)]), "one")
        assert_local(module.child.third, part(full, line, [S(0)]), "third")
        assert [n for n, _ in module.named_parameters()] == ["one", "child.twin", "child.third"]

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("way", ["child alone", "deepcopy", "pickle"])
    def test_ignored_parameters_of_parts_and_copies(self, judged: Any, mesh: Any, way: str) -> None:
        """Ignored parameters stay after a forward of a part alone, and in copies of the module."""
        line, full = mesh(1), numbers(4, 3)
        module = nn.Sequential(HalfIgnored(weight(full, line, [S(0)]), weight(full, line, [R])))
        ignored = module[0].ignored
        judged(module, ignored_params={ignored})
        if way == "deepcopy":
            module = copy.deepcopy(module)
        elif way == "pickle":
            module = pickle.loads(pickle.dumps(module))
        for called in (module[0], module):
            called(numbers(2))
            judged(called, (), None)
            assert_type(module[0].ignored, DTensor, way)
            assert_local(module[0].w, full, "w")
        assert way != "child alone" or module[0].ignored is ignored, "replaced"

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_an_ignored_parameter_is_not_held(self, judged: Any, mesh: Any) -> None:
        """One that was to be ignored, and was replaced, is gone, and its successor not ignored."""
        module: Any = bag(a=weight(numbers(4), mesh(1), [S(0)]), b=nn.Parameter(numbers(2)))
        gone = weakref.ref(module.a)
        judged(module, ignored_params={module.a})
        module.a = weight(numbers(4, salt=1), mesh(1), [S(0)])
        gc.collect()
        assert gone() is None, "it is held after it was replaced"
        judged(module)
        assert_local(module.a, numbers(4, salt=1), "what took its place")

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_an_ignored_tied_parameter(self, judged: Any, mesh: Any) -> None:
        """A tied parameter that is ignored stays in all its places; an empty set ignores none."""
        tied = weight(numbers(4), mesh(1), [S(0)])
        module = bag(a=tied, child=bag(b=tied))
        ignored = {tied}
        judged(module, None, None, ignored_params=ignored)
        assert module.a is module.child.b is tied
        assert len(ignored) == 1, "the caller's set was changed"
        module = bag(a=weight(numbers(4), mesh(1), [S(0)]))
        judged(module, ignored_params=set())
        assert_local(module.a, numbers(4), "none ignored")

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_as_a_forward_hook(self, judged: Any, mesh: Any) -> None:
        """Called as a forward hook is, it returns None, so the module's output stays."""
        module, output = bag(w=weight(numbers(4), mesh(1), [S(0)])), numbers(3)
        assert judged(module, (numbers(2),), output) is None
        assert_local(module.w, numbers(4), "w")

    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    def test_a_second_call_changes_nothing(self, judged: Any, mesh: Any, world: Any) -> None:
        """Where all is local already, the same objects stay and nothing piles up."""
        line, full = mesh(world.size), numbers(5, 2)
        module = bag(a=weight(full, line, [S(0)]), child=bag(b=weight(full, line, [R])))
        judged(module)
        before = fingerprint(list(module.parameters()))[2]
        carried = baggage(module)
        for _ in range(3):
            judged(module)
        assert fingerprint(list(module.parameters()))[2] == before, "parameters changed"
        assert not piled_up(module, carried), piled_up(module, carried)

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_a_module_without_dtensors(self, judged: Any) -> None:
        """A module that holds no DTensor is left as it is."""
        tied = nn.Parameter(numbers(3))
        module = bag(a=tied, b=numbers(2), child=bag(c=tied, d=nn.Parameter(numbers(4))))
        named = dict(module.named_parameters(remove_duplicate=False))
        before, carried = fingerprint(named), baggage(module)
        judged(module)
        judged(bag())
        after = dict(module.named_parameters(remove_duplicate=False))
        assert fingerprint(after)[1:] == before[1:], "changed"
        assert not piled_up(module, carried), piled_up(module, carried)

    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    def test_one_part_of_a_module(self, judged: Any, mesh: Any, world: Any) -> None:
        """Called with a child, it leaves the DTensors outside that child alone."""
        line, full = mesh(world.size), numbers(5, 2)
        module = bag(a=weight(full, line, [S(0)]), child=bag(b=weight(full, line, [S(0)])))
        outside = module.a
        judged(module.child)
        assert module.a is outside
        assert_local(module.child.b, part(full, line, [S(0)]), "child.b")
