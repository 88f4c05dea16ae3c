"""Names, containers, sizes and sequences of calls, through every function that walks modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from conformance.kit.compare import assert_same, local
from conformance.kit.data import numbers
from conformance.kit.layouts import S, part
from conformance.kit.refusals import SHAPE, refused
from conformance.kit.tensor_parallel import bag, weight
from conformance.kit.tp_modules import TREES, Forwards, Walk, held, memory, outline, sharded
from conformance.kit.tp_process import changed

LOCALIZE = "tensor.parallel.ddp._localize_dtensor"
RECONSTRUCT = "tensor.parallel.ddp._reconstruct_dtensor"


@pytest.fixture
def made(mesh: Any, world: Any) -> Callable[[], nn.Parameter]:
    """Makes a DTensor parameter, another one with each call."""
    salts = iter(range(10**6))
    return lambda: weight(numbers(4, 2, salt=next(salts)), mesh(world.size), [S(0)])


@pytest.fixture
def localize(subject: Any) -> Any:
    return subject.function(LOCALIZE)


@pytest.fixture
def reconstruct(subject: Any) -> Any:
    return subject.function(RECONSTRUCT)


def trees(made: Any) -> Iterator[tuple[str, Walk]]:
    """Each tree below a module whose forward says what it finds."""
    for name, tree in TREES.items():
        yield name, Walk(tree(made))


def assert_alike(module: nn.Module, before: dict[str, Any], lay: list[int], what: str) -> None:
    """Nothing but tensors for tensors over the same memory was changed."""
    found = changed(before, outline(module))
    assert not found, f"{what}: {found[0]}: {outline(module)[found[0]]}, was {before[found[0]]}"
    assert memory(module) == lay, f"{what}: other memory"


@pytest.mark.judges(LOCALIZE)
class TestLocalize:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_any_tree(self, judged: Any, made: Any) -> None:
        """In a module of any names, containers and size only the DTensors must be replaced."""
        for name, module in trees(made):
            before, lay = outline(module), memory(module)
            for turn in ("first", "second", "third"):
                judged(module)
                assert sharded(module) == [], f"{name}: {sharded(module)} are DTensors"
                assert_alike(module, before, lay, f"{name}, {turn} call")

    @pytest.mark.law("structure")
    @pytest.mark.should("nobody is promised what a caller hangs on a parameter")
    @pytest.mark.world(2)
    def test_what_hangs_on_a_parameter(self, judged: Any, mesh: Any) -> None:
        """Attributes, a gradient that lies ready and its flag must go with the Parameter."""
        line, full, grad = mesh(2), numbers(4, 2), numbers(4, 2, salt=3)
        param: Any = weight(full, line, [S(0)])
        param.tag, param.grad = object(), weight(grad, line, [S(0)]).data
        module = bag(w=param)
        judged(module)
        assert module.w.tag is param.tag, "the attribute is lost"
        assert type(module.w.grad) is torch.Tensor, f"a {type(module.w.grad).__name__} as gradient"
        assert_same(module.w.grad, part(grad, line, [S(0)]), "gradient")
        assert isinstance(param.grad, DTensor), "the DTensor's own gradient was changed"


@pytest.mark.judges(RECONSTRUCT)
class TestReconstruct:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_any_tree(self, judged: Any, made: Any, localize: Any) -> None:
        """In a module of any names, containers and size each DTensor must have its place again."""
        for name, module in trees(made):
            names = sharded(module)
            localize(module)
            before, lay = outline(module), memory(module)
            for turn in ("first", "second", "third"):
                judged(module, ())
                assert sharded(module) == names, f"{name}, {turn}: {sharded(module)}"
                assert memory(module) == lay, f"{name}, {turn}: other memory"
                judged(module, ())
                assert sharded(module) == names, f"{name}, {turn}, again: {sharded(module)}"
                localize(module)
                assert_alike(module, before, lay, f"{name}, {turn} round")


@pytest.mark.judges("tensor.parallel.ddp._pre_dp_module_transform")
class TestTransform:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_any_tree(self, judged: Any, made: Any) -> None:
        """In a module of any names and size each forward must find the DTensors, and no other."""
        for name, module in trees(made):
            names, lay = sharded(module), memory(module)
            judged(module)
            before = outline(module)
            for turn in ("first", "second", "third"):
                inside = module()
                found = [path for path, value in inside if isinstance(value, DTensor)]
                assert found == names, f"{name}, {turn} forward finds {found}"
                assert_alike(module, before, lay, f"{name}, {turn} forward")
            saved = module.state_dict()
            plain = [n for n in names if n in saved and not isinstance(saved[n], DTensor)]
            assert not plain, f"{name}: {plain} in the state dict are no DTensors"

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_what_is_exchanged_between_forwards(self, judged: Any, mesh: Any) -> None:
        """Parameters and modules that a caller puts in later must be what forwards find."""
        line = mesh(2)
        full, other = numbers(4, 2), numbers(4, 2, salt=5)
        mine = part(other, line, [S(0)])

        def module() -> Any:
            found = Walk(bag(w=weight(full, line, [S(0)]), child=bag(w=weight(full, line, [S(0)]))))
            judged(found)
            found()
            return found

        def find(found: Any, path: str, what: str) -> Any:
            for turn in range(2):
                inside = dict(found())
                assert isinstance(inside[path], DTensor), f"{what}, {turn}: {path} is no DTensor"
                assert_same(local(inside[path]).detach(), mine, f"{what}, forward {turn}")
                assert sharded(found) == [], f"{what}, {turn}: {sharded(found)} stay DTensors"
            assert_same(local(found.state_dict()[path]), mine, f"{what}, state dict")
            return found.get_parameter(path)

        changed_one = module()
        changed_one.tree.w = mine_is = nn.Parameter(mine.clone())
        assert find(changed_one, "tree.w", "a local Parameter") is mine_is, "another Parameter"
        changed_one = module()
        changed_one.tree.w = weight(other, line, [S(0)])
        find(changed_one, "tree.w", "a DTensor Parameter")
        changed_one = module()
        changed_one.tree.child = bag(w=weight(other, line, [S(0)]))
        judged(changed_one)
        find(changed_one, "tree.child.w", "another module")
        changed_one = module()
        changed_one.tree.w = None
        assert dict(changed_one())["tree.w"] is None, "a parameter that was taken out is back"
        changed_one.tree.w = nn.Parameter(mine.clone())
        find(changed_one, "tree.w", "taken out and put in")
        changed_one = module()
        changed_one.load_state_dict(
            {path: weight(other, line, [S(0)]).data for path in ("tree.w", "tree.child.w")},
            assign=True,
        )
        find(changed_one, "tree.w", "assigned")

    @pytest.mark.law("structure")
    @pytest.mark.world(2)
    def test_after_a_refusal(self, judged: Any, mesh: Any) -> None:
        """A module whose forward was refused for a shape must be whole once that is mended."""
        line, full = mesh(2), numbers(4, 2)
        module: Any = Walk(bag(a=weight(full, line, [S(0)]), w=weight(full, line, [S(0)])))
        judged(module)
        for _ in range(2):
            good = module.tree.w
            module.tree.w = nn.Parameter(numbers(3, 3))
            refused(module, SHAPE, "w")
            refused(module.state_dict, SHAPE, "w")
            assert sharded(module) == [], f"{sharded(module)} are DTensors after the refusal"
            module.tree.w = good
            for path, value in module():
                assert isinstance(value, DTensor), f"{path} is no DTensor in the next forward"
                assert_same(local(value).detach(), part(full, line, [S(0)]), path)
            assert sharded(module) == [], f"{sharded(module)} stay DTensors"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_forwards_of_two_modules_interleaved(self, judged: Any, made: Any) -> None:
        """A forward within another module's forward must leave that one's DTensors in."""
        first, second = Walk(bag(w=made())), Walk(bag(w=made()))

        def both(module: Any, _: Any, found: Any) -> Any:
            return [*found, *second(), *held(module)]

        judged(first)
        judged(second)
        first.tree.register_forward_hook(lambda *_: None)
        first.register_forward_hook(both)
        for turn in range(3):
            kinds = [isinstance(value, DTensor) for _, value in first()]
            assert kinds == [True, True, True], f"turn {turn}: {kinds}"
            assert sharded(first) == sharded(second) == [], f"turn {turn}: DTensors stay"


@pytest.mark.judges("tensor.parallel.ddp._get_submodule_n_params")
class TestSubmodule:
    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_any_tree(self, judged: Any, made: Any, localize: Any, reconstruct: Any) -> None:
        """Each name of a parameter must lead to its owner, whatever the names and containers."""
        for name, module in trees(made):
            for change in (lambda _: None, localize, lambda m: reconstruct(m, ()), localize):
                change(module)
                for path, value in held(module):
                    if value is not None:
                        owner, leaf = judged(module, path)
                        found = {**owner._parameters, **owner._buffers}[leaf]
                        assert found is value, f"{name}: {path!r} leads to another tensor"

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_through_modules_that_answer_for_others(self, judged: Any, made: Any) -> None:
        """A path through a compiled module, or another that hands attributes on, must be found."""
        inner = bag(deep=bag(w=made()))
        for wrapper in (Forwards(inner), torch.compile(inner, backend="eager")):
            module = bag(child=wrapper)
            owner, leaf = judged(module, "child.deep.w")
            assert owner is inner.deep, f"{type(wrapper).__name__}: another owner"
            assert leaf == "w", f"{type(wrapper).__name__}: {leaf}"


@pytest.mark.judges("tensor.parallel.ddp._update_module_param")
class TestUpdate:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_any_tree(self, judged: Any, made: Any) -> None:
        """All parameters of any tree must be replaced in one call, each in its place."""
        for name, module in trees(made):
            before = outline(module)
            twins: dict[int, nn.Parameter] = {}
            entries = []
            for owner in module.modules():
                for leaf, value in owner._parameters.items():
                    if value is not None:
                        twin = nn.Parameter(value.detach(), requires_grad=value.requires_grad)
                        twin = twins.setdefault(id(value), twin)
                        twin.__dict__.update(vars(value))
                        entries.append((owner, leaf, twin))
            expected = {id(owner): dict(owner._parameters) for owner in module.modules()}
            for owner, leaf, twin in entries:
                expected[id(owner)][leaf] = twin
            lay = memory(module)
            for entry_list in (entries[::-1], entries):
                judged(entry_list)
                assert_alike(module, before, lay, name)
                for owner in module.modules():
                    got, wanted = owner._parameters, expected[id(owner)]
                    assert all(got[n] is wanted[n] for n in wanted), f"{name}: {list(wanted)}"
