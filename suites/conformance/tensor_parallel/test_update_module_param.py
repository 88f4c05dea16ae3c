"""Parameters replaced where they stand."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from conformance.kit.cases import each
from conformance.kit.compare import assert_same, assert_type
from conformance.kit.data import numbers
from conformance.kit.layouts import S, dtensor, part
from conformance.kit.refusals import MISSING, refused
from conformance.kit.tensor_parallel import bag, identities, weight


def plain(salt: int = 0, *, trains: bool = True) -> nn.Parameter:
    """A parameter with values of its own."""
    return nn.Parameter(numbers(3, salt=salt), requires_grad=trains)


def sample() -> nn.Module:
    """Parameters around buffers and modules, at two depths."""
    return bag(
        first=plain(1),
        early=numbers(2),
        second=plain(2),
        child=bag(one=plain(3), state=numbers(4), two=plain(4), three=plain(5)),
        third=plain(6),
        late=numbers(3),
        last=plain(7),
    )


def owner_of(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that owns the parameter, and its name there."""
    prefix, _, leaf = path.rpartition(".")
    return module.get_submodule(prefix), leaf


@pytest.mark.judges("tensor.parallel.ddp._update_module_param")
class TestUpdateModuleParam:
    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_one_is_replaced_where_it_stands(self, judged: Any) -> None:
        """A replaced parameter keeps its place in named_parameters() and in the state dict."""

        def replace(path: str) -> None:
            module, new = sample(), plain(11)
            before, keys = identities(module), list(module.state_dict())
            judged([(*owner_of(module, path), new)])
            expected = [(n, id(new) if n == path else i) for n, i in before]
            assert identities(module) == expected, f"now {[n for n, _ in identities(module)]}"
            assert module.get_parameter(path) is new, "another object is registered"
            assert list(module.state_dict()) == keys, f"keys {list(module.state_dict())}"

        each([n for n, _ in sample().named_parameters()], replace)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_the_order_of_the_list_does_not_matter(self, judged: Any) -> None:
        """Several replaced in any order of the list leave the order of named_parameters()."""
        names = [n for n, _ in sample().named_parameters()]
        for name, order in {
            "in order": names,
            "backwards": names[::-1],
            "every second": names[::2],
            "shuffled": [names[i] for i in (3, 0, 6, 2, 5)],
        }.items():
            module = sample()
            new = {n: plain(11 + i) for i, n in enumerate(order)}
            before, keys = identities(module), list(module.state_dict())
            judged([(*owner_of(module, n), new[n]) for n in order])
            expected = [(n, id(new[n]) if n in new else i) for n, i in before]
            assert identities(module) == expected, (
                f"{name}: now {[n for n, _ in identities(module)]}"
            )
            assert list(module.state_dict()) == keys, f"{name}: {list(module.state_dict())}"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_parameters_that_change_places(self, judged: Any) -> None:
        """Each name gets the parameter that the list gives it, whichever name had it before."""
        names = ["first", "child.one", "child.two", "last"]
        for name, given in {
            "two of a module": {"first": "last", "last": "first"},
            "two of two modules": {"first": "child.one", "child.one": "first"},
            "in a circle": dict(zip(names, [*names[1:], names[0]], strict=True)),
            "one moves on": {"child.one": "child.two", "child.two": "child.three"},
        }.items():
            module = sample()
            held = dict(module.named_parameters())
            judged([(*owner_of(module, n), held[other]) for n, other in given.items()])
            for path in held:
                now = module.get_parameter(path)
                assert now is held[given.get(path, path)], f"{name}: {path} has another parameter"

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    def test_between_dtensor_and_local(self, judged: Any, mesh: Any, world: Any) -> None:
        """A DTensor parameter gives way to a local one and comes back, the order unchanged."""
        line, full = mesh(world.size), numbers(5, 2)
        sharded = weight(full, line, [S(0)])
        module = bag(a=plain(1), w=sharded, b=plain(2))
        local = nn.Parameter(part(full, line, [S(0)]).clone())
        for new in (local, sharded, local):
            judged([(module, "w", new)])
            assert [n for n, _ in module.named_parameters()] == ["a", "w", "b"]
            assert module.w is new

    @pytest.mark.law("structure")
    @pytest.mark.world(1, 2)
    def test_through_a_tensor_of_a_graph(self, judged: Any, mesh: Any, world: Any) -> None:
        """A DTensor that autograd made may take the place for a while; then all is as before."""
        line, full = mesh(world.size), numbers(5, 2)
        local = nn.Parameter(part(full, line, [S(0)]).clone())
        module = bag(a=plain(1), w=local, state=numbers(2), child=bag(w=local, b=plain(2)))
        before, keys = identities(module), list(module.state_dict())
        made = dtensor(full, line, [S(0)], local=local.view_as(local))
        assert made.grad_fn is not None
        judged([(module, "w", made), (module.child, "w", made)])
        assert_type(module.w, DTensor, "module.w")
        assert module.w.grad_fn is not None, "its graph is lost"
        assert module.child.w is module.w, "no longer one tensor"
        judged([(module, "w", local), (module.child, "w", local)])
        assert identities(module) == before, f"now {[n for n, _ in identities(module)]}"
        assert list(module.state_dict()) == keys, f"keys {list(module.state_dict())}"
        assert not isinstance(module.w, DTensor)

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_parameter_lists_and_dicts(self, judged: Any) -> None:
        """In a ParameterList and a ParameterDict length, order and keys stay."""
        module = bag(
            several=nn.ParameterList([plain(1), plain(2), plain(3)]),
            named=nn.ParameterDict([("z", plain(4)), ("a", plain(5)), ("k", plain(6))]),
        )
        new = {"several.0": plain(11), "named.z": plain(12), "several.1": plain(13)}
        before = identities(module)
        judged([(*owner_of(module, n), p) for n, p in new.items()])
        assert identities(module) == [(n, id(new[n]) if n in new else i) for n, i in before]
        assert [id(p) for p in module.several] == [i for n, i in identities(module) if n[:1] == "s"]
        assert list(module.named) == ["z", "a", "k"], list(module.named)
        assert module.named["z"] is new["named.z"]

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_ties_stay(self, judged: Any) -> None:
        """Tied parameters that get the same replacement are tied, within and across modules."""
        tied = plain(1)
        module = bag(a=tied, b=plain(2), c=tied, child=bag(d=plain(3), e=tied))
        new = plain(11)
        judged([(module, "a", new), (module, "c", new), (module.child, "e", new)])
        assert module.a is module.c is module.child.e is new
        assert [n for n, _ in module.named_parameters()] == ["a", "b", "child.d"]
        assert [n for n, _ in identities(module)] == ["a", "b", "c", "child.d", "child.e"]

    @pytest.mark.law("structure")
    @pytest.mark.should("a caller may name each place of a tie")
    @pytest.mark.world(1)
    def test_ties_between_the_owners_stay(self, judged: Any) -> None:
        """A name that is not in the list is replaced with its twin, if its owner is in the list."""
        for first in (0, 1):
            tied, new = plain(1), plain(11)
            module = bag(a=tied, b=bag(c=tied, d=plain(2)), e=bag(f=plain(3)))
            entries = [(module, "a", new), (module.b, "d", plain(12))]
            judged(entries[first:] + entries[:first])
            assert module.a is module.b.c is new, f"entry {first} first: untied"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_what_is_missing_stays_missing(self, judged: Any) -> None:
        """Where several parameters are None, one that is given must not be given to the others."""
        module = bag(a=plain(1), child=bag(b=plain(2)))
        for owner in (module, module.child):
            owner.register_parameter("bias", None)
            owner.register_parameter("scale", None)
        new = plain(11)
        judged([(module, "bias", new), (module.child, "b", plain(12))])
        assert module.bias is new
        missing = (module.scale, module.child.bias, module.child.scale)
        assert missing == (None, None, None), f"now {missing}"

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_a_shared_module(self, judged: Any) -> None:
        """A module that stands in two places is changed in both by one entry."""
        shared = bag(w=plain(1), b=plain(2))
        module, new = bag(left=shared, right=shared), plain(11)
        judged([(shared, "w", new)])
        assert module.left.w is module.right.w is new
        names = [n for n, _ in identities(module)]
        assert names == ["left.w", "left.b", "right.w", "right.b"], names

    @pytest.mark.law("structure")
    @pytest.mark.world(1)
    def test_the_replacement_is_taken_as_it_is(self, judged: Any) -> None:
        """The replacement keeps its flags: a frozen one stays frozen, an integer one an integer."""
        counts = nn.Parameter(numbers(3, dtype=torch.int64), requires_grad=False)
        frozen, trained = plain(11, trains=False), plain(12)
        module = bag(a=plain(1), b=plain(2, trains=False), c=plain(3))
        judged([(module, "a", frozen), (module, "b", trained), (module, "c", counts)])
        assert module.a is frozen
        assert module.b is trained
        assert module.c is counts
        assert [p.requires_grad for p in module.parameters()] == [False, True, False]

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_a_buffer_and_an_attribute(self, judged: Any) -> None:
        """A buffer, and a tensor that is an attribute, must be replaced as a parameter is."""
        module: Any = nn.BatchNorm1d(2)
        module.scale = numbers(2)
        judged([(module, "running_mean", numbers(2, salt=1)), (module, "scale", numbers(3))])
        assert_same(module.running_mean, numbers(2, salt=1), "the buffer")
        assert_same(module.scale, numbers(3), "the attribute")

    @pytest.mark.law("all-or-nothing")
    @pytest.mark.world(1)
    def test_an_unknown_name_changes_nothing(self, judged: Any) -> None:
        """A name that the module has no parameter of is an error that names it; all stays."""

        def refuse(name: str) -> None:
            for at in (0, 1, 2):
                module = sample()
                before, keys = identities(module), list(module.state_dict())
                entries = [(module, "second", plain(11)), (module.child, "two", plain(12))]
                entries.insert(at, (module, name, plain(13)))
                refused(partial(judged, entries), name, kinds=MISSING, what=f"entry {at}")
                assert identities(module) == before, f"parameters changed, at place {at}"
                assert list(module.state_dict()) == keys, f"keys changed, at place {at}"

        each(["nowhere", "child.one", "one", "child", "forward"], refuse)

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_the_list_stays_as_it_was(self, judged: Any) -> None:
        """The list is not changed, a second call changes nothing more, an empty list nothing."""
        module = sample()
        start = identities(module)
        judged([])
        assert identities(module) == start, "an empty list changed the module"
        entries = [(module, "second", plain(11)), (module.child, "two", plain(12))]
        copy = list(entries)
        judged(entries)
        once, attributes = identities(module), sorted(vars(module))
        judged(entries)
        assert identities(module) == once, "the second call changed the parameters"
        assert sorted(vars(module)) == attributes, "the second call left attributes"
        assert len(entries) == len(copy), "the list was changed"
        assert all(a is b for a, b in zip(entries, copy, strict=True)), "the list was changed"
