"""A module whose local parameters give way to DTensors for a forward, and back."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from conformance.kit.collectives import Collectives
from conformance.kit.compare import assert_same, assert_type, local, shares_memory
from conformance.kit.data import EACH_DTYPE, numbers
from conformance.kit.layouts import ONE_D, THREE_D, TWO_D, R, S, dtensor, part, placement_id
from conformance.kit.refusals import SHAPE, refused
from conformance.kit.tensor_parallel import bag, baggage, identities, piled_up, weight

LOCALIZE = "tensor.parallel.ddp._localize_dtensor"
SHAPES = [(4, 6), (5, 3), (3, 3), (1, 1), (0, 3), (3, 0), (2, 3, 5)]
"""Even, uneven, fewer rows than ranks, empty."""


@pytest.fixture
def localize(subject: Any) -> Any:
    """The inverse, of the same subject."""
    return subject.function(LOCALIZE)


def assert_whole(got: Any, full: torch.Tensor, mesh: Any, placements: Any, what: str) -> None:
    """`got` is the DTensor that holds `full` in these placements."""
    assert isinstance(got, DTensor), f"{what}: a {type(got).__name__}"
    assert got.device_mesh == mesh, f"{what}: on {got.device_mesh}"
    assert got.placements == tuple(placements), f"{what}: placed {got.placements}"
    assert got.shape == full.shape, f"{what}: shape {tuple(got.shape)}"
    assert got.stride() == full.stride(), f"{what}: strides {got.stride()}"
    assert got.dtype == full.dtype, f"{what}: dtype {got.dtype}"
    assert_same(local(got).detach(), part(full, mesh, placements), what)


@pytest.mark.judges("tensor.parallel.ddp._reconstruct_dtensor")
class TestReconstructDtensor:
    @pytest.mark.law("values")
    @pytest.mark.world(1, 2, 3, 4)
    @pytest.mark.parametrize("placements", ONE_D, ids=placement_id)
    @pytest.mark.thorough(but=["w2-R"])
    def test_back_to_dtensors(
        self, judged: Any, localize: Any, mesh: Any, world: Any, placements: Any
    ) -> None:
        """A localized parameter becomes its DTensor again, over the same memory."""
        line = mesh(world.size)
        for shape in SHAPES:
            full = numbers(*shape)
            module = bag(a=nn.Parameter(numbers(2)), w=weight(full, line, placements))
            localize(module)
            mine = module.w
            with Collectives() as seen:
                judged(module, ())
            assert seen.count == 0, f"{shape}: {seen.names}"
            assert_whole(module.w, full, line, placements, str(shape))
            assert module.w.requires_grad, f"{shape}: does not train"
            assert mine.numel() == 0 or shares_memory(module.w, mine), f"{shape}: a copy"

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2, 3)
    @pytest.mark.thorough(but=["w1"])
    def test_the_inverse(self, judged: Any, localize: Any, mesh: Any, world: Any) -> None:
        """Localized again, the module holds the same Parameter in its place, without traffic."""
        line = mesh(world.size)
        for placements in ONE_D:
            for shape in SHAPES:
                full, what = numbers(*shape), f"{shape} {placement_id(placements)}"
                plain = (nn.Parameter(numbers(2)) for _ in range(2))
                module = bag(a=next(plain), w=weight(full, line, placements), b=next(plain))
                localize(module)
                before, mine = identities(module), module.w
                judged(module, ())
                with Collectives() as seen:
                    localize(module)
                assert seen.count == 0, f"{what}: {seen.names}"
                assert module.w is mine, f"{what}: another object after the round"
                assert identities(module) == before, f"{what}: {[n for n, _ in identities(module)]}"
                assert_same(mine.detach(), part(full, line, placements), what)

    @pytest.mark.law("values")
    @pytest.mark.world(4)
    def test_two_and_three_dimensions(self, judged: Any, localize: Any, mesh: Any) -> None:
        """Over 2-D and 3-D meshes each parameter must be its DTensor again, whatever placement."""
        for grid, combinations in ((mesh(2, 2), TWO_D), (mesh(1, 2, 2), THREE_D)):
            for placements in combinations:
                for shape in [(8, 4), (7, 5), (2, 1)]:
                    full, what = numbers(*shape), f"{shape} {placement_id(placements)}"
                    module = bag(w=weight(full, grid, placements))
                    localize(module)
                    judged(module, ())
                    assert_whole(module.w, full, grid, placements, what)

    @pytest.mark.law("group")
    @pytest.mark.world(4)
    def test_meshes_of_some_ranks(self, judged: Any, localize: Any, mesh: Any) -> None:
        """On a mesh of some ranks, in any order, the DTensor is again the one it was."""
        for ranks in ([1, 3], [3, 1], [2, 3, 0]):
            line, full = mesh(len(ranks), ranks=ranks), numbers(5, 2)
            module = bag(w=weight(full, line, [S(0)]))
            if line.get_coordinate() is not None:
                localize(module)
                judged(module, ())
                assert_whole(module.w, full, line, [S(0)], f"ranks {ranks}")

    @pytest.mark.law("values")
    @pytest.mark.world(1)
    @EACH_DTYPE
    @pytest.mark.thorough(but=["float8_e4m3fn"])
    def test_every_dtype(self, judged: Any, localize: Any, mesh: Any, dtype: torch.dtype) -> None:
        """A parameter of any dtype, integers and bool too, comes back bit for bit."""
        for shape in [(4,), (), (0, 3)]:
            full, where = numbers(*shape, dtype=dtype), [S(0) if shape else R]
            module = bag(w=weight(full, mesh(1), where, trains=False))
            localize(module)
            judged(module, ())
            assert_whole(module.w, full, mesh(1), where, f"{dtype} {shape}")

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    def test_many_rounds(self, judged: Any, localize: Any, mesh: Any, world: Any) -> None:
        """Round for round the module holds the same local Parameters in the same order."""
        line = mesh(world.size)
        tied = weight(numbers(5, 2), line, [S(0)])
        shared = bag(w=weight(numbers(4, 3), line, [S(1)]), b=nn.Parameter(numbers(2)))
        module = bag(
            a=tied,
            b=nn.Parameter(numbers(3)),
            c=tied,
            frozen=weight(numbers(3), line, [S(0)], trains=False),
            left=shared,
            right=shared,
            deep=nn.Sequential(bag(w=tied), nn.ParameterList([weight(numbers(4), line, [R])])),
            named=nn.ParameterDict([("z", weight(numbers(3), line, [S(0)])), ("a", tied)]),
        )
        localize(module)
        before, keys, carried = identities(module), list(module.state_dict()), baggage(module)
        for number in range(4):
            judged(module, ())
            for name, found in {
                "a": module.a,
                "c": module.c,
                "frozen": module.frozen,
                "right.w": module.right.w,
                "deep.0.w": module.deep[0].w,
                "deep.1.0": module.deep[1][0],
                "named.z": module.named["z"],
                "named.a": module.named["a"],
            }.items():
                assert isinstance(found, DTensor), f"round {number}: {name} is no DTensor"
            assert shares_memory(module.a, module.named["a"]), f"round {number}: come apart"
            assert not module.frozen.requires_grad, f"round {number}: frozen one trains"
            assert not isinstance(module.b, DTensor), f"round {number}: plain one is a DTensor"
            localize(module, (), None)
            assert identities(module) == before, (
                f"round {number}: {[n for n, _ in identities(module)]}"
            )
            assert list(module.state_dict()) == keys, f"round {number}: state dict"
            assert list(module.named) == ["z", "a"], f"round {number}: {list(module.named)}"
        assert not piled_up(module, carried), piled_up(module, carried)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_as_a_forward_pre_hook(self, judged: Any, localize: Any, mesh: Any) -> None:
        """Called as a pre-forward hook is, it returns None, so the arguments stay."""
        module = bag(w=weight(numbers(4), mesh(1), [S(0)]))
        localize(module)
        assert judged(module, (numbers(2),)) is None

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    def test_nothing_was_localized(self, judged: Any, mesh: Any, world: Any) -> None:
        """DTensor and plain parameters that were never localized stay the objects they are."""
        sharded = weight(numbers(5, 2), mesh(world.size), [S(0)])
        module = bag(a=nn.Parameter(numbers(3)), child=bag(w=sharded, b=nn.Parameter(numbers(2))))
        before, carried = identities(module), baggage(module)
        judged(module, ())
        assert identities(module) == before
        assert module.child.w is sharded
        assert not piled_up(module, carried), piled_up(module, carried)

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    def test_ignored_parameters_stay(
        self, judged: Any, localize: Any, mesh: Any, world: Any
    ) -> None:
        """A DTensor that was left alone is the same Parameter in a forward and after its hook."""
        line, full = mesh(world.size), numbers(5, 2)
        ignored = weight(full, line, [S(0)])
        module = bag(a=weight(full, line, [S(0)]), w=ignored, b=weight(full, line, [R]))
        localize(module, ignored_params={ignored})
        before = identities(module)
        judged(module, ())
        assert module.w is ignored, "replaced"
        assert_whole(module.a, full, line, [S(0)], "a")
        # The hook after a forward is not told what to ignore.
        localize(module, (), None)
        assert identities(module) == before, f"{[n for n, _ in identities(module)]}"

    @pytest.mark.law("autograd")
    @pytest.mark.world(1, 2, 3, 4)
    @pytest.mark.thorough(but=["w3"])
    def test_gradients_reach_the_local_parameters(
        self, judged: Any, localize: Any, mesh: Any, world: Any
    ) -> None:
        """What the DTensors earn arrives at the local Parameters: plain, exact and summed."""
        line, full = mesh(world.size), numbers(5, 3)
        for placements in ONE_D:
            what = placement_id(placements)
            module = bag(w=weight(full, line, placements))
            localize(module)
            mine, total = module.w, torch.zeros_like(full)
            for salt in (1, 2, 3):
                judged(module, ())
                factor = numbers(5, 3, salt=salt)
                (module.w * dtensor(factor, line, placements)).sum().backward()
                localize(module)
                total += factor
                assert type(mine.grad) is torch.Tensor, f"{what}: a {type(mine.grad).__name__}"
                assert_same(mine.grad, part(total, line, placements), f"{what}, round {salt}")

    @pytest.mark.law("autograd")
    @pytest.mark.world(2, 4)
    @pytest.mark.thorough(but=["w4"])
    def test_a_reduced_gradient_arrives_finished(
        self, judged: Any, localize: Any, mesh: Any, world: Any
    ) -> None:
        """A gradient that is a sum over the ranks arrives complete, and is no promise."""
        line, full = mesh(world.size), numbers(4, 3)
        module = bag(w=weight(full, line, [R]))
        localize(module)
        mine = module.w
        judged(module, ())
        rows = numbers(2 * world.size, 4, salt=1)
        (dtensor(rows, line, [S(0)]) @ module.w).sum().backward()
        localize(module)
        assert_type(mine.grad, torch.Tensor, "the gradient")
        assert_same(mine.grad, rows.sum(0).unsqueeze(1).expand(4, 3).contiguous())

    @pytest.mark.law("autograd")
    @pytest.mark.world(1)
    def test_tied_parameters_get_the_sum(self, judged: Any, localize: Any, mesh: Any) -> None:
        """A parameter used under several names gets the sum of what each use earns."""
        line = mesh(1)
        tied = weight(numbers(4), line, [S(0)])
        module = bag(a=tied, b=tied, child=bag(c=tied))
        localize(module)
        mine = module.a
        judged(module, ())
        (module.a.sum() + (module.b * 2).sum() + (module.child.c * 4).sum()).backward()
        localize(module)
        assert_same(mine.grad, torch.full((4,), 7.0))

    @pytest.mark.law("autograd")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    @pytest.mark.thorough(but=["inference_mode"])
    def test_outside_autograd(self, judged: Any, localize: Any, mesh: Any, mode: Any) -> None:
        """A first round where no graph is recorded leaves none, and the next trains."""
        module = bag(w=weight(numbers(4), mesh(1), [S(0)]))
        localize(module)
        mine = module.w
        with mode():
            judged(module, ())
            assert module.w.grad_fn is None, "a graph"
            localize(module)
        assert mine.requires_grad
        judged(module, ())
        (module.w * 3).sum().backward()
        localize(module)
        assert_same(mine.grad, torch.full((4,), 3.0))

    @pytest.mark.law("values")
    @pytest.mark.world(1, 2)
    def test_what_happens_in_between_is_seen(
        self, judged: Any, localize: Any, mesh: Any, world: Any
    ) -> None:
        """Optimizer steps, new data, another dtype and requires_grad reach the next round."""
        line, full = mesh(world.size), numbers(5, 2)
        module = bag(w=weight(full, line, [S(0)]))
        localize(module)
        mine = module.w

        def look(expected: torch.Tensor, what: str, *, trains: bool = True) -> None:
            judged(module, ())
            assert_whole(module.w, expected, line, [S(0)], what)
            assert module.w.requires_grad is trains, f"{what}: {module.w.requires_grad=}"
            localize(module)

        look(full, "at first")
        with torch.no_grad():
            mine.add_(1)
        look(full + 1, "after a step")
        mine.data = part(full * 2, line, [S(0)]).clone()
        look(full * 2, "with new data")
        module.double()
        look((full * 2).double(), "in float64")
        mine.requires_grad_(False)
        look((full * 2).double(), "frozen later", trains=False)
        mine.requires_grad_(True)
        look((full * 2).double(), "thawed")

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    def test_another_parameter_in_its_place(
        self, judged: Any, localize: Any, mesh: Any, world: Any
    ) -> None:
        """A Parameter that was assigned between forwards must stay, with its values inside."""
        line, full = mesh(world.size), numbers(4, 3)
        module: Any = bag(w=weight(full, line, [S(0)]))
        localize(module)
        for turn in range(3):
            new = full + turn + 1
            module.w = mine = nn.Parameter(part(new, line, [S(0)]).clone())
            judged(module, ())
            assert_whole(module.w, new, line, [S(0)], f"turn {turn}")
            localize(module)
            assert module.w is mine, f"turn {turn}: another Parameter came back"

    @pytest.mark.law("all-or-nothing")
    @pytest.mark.world(1, 2)
    @pytest.mark.thorough(but=["w2"])
    def test_a_wrong_shape_changes_nothing(
        self, judged: Any, localize: Any, mesh: Any, world: Any
    ) -> None:
        """A local Parameter of another shape than its spec's is an error; all stay local."""
        line, full = mesh(world.size), numbers(4, 3)
        for wrong, forwards in product("abc", (0, 1)):
            module = bag(**{n: weight(full, line, [S(0)]) for n in "abc"})
            localize(module)
            for _ in range(forwards):
                judged(module, ())
                localize(module)
            before = identities(module)
            module.get_parameter(wrong).data = numbers(7, 3)
            refused(partial(judged, module, ()), SHAPE, what=f"(7, 3) for parameter {wrong}")
            assert identities(module) == before, f"{wrong}: {[n for n, _ in identities(module)]}"
            for name in "abc":
                assert not isinstance(getattr(module, name), DTensor), f"{wrong}: {name} differs"

    @pytest.mark.law("isolation")
    @pytest.mark.world(1, 2)
    def test_one_part_of_a_module(self, judged: Any, localize: Any, mesh: Any, world: Any) -> None:
        """Called with a child, both leave the parameters outside that child alone."""
        line, full = mesh(world.size), numbers(5, 2)
        module = bag(a=weight(full, line, [S(0)]), child=bag(b=weight(full, line, [S(0)])))
        localize(module)
        before = identities(module)
        judged(module.child, ())
        assert not isinstance(module.a, DTensor)
        assert_whole(module.child.b, full, line, [S(0)], "child.b")
        localize(module.child)
        assert identities(module) == before
        judged(module, ())
        assert_whole(module.a, full, line, [S(0)], "a")
        localize(module)
        assert identities(module) == before
